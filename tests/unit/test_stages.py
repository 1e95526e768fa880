"""The stage store: whole entries or none, damage noticed."""

from pathlib import Path

import pytest

from edgeport.stages import is_stored, run_stage, stage_key
from edgeport.storage import new_folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("EDGEPORT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_stage_runs_once_for_the_same_inputs():
    calls = []

    def make(out: Path) -> None:
        calls.append(out)
        (out / "a.txt").write_text("hello")

    key = stage_key("lower", {"model": "x"})
    first = run_stage("lower", key, make)
    second = run_stage("lower", key, make)
    assert len(calls) == 1
    assert first == second
    assert (second / "a.txt").read_text() == "hello"
    assert stage_key("lower", {"model": "y"}) != key


def test_a_failing_stage_leaves_nothing(cache):
    def make(out: Path) -> None:
        (out / "half.txt").write_text("half")
        raise RuntimeError("killed")

    key = stage_key("lower", {})
    with pytest.raises(RuntimeError, match="killed"):
        run_stage("lower", key, make)
    assert not is_stored("lower", key)
    assert not list(cache.rglob("half.txt"))


@pytest.mark.parametrize("damage", ["change", "remove", "extra", "record"])
def test_a_damaged_entry_is_reported_and_made_again(damage):
    calls = []

    def make(out: Path) -> None:
        calls.append(1)
        (out / "a.txt").write_text("hello")

    key = stage_key("lower", {})
    folder = run_stage("lower", key, make)
    if damage == "change":
        (folder / "a.txt").write_text("hellp")
    elif damage == "remove":
        (folder / "a.txt").unlink()
    elif damage == "extra":
        (folder / "b.txt").write_text("")
    else:
        (folder.parent / "stage.json").write_text("{")
    messages: list[str] = []
    again = run_stage("lower", key, make, report=messages.append)
    assert len(calls) == 2
    assert len(messages) == 1
    assert "damaged" in messages[0]
    assert (again / "a.txt").read_text() == "hello"


def test_what_a_killed_run_left_is_removed(tmp_path):
    abandoned = tmp_path / ".out.999999999.abc.tmp"
    abandoned.mkdir()
    (abandoned / "x").write_text("")
    with new_folder(tmp_path / "out") as folder:
        (folder / "y").write_text("")
    assert not abandoned.exists()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
