"""Is this installation able to work? Versions and conflicts, each runtime tried for real, disk and memory.

A runtime counts as able only when a one-layer model was really lowered with it, loaded, run, and gave
torch's numbers. Each is tried in its own process (`python -m edgeport.doctor RUNTIME`), so that a library
that crashes takes nothing with it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from edgeport.resources import PACKAGE
from edgeport.schema import Strict
from edgeport.storage import cache_root, tree_size
from edgeport.target import RuntimeName

if TYPE_CHECKING:
    from edgeport.model.types import Model

PROBE_TARGETS: dict[RuntimeName, str] = {
    "onnxruntime": "linux-x86_64-ort",
    "executorch": "raspberry-pi-5-executorch",
    "coreml": "ios18-coreml",
}
"""The target that stands for each runtime."""

EXTRAS: dict[str, RuntimeName] = {"executorch": "executorch", "coreml": "coreml"}
"""The optional dependency groups, and the runtime each brings."""

PROBE_SECONDS = 180
"""A probe that takes longer than this hangs."""

TOLERANCE = 1e-2
"""Largest |artifact - torch| of the probe, for fp16 arithmetic on outputs of about 1."""

LEAST_FREE_DISK = 5_000_000_000
LEAST_FREE_MEMORY = 2_000_000_000
"""Bytes; below these an export of a model of 100 million parameters is likely to fail."""


class PackageState(Strict):
    """One requirement of edgeport against what is installed."""

    name: str
    required: str
    installed: str | None
    group: str
    state: Literal["ok", "wrong version", "missing", "not installed (optional)"]


class RuntimeState(Strict):
    """What one runtime can do on this machine.

    Attributes:
        lower: a one-layer model became a file.
        execute: "yes" (the very runtime), "reference" (edgeport's evaluator of the saved file) or "no".
        detail: why not, in one line.
    """

    runtime: RuntimeName
    required: bool
    installed: bool
    lower: Literal["yes", "no"]
    execute: Literal["yes", "reference", "no"]
    detail: str


class Diagnosis(Strict):
    """Everything the doctor found. `problems` is empty when all that is required is well."""

    edgeport: str
    python: str
    packages: tuple[PackageState, ...]
    conflicts: tuple[str, ...]
    runtimes: tuple[RuntimeState, ...]
    cache: str
    cache_bytes: int
    free_disk_bytes: int
    available_memory_bytes: int
    cores: int
    problems: tuple[str, ...]
    warnings: tuple[str, ...]


def _declared() -> list[Requirement]:
    """The requirements of edgeport with their groups as `extra` markers, from its metadata or from the checkout."""
    try:
        return [Requirement(text) for text in metadata.requires("edgeport") or []]
    except metadata.PackageNotFoundError:
        project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]
        lines = list(project["dependencies"])
        for group, members in project["optional-dependencies"].items():
            lines += [f'{member}; extra == "{group}"' for member in members]
        return [Requirement(line) for line in lines]


def _applies(requirement: Requirement, extra: str = "") -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def _installed() -> dict[str, metadata.Distribution]:
    """The importable distributions by name; of two with one name the first on the path, which is what gets imported."""
    found: dict[str, metadata.Distribution] = {}
    for dist in metadata.distributions():
        name = dist.metadata["Name"]
        if name:  # a half-removed package leaves a folder without a name
            found.setdefault(canonicalize_name(name), dist)
    return found


def check_packages() -> tuple[PackageState, ...]:
    """Every requirement of edgeport, and of its optional groups, against what is installed."""
    installed = _installed()
    states = []
    for requirement in _declared():
        name = canonicalize_name(requirement.name)
        group = next((extra for extra in ("", *EXTRAS) if _applies(requirement, extra)), None)
        if group is None or name == "edgeport":
            continue
        found = installed[name].version if name in installed else None
        state: Literal["ok", "wrong version", "missing", "not installed (optional)"]
        if found is None:
            state = "not installed (optional)" if group else "missing"
        else:
            state = "ok" if requirement.specifier.contains(found, prereleases=True) else "wrong version"
        states.append(
            PackageState(
                name=requirement.name,
                required=str(requirement.specifier),
                installed=found,
                group=group or "required",
                state=state,
            )
        )
    return tuple(states)


def find_conflicts() -> tuple[str, ...]:
    """Installed packages that ask for another version of something edgeport's packages need, as `pip check` says it."""
    installed = _installed()
    ours = {canonicalize_name(requirement.name) for requirement in _declared()}
    found = []
    for name, dist in sorted(installed.items()):
        for requirement in map(Requirement, dist.requires or []):
            wanted = canonicalize_name(requirement.name)
            if not _applies(requirement) or name == "edgeport" or not {name, wanted} & ours:
                continue
            if wanted not in installed:
                found.append(f"{name} {dist.version} needs {requirement}, which is not installed")
            elif not requirement.specifier.contains(installed[wanted].version, prereleases=True):
                found.append(f"{name} {dist.version} needs {requirement}, but {installed[wanted].version} is installed")
    return tuple(found)


def _probe_model() -> Model:
    """One linear layer with fixed weights, as a Model."""
    import torch

    from edgeport.model.types import Model, Source, TensorSpec

    torch.manual_seed(0)
    return Model(
        name="probe",
        module=torch.nn.Linear(8, 4).eval(),
        source=Source("factory", "edgeport.doctor", {}),
        task="feature-extraction",
        modality="other",
        inputs=(TensorSpec("input", "float32", (1, 8)),),
        outputs=(TensorSpec("output", "float32", (1, 4)),),
        example={"input": torch.linspace(-1, 1, 8).reshape(1, 8)},
        huggingface=False,
    )


def probe(runtime: RuntimeName) -> RuntimeState:
    """Lower a one-layer model in this process, run the file, and compare with torch."""
    from edgeport.export.artifact import LoweringSettings
    from edgeport.export.dispatch import lower
    from edgeport.runtime.session import open_session
    from edgeport.target import load_target

    required = runtime not in EXTRAS.values()

    def state(lowered: bool, execute: Literal["yes", "reference", "no"], detail: str) -> RuntimeState:
        return RuntimeState(
            runtime=runtime,
            required=required,
            installed=True,
            lower="yes" if lowered else "no",
            execute=execute,
            detail=detail,
        )

    model = _probe_model()
    target = load_target(PROBE_TARGETS[runtime])
    with tempfile.TemporaryDirectory() as folder:
        try:
            artifact = lower(model, target, LoweringSettings(target.precisions[0], "fixed"), Path(folder))
        except Exception as error:  # noqa: BLE001 - whatever a broken library raises is the finding
            return state(False, "no", f"{type(error).__name__}: {error}")
        try:
            session = open_session(artifact)
            outputs = session.run({name: value.numpy() for name, value in model.example.items()})
        except Exception as error:  # noqa: BLE001 - as above
            return state(True, "no", f"{type(error).__name__}: {error}")
    expected = model.module(**model.example).detach().numpy()
    worst = float(abs(outputs["output"] - expected).max())
    # Written so that NaN fails too.
    if not worst <= TOLERANCE:
        return state(True, "no", f"the file's output differs from torch by {worst:.2g}")
    return state(True, "yes" if session.vendor_kernels else "reference", target.execution.statement)


def _probe_apart(runtime: RuntimeName, packages: tuple[PackageState, ...]) -> RuntimeState:
    """`probe` in its own process."""

    def unable(installed: bool, detail: str) -> RuntimeState:
        return RuntimeState(
            runtime=runtime,
            required=runtime not in EXTRAS.values(),
            installed=installed,
            lower="no",
            execute="no",
            detail=detail,
        )

    group = next((extra for extra, brings in EXTRAS.items() if brings == runtime), "required")
    absent = [p.name for p in packages if p.group in (group, "required") and p.installed is None]
    if absent:
        hint = "" if group == "required" else f"; `pip install 'edgeport[{group}]'`"
        return unable(False, f"{', '.join(absent)} not installed{hint}")
    command = [sys.executable, "-m", "edgeport.doctor", runtime]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return unable(True, f"no answer within {PROBE_SECONDS} s")
    if run.returncode != 0:
        last = (run.stderr.strip().splitlines() or ["no message"])[-1]
        return unable(True, f"the process ended with code {run.returncode}: {last}")
    return RuntimeState.model_validate_json(run.stdout.strip().splitlines()[-1])


def _nearest_folder(path: Path) -> Path:
    while not path.is_dir():
        path = path.parent
    return path


def _problems(
    packages: tuple[PackageState, ...], conflicts: tuple[str, ...], runtimes: tuple[RuntimeState, ...]
) -> Iterator[str]:
    for package in packages:
        if package.state in ("missing", "wrong version"):
            yield f"{package.name} {package.required} is required; installed: {package.installed or 'nothing'}"
    yield from conflicts
    for runtime in runtimes:
        able = runtime.lower == "yes" and runtime.execute != "no"
        if not able and (runtime.required or runtime.installed):
            yield f"{runtime.runtime} does not work: {runtime.detail}"


def diagnose(report: Callable[[str], None] = lambda _: None) -> Diagnosis:
    """Look at everything. Takes about ten seconds a runtime.

    Args:
        report: is told what is tried now.
    """
    import psutil

    from edgeport import __version__

    report("packages")
    packages = check_packages()
    conflicts = find_conflicts()
    runtimes = []
    for runtime in get_args(RuntimeName):
        report(f"{runtime}: lower and run one layer")
        runtimes.append(_probe_apart(runtime, packages))
    cache = cache_root()
    free_disk = shutil.disk_usage(_nearest_folder(cache.absolute())).free
    memory = psutil.virtual_memory().available
    warnings = [f"{r.runtime} is left out: {r.detail}" for r in runtimes if not r.installed and not r.required]
    if free_disk < LEAST_FREE_DISK:
        warnings.append(f"only {free_disk / 1e9:.1f} GB of disk are free where the cache is")
    if memory < LEAST_FREE_MEMORY:
        warnings.append(f"only {memory / 1e9:.1f} GB of memory are free")
    return Diagnosis(
        edgeport=__version__,
        python=sys.version.split()[0],
        packages=packages,
        conflicts=conflicts,
        runtimes=tuple(runtimes),
        cache=str(cache),
        cache_bytes=tree_size(cache) if cache.is_dir() else 0,
        free_disk_bytes=free_disk,
        available_memory_bytes=memory,
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        problems=tuple(_problems(packages, conflicts, tuple(runtimes))),
        warnings=tuple(warnings),
    )


if __name__ == "__main__":
    print(json.dumps(probe(sys.argv[1]).model_dump(mode="json")))  # type: ignore[arg-type]
