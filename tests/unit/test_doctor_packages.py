"""What the doctor says of the installed packages."""

from __future__ import annotations

import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from edgeport.doctor import check_packages, find_conflicts

ROOT = Path(__file__).resolve().parents[2]


def _plant(folder: Path, name: str, version: str, *requires: str) -> None:
    """An installed package that consists of its metadata."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir()
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    (info / "METADATA").write_text("\n".join([*lines, *(f"Requires-Dist: {line}" for line in requires)]) + "\n")


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_every_declared_package_is_compared_with_what_is_installed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = [Requirement(line) for line in project["dependencies"]]
    states = {state.name: state for state in check_packages()}
    assert {requirement.name for requirement in declared} <= set(states)
    assert {"executorch", "torchao", "coremltools"} <= set(states)
    for requirement in declared:
        assert states[requirement.name].installed == metadata.version(requirement.name)
        assert states[requirement.name].state == "ok"


def test_another_version_than_the_tested_one_is_found(planted: Path) -> None:
    _plant(planted, "onnxscript", "0.0.1")
    (state,) = [state for state in check_packages() if state.name == "onnxscript"]
    assert (state.installed, state.state) == ("0.0.1", "wrong version")


def test_this_environment_has_no_conflicts() -> None:
    assert find_conflicts() == ()


def test_a_package_that_wants_another_version_of_ours_is_a_conflict(planted: Path) -> None:
    _plant(planted, "planted-package", "1.0", "numpy<1", "torch", 'torch==1.0; extra == "old"')
    installed = metadata.version("numpy")
    assert find_conflicts() == (f"planted-package 1.0 needs numpy<1, but {installed} is installed",)


def test_a_dependency_that_is_missing_is_a_conflict(planted: Path) -> None:
    _plant(planted, "gguf", metadata.version("gguf"), "surely-not-installed>=2")
    (conflict,) = find_conflicts()
    assert conflict.endswith("needs surely-not-installed>=2, which is not installed")


def test_packages_that_have_nothing_to_do_with_ours_are_left_alone(planted: Path) -> None:
    _plant(planted, "planted-package", "1.0", "surely-not-installed>=2")
    assert find_conflicts() == ()
