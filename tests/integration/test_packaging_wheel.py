"""The built wheel, installed into a clean environment and used from another folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from edgeport.errors import EXIT_BAD_INPUT

ROOT = Path(__file__).resolve().parents[2]
REGISTER = "optimum/commands/register/register_edgeport.py"


def _build(folder: Path) -> Path:
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _build(tmp_path_factory.mktemp("wheel"))


def _link_dependencies(source: Path, destination: Path) -> None:
    """Every installed package but edgeport, as links: installing torch again would take minutes.

    `optimum` is a namespace that edgeport's wheel adds a file to, so its folders are made and their content linked.
    """
    for path in source.iterdir():
        if "edgeport" in path.name or path.name in ("optimum", "__pycache__"):
            continue
        (destination / path.name).symlink_to(path)
    for folder in ("optimum", "optimum/commands"):
        (destination / folder).mkdir()
        for path in (source / folder).iterdir():
            if path.name not in ("commands", "register", "__pycache__"):
                (destination / folder / path.name).symlink_to(path)


@pytest.fixture(scope="session")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a new environment in which edgeport comes from the wheel."""
    root = tmp_path_factory.mktemp("clean") / "venv"
    venv.create(root, symlinks=True)
    interpreter = root / "bin" / "python"
    packages = root / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    _link_dependencies(Path(sysconfig.get_path("purelib")), packages)
    pip = [sys.executable, "-m", "pip", "--python", str(interpreter), "install", "--no-deps", "--no-index"]
    subprocess.run([*pip, str(wheel)], check=True, capture_output=True)
    return interpreter


@pytest.fixture
def run(python: Path, tmp_path: Path) -> Callable[[Sequence[str]], subprocess.CompletedProcess[str]]:
    """Run a command of the clean environment from a folder that has nothing to do with edgeport."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}

    def call(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        full = [str(python.parent / command[0]), *command[1:]]
        return subprocess.run(full, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    return call


Run = Callable[[Sequence[str]], subprocess.CompletedProcess[str]]


def test_the_wheel_carries_the_data_and_nothing_of_the_checkout(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder in ("targets", "calibration"):
        files = [path for path in (ROOT / folder).rglob("*") if path.is_file()]
        assert {f"edgeport/_data/{path.relative_to(ROOT).as_posix()}" for path in files} <= names
    assert {f"edgeport/recipes/{name}.toml" for name in ("fp32", "fp16", "int8", "int4")} <= names
    assert "edgeport/py.typed" in names
    assert "edgeport-0.1.0.dist-info/licenses/LICENSE" in names
    assert {name.split("/")[0] for name in names} == {"edgeport", "optimum", "edgeport-0.1.0.dist-info"}
    assert [name for name in names if name.startswith("optimum/")] == [REGISTER]
    assert "edgeport/cli/optimum_command.py" not in names


def test_the_wheel_is_the_same_when_built_again(wheel: Path, tmp_path: Path) -> None:
    assert _build(tmp_path).read_bytes() == wheel.read_bytes()


def test_targets_from_another_folder(run: Run) -> None:
    where = run(["python", "-c", "import edgeport; print(edgeport.__file__)"]).stdout
    assert "clean" in where
    assert str(ROOT) not in where
    done = run(["edgeport", "targets", "--json"])
    assert done.returncode == 0, done.stderr
    names = {target["name"] for target in json.loads(done.stdout)}
    assert names == {path.stem for path in (ROOT / "targets").glob("*.toml")}


def test_the_installed_package_knows_what_it_was_tested_with(run: Run) -> None:
    code = "from edgeport.doctor import check_packages; import json; "
    code += "print(json.dumps([package.model_dump() for package in check_packages()]))"
    packages = {package["name"]: package for package in json.loads(run(["python", "-c", code]).stdout)}
    assert packages["torch"]["required"] == "==2.13.0"
    assert packages["executorch"]["group"] == "executorch"
    assert {package["state"] for package in packages.values()} == {"ok"}
    assert not {"ruff", "mypy"} & set(packages)


def test_optimum_cli_lists_edgeport_and_hands_everything_over(run: Run) -> None:
    optimum = ["python", "-m", "optimum.commands.optimum_cli"]
    assert "edgeport" in run([*optimum, "--help"]).stdout
    done = run([*optimum, "edgeport", "targets", "--json"])
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads(run(["edgeport", "targets", "--json"]).stdout)
    assert run([*optimum, "edgeport", "export", "--help"]).stdout == run(["edgeport", "export", "--help"]).stdout
    refused = run([*optimum, "edgeport", "targets", "show", "nowhere"])
    assert refused.returncode == EXIT_BAD_INPUT
    assert "There is no target 'nowhere'" in refused.stderr


def test_optimum_cli_plans_an_export(run: Run, tiny_model: Callable[[str], Path]) -> None:
    command = ["python", "-m", "optimum.commands.optimum_cli", "edgeport", "export", str(tiny_model("bert"))]
    done = run([*command, "--target", "linux-x86_64-ort", "--output", "bundle", "--dry-run", "--json"])
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["target"] == "linux-x86_64-ort"
    assert plan["predicted_bytes"] > 0
