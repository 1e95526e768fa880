"""The doctor really lowers and runs a model with each runtime, and notices one that is broken."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgeport.cli.main import main
from edgeport.doctor import _probe_apart as probe_apart
from edgeport.doctor import check_packages, probe
from edgeport.errors import EXIT_BAD_INPUT


def test_every_runtime_works_here(capfd: pytest.CaptureFixture[str]) -> None:
    code = main(["doctor", "--json"])
    captured = capfd.readouterr()
    document = json.loads(captured.out)
    assert document["problems"] == []
    assert code == document["exit_code"] == 0
    able = {state["runtime"]: (state["lower"], state["execute"]) for state in document["runtimes"]}
    assert able == {"onnxruntime": ("yes", "yes"), "executorch": ("yes", "yes"), "coreml": ("yes", "reference")}
    assert document["free_disk_bytes"] > 0
    assert document["available_memory_bytes"] > 0
    for runtime in able:
        assert runtime in captured.err


def test_a_broken_runtime_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "onnxruntime.py").write_text("raise ImportError('a planted fault')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    state = probe_apart("onnxruntime", check_packages())
    assert state.installed
    assert state.execute == "no"
    assert "a planted fault" in state.detail


def test_a_crash_is_told_with_its_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "torch.py").write_text("import os; os.abort()\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert main(["doctor"]) == EXIT_BAD_INPUT
    out = capfd.readouterr().out
    assert "onnxruntime does not work: the process ended with code -6" in out


def test_wrong_numbers_are_no_working_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    from edgeport.runtime import onnxruntime

    right = onnxruntime.OnnxRuntimeSession.run

    def wrong(self, inputs):
        return {name: value + 0.1 for name, value in right(self, inputs).items()}

    monkeypatch.setattr(onnxruntime.OnnxRuntimeSession, "run", wrong)
    state = probe("onnxruntime")
    assert (state.lower, state.execute) == ("yes", "no")
    assert "differs from torch by 0.1" in state.detail
