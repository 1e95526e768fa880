"""The stage store: whole entries or none, damage noticed."""

from pathlib import Path

import pytest

from edgeport.errors import BadInputError
from edgeport.stages import is_stored, run_stage, stage_key
from edgeport.storage import clean_up_after_killed_runs, new_folder


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
    abandoned = tmp_path / ".out.abc.new.edgeport"
    abandoned.mkdir()
    (abandoned / "x").write_text("")
    foreign = tmp_path / ".out.abc.tmp"
    foreign.mkdir()
    with new_folder(tmp_path / "out") as folder:
        (folder / "y").write_text("")
        with new_folder(tmp_path / "other"):
            assert folder.exists(), "a folder that somebody works in was removed"
    assert not abandoned.exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out.abc.tmp", "other", "out"]


def test_a_folder_moved_away_by_a_killed_run_comes_back(tmp_path):
    (tmp_path / ".out.abc.old.edgeport").mkdir()
    (tmp_path / ".out.abc.old.edgeport" / "x").write_text("kept")
    clean_up_after_killed_runs(tmp_path / "out")
    assert (tmp_path / "out" / "x").read_text() == "kept"


def test_an_existing_folder_is_replaced_only_when_the_new_one_is_whole(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").write_text("old")
    with pytest.raises(RuntimeError), new_folder(tmp_path / "out", replace=True):
        raise RuntimeError
    assert (tmp_path / "out" / "x").read_text() == "old"
    with pytest.raises(BadInputError), new_folder(tmp_path / "out"):
        pass
    with new_folder(tmp_path / "out", replace=True) as folder:
        (folder / "x").write_text("new")
    assert (tmp_path / "out" / "x").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
