"""Write a bundle: one folder with the model, what it needs, and the proof that it works.

    manifest.json    what it is; follows from the inputs alone (edgeport.bundle.manifest)
    evidence.json    what was measured, when and where (edgeport.validate.evidence)
    report.html      both, for people; holds the text of evidence.json but for what suites keep of each sample
    explain.json     where bytes, errors and flips lie; only after `edgeport explain`
    model/           the artifact's files
    assets/          tokenizer, preprocessing: what an app needs beside the model
    golden/          golden vectors (edgeport.bundle.golden)

The chain of hashes: the manifest hashes every file and the report without its evidence; the evidence
carries the hash of the manifest; the report carries the evidence.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from edgeport.bundle.golden import TOKENIZER, Golden, save_golden
from edgeport.bundle.manifest import (
    ASSETS_FOLDER,
    GOLDEN_FOLDER,
    MODEL_FOLDER,
    EncoderEntry,
    FileEntry,
    ImageEntry,
    LayerEntry,
    Manifest,
    SettingsEntry,
    SourceEntry,
    StepEntry,
    TensorEntry,
    check_relative,
)
from edgeport.bundle.tokenizer import CONFIG, device_config
from edgeport.errors import BadInputError
from edgeport.storage import canonical_json, hash_bytes, hash_file, list_files, new_folder, tree_size, write_text
from edgeport.validate.evidence import DataRecord

if TYPE_CHECKING:
    from edgeport.compress.apply import LayerRecord
    from edgeport.compress.restructure import StepRecord
    from edgeport.data.samples import SampleRecord
    from edgeport.export.artifact import Artifact, LoweringSettings
    from edgeport.model.types import Model
    from edgeport.recipe import Recipe
    from edgeport.target import Target
    from edgeport.validate.evidence import Evidence

MANIFEST = "manifest.json"
EVIDENCE = "evidence.json"
REPORT = "report.html"
EXPLANATION = "explain.json"
"""What `edgeport explain` adds: it is made later, and no part of what the manifest hashes."""

TEXT_BYTES = 4 * 1024 * 1024
"""Room for manifest, evidence and report together; MiniLM's take 0.1 MB."""

Render = Callable[[Mapping[str, Any], str], str]
"""(manifest as JSON values, `report_text` of evidence.json or "") -> the text of report.html, which holds it once."""


@dataclass(frozen=True)
class Contents:
    """What goes into a bundle.

    Attributes:
        model: the original model: its name, source, task, assets and preprocessing are recorded.
        artifact: the lowered model; its files are copied.
        layers: what compression did to each compressible weight.
        golden: golden vectors; the first few samples are kept.
        evidence: what was measured on `artifact`.
        toolchain: versions of the packages that decide what the files contain.
        calibration: the inputs that methods were tuned on, if any.
        steps: what pruning, factorizing and the like did before.
        generation: further text files beside the assets, by name: settings of generation libraries.
        tokenizer: texts and the ids that must come of them; None without a decoder.
    """

    model: Model
    recipe: Recipe
    target: Target
    settings: LoweringSettings
    artifact: Artifact
    layers: tuple[LayerRecord, ...]
    golden: Golden
    evidence: Evidence
    toolchain: Mapping[str, str]
    calibration: SampleRecord | None = None
    steps: tuple[StepRecord, ...] = ()
    generation: Mapping[str, str] = field(default_factory=dict)
    tokenizer: Mapping[str, Any] | None = None

    @property
    def assets_folder(self) -> Literal["assets", "model"]:
        """Where the assets go. A generation library's settings name no file outside of their own folder."""
        return MODEL_FOLDER if self.generation else ASSETS_FOLDER


def evidence_text(evidence: Evidence) -> str:
    """The text of evidence.json. No "<" in it: it can stand inside an HTML script element as it is."""
    return canonical_json(evidence.model_dump(mode="json")).replace("<", "\\u003c")


SAMPLES = (
    "original_scores",
    "artifact_scores",
    "rows",
    "original_answers",
    "artifact_answers",
    "confidence",
    "weights",
)
"""What a suite's score keeps of each sample."""


def report_text(evidence: str) -> str:
    """What report.html holds of the text of evidence.json: all but what a suite keeps of each sample, which would be
    most of the page's bytes and is drawn nowhere.
    """
    document = json.loads(evidence)
    tasks = [{key: value for key, value in task.items() if key not in SAMPLES} for task in document["tasks"]]
    return canonical_json({**document, "tasks": tasks}).replace("<", "\\u003c") if tasks else evidence


def check_destination(destination: Path, *, force: bool, marker: str = MANIFEST, what: str = "bundle") -> None:
    """Refuse, before anything long starts, a place where a bundle can't be put.

    With `force` an older bundle or an empty folder is replaced; a folder of anything else never is.

    Args:
        marker: the file that tells an older output from a folder of anything else.
        what: the output's name, for messages.

    Raises:
        BadInputError: the place is taken, or can't be made.
    """
    if destination.is_dir():
        taken = any(destination.iterdir())
        if taken and not (destination / marker).is_file():
            raise BadInputError(
                f"The output folder exists and is no {what}; edgeport does not replace it.",
                where=destination,
                next_step="Choose another output folder.",
            )
        if taken and not force:
            raise BadInputError(
                "The output folder exists already.",
                where=destination,
                next_step="Choose another output folder, or pass --force to replace it.",
            )
    elif destination.exists() or destination.is_symlink():
        raise BadInputError("The output is a file, not a folder.", where=destination)
    above = _existing(destination.absolute().parent)
    try:
        # Permission bits don't tell all (root, read-only disks): make something there and take it away.
        tempfile.TemporaryDirectory(prefix=".edgeport.", dir=above).cleanup()
    except OSError as error:
        raise BadInputError(
            f"The output folder can't be written: {error.strerror}.",
            where=above,
            next_step="Choose another output folder, or change the permissions of that one.",
        ) from error


def _existing(path: Path) -> Path:
    """The closest of an absolute path and the folders above it that exists."""
    while not path.exists():
        path = path.parent
    return path


def _check_space(destination: Path, needed: int) -> None:
    place = _existing(destination.absolute())
    available = shutil.disk_usage(place).free
    if available < needed:
        raise BadInputError(
            f"There is no room for the bundle: it needs {needed:,} bytes, {available:,} are free.",
            where=place,
            next_step="Free some space, or choose an output folder on another disk.",
        )


def _copy(source: Path, destination: Path) -> None:
    """Copy a file's content only: no times, no permission bits of the machine it was made on."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, destination)
    destination.chmod(0o644)


def _asset(name: str) -> str:
    try:
        return check_relative(name)
    except ValueError as error:
        raise BadInputError(f"An asset has a bad name: {error}.", where=name) from error


def write_assets(assets: Mapping[str, Path], folder: Path) -> None:
    """Copy a model's assets, in the form that device runtimes read."""
    for name, source in assets.items():
        _copy(source, folder / _asset(name))
        if name == CONFIG:
            write_text(folder / name, device_config(source.read_text(encoding="utf-8")))


def _write_files(folder: Path, contents: Contents, golden: Golden) -> None:
    """Copy the model and its assets, and write the golden vectors."""
    root = contents.artifact.root
    for source in list_files(root):
        _copy(source, folder / MODEL_FOLDER / source.relative_to(root))
    assets = folder / contents.assets_folder
    write_assets(contents.model.assets, assets)
    for name, text in contents.generation.items():
        write_text(assets / _asset(name), text)
    (folder / GOLDEN_FOLDER).mkdir()
    save_golden(golden, folder / GOLDEN_FOLDER)
    if contents.tokenizer is not None:
        write_text(folder / GOLDEN_FOLDER / TOKENIZER, canonical_json(contents.tokenizer))
    for path in (folder / GOLDEN_FOLDER).iterdir():
        path.chmod(0o644)


def _files(folder: Path) -> dict[str, FileEntry]:
    return {
        path.relative_to(folder).as_posix(): FileEntry(sha256=hash_file(path), bytes=path.stat().st_size)
        for path in list_files(folder)
    }


def _parameters(contents: Contents) -> int:
    """Values in the original's parameters; a model that came compressed is the smaller one."""
    if contents.steps:
        return contents.steps[0].parameters_before
    return sum(parameter.numel() for parameter in contents.model.module.parameters())


def make_manifest(contents: Contents, files: dict[str, FileEntry]) -> Manifest:
    """The manifest of a bundle with these files, still without the hash of its report."""
    model, artifact, tuned = contents.model, contents.artifact, contents.calibration
    return Manifest(
        name=model.name,
        task=model.task,
        modality=model.modality,
        source=SourceEntry.model_validate(asdict(model.source)),
        parameters=_parameters(contents),
        recipe=contents.recipe,
        target=contents.target,
        settings=SettingsEntry.model_validate(asdict(contents.settings)),
        runtime=artifact.runtime,
        delegate=artifact.delegate,
        entry=f"{MODEL_FOLDER}/{artifact.entry}",
        inputs=tuple(TensorEntry.model_validate(asdict(spec)) for spec in artifact.inputs),
        outputs=tuple(TensorEntry.model_validate(asdict(spec)) for spec in artifact.outputs),
        files=files,
        layers=tuple(LayerEntry.model_validate(asdict(record)) for record in contents.layers),
        steps=tuple(StepEntry.model_validate(asdict(record)) for record in contents.steps),
        weights=dict(artifact.weights),
        image=None if model.image is None else ImageEntry.model_validate(asdict(model.image)),
        labels=model.labels,
        data=contents.evidence.data,
        calibration=None if tuned is None else DataRecord.model_validate(asdict(tuned)),
        toolchain=dict(contents.toolchain),
        facts=dict(artifact.facts),
        context=artifact.context,
        encoder=None if artifact.encoder is None else EncoderEntry.model_validate(asdict(artifact.encoder)),
        assets=contents.assets_folder,
    )


def _write_texts(folder: Path, manifest: Manifest, evidence: Evidence, render: Render) -> None:
    """Write manifest, evidence and report, each bound to the others by hash."""
    plain = manifest.to_json()
    shell = render(plain, "")
    whole = canonical_json({**plain, "report_shell_sha256": hash_bytes(shell.encode())}).encode()
    measured = evidence_text(evidence.model_copy(update={"manifest_sha256": hash_bytes(whole)}))
    (folder / MANIFEST).write_bytes(whole)
    (folder / EVIDENCE).write_bytes(measured.encode())
    (folder / REPORT).write_bytes(render(plain, report_text(measured)).encode())


def write_bundle(destination: Path, contents: Contents, *, render: Render, force: bool = False) -> Path:
    """Write a bundle under a temporary name, and rename it when it is whole.

    Args:
        render: makes the report (edgeport.report.render_report).
        force: replace an older bundle.

    Returns:
        `destination`.

    Raises:
        BadInputError: the destination exists and `force` is not given, can't be written, or the disk is full.
    """
    check_destination(destination, force=force)
    golden = contents.golden.first()
    try:
        assets = sum(path.stat().st_size for path in contents.model.assets.values())
        _check_space(destination, tree_size(contents.artifact.root) + assets + golden.nbytes() + TEXT_BYTES)
        with new_folder(destination, replace=force) as folder:
            _write_files(folder, contents, golden)
            _write_texts(folder, make_manifest(contents, _files(folder)), contents.evidence, render)
    except OSError as error:
        raise BadInputError(
            f"The bundle can't be written: {error.strerror or error}.",
            where=error.filename or destination,
            next_step="Free some space, or choose another output folder.",
        ) from error
    return destination
