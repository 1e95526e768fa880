"""What is printed where: progress, the libraries' chatter, the summary."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from edgeport.cli.progress import watch
from edgeport.cli.summary import NOT_MEASURED, evidence_rows, in_bytes

CHATTY = """
import logging, os, sys, warnings
from edgeport.cli.console import answer, working

with working(verbose={verbose}) as watcher:
    watcher.stage("load", "a model")
    print("python to stdout")
    print("python to stderr", file=sys.stderr)
    os.write(1, b"C to stdout\\n")
    os.write(2, b"C to stderr\\n")
    warnings.warn("a library's warning")
    logging.getLogger("edgeport.packages").warning("a cached file is damaged")
    {more}
answer({{"a": 1}}, True, lambda console: None)
"""


def _chatty(verbose: bool, more: str = "pass") -> subprocess.CompletedProcess[str]:
    code = CHATTY.format(verbose=verbose, more=more)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_library_chatter_reaches_neither_stream() -> None:
    run = _chatty(verbose=False)
    assert json.loads(run.stdout) == {"a": 1}
    lines = [re.sub(r"^\[ *[0-9.]+ s\] ", "", line) for line in run.stderr.splitlines()]
    assert lines == ["Load the model: a model", "a cached file is damaged"]


def test_verbose_sends_all_chatter_to_stderr() -> None:
    run = _chatty(verbose=True)
    assert json.loads(run.stdout) == {"a": 1}
    for text in ("python to stdout", "python to stderr", "C to stdout", "C to stderr", "a library's warning"):
        assert text in run.stderr


def test_an_unexpected_error_says_where_the_chatter_is_kept() -> None:
    run = _chatty(verbose=False, more="raise RuntimeError('planted')")
    assert run.returncode == 1
    kept = re.search(r"What the libraries printed: (\S+)", run.stderr)
    assert kept is not None
    log = Path(kept[1])
    text = log.read_text()
    log.unlink()
    assert "C to stdout" in text
    assert "python to stderr" in text


class Clock:
    """Seconds, set by hand."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_log_gets_one_line_a_stage_and_one_every_ten_seconds() -> None:
    stream, clock = io.StringIO(), Clock()
    with watch(stream, clock) as watcher:
        watcher.stage("load", "zoo:minilm")
        clock.now = 4.0
        watcher.update(1, 10)
        clock.now = 11.0
        watcher.update(2, 10, "weights")
        clock.now = 12.0
        watcher.update(3, 10)
        watcher.message("a cache entry was damaged")
        watcher.stage("own stage")
    assert stream.getvalue().splitlines() == [
        "[   0.0 s] Load the model: zoo:minilm",
        "[  11.0 s]   2/10 weights",
        "[  12.0 s] a cache entry was damaged",
        "[  12.0 s] own stage",
    ]


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "140")
    stream = Terminal()
    with watch(stream, Clock()) as watcher:
        watcher.stage("load", "[not markup]")
        watcher.stage("compress")
        watcher.update(3, 4)
        watcher.message("kept [also not markup]")
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue())
    assert "[not markup]" in text
    assert "kept [also not markup]" in text
    last = text[text.rindex("Load the model") :]
    assert "1/1" in last
    assert "4/4" in last


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (23_400_000, "23.4 MB"), (118_000_000, "118 MB"), (1_500_000_000, "1.5 GB")],
)
def test_sizes_for_people(count: int, text: str) -> None:
    assert in_bytes(count) == text


def _evidence(**changes: Any) -> dict[str, Any]:
    interval = {"mean": 0.99321, "low": 0.992, "high": 0.994, "n": 64}
    parity = {"output": "logits", "finite": True, "cosine": interval, "cosine_worst": 0.98}
    return {
        "size": {"bytes": 23_400_000, "baseline_bytes": 90_000_000, "ratio": 0.26},
        "parity": [{**parity, "top1_agreement": interval, "kl": interval}],
        "weights": {"checked": 3, "equal": 2, "different": ["a: codes"]},
        "latency": None,
        "latency_absent": "not this runtime's kernels",
        "memory": None,
        "states": {"lowered": "yes", "executed_here": "none", "numerics_verified": "no", "statement": "Converted."},
        "data": {"samples": 64, "name": "synthetic", "real": False},
        **changes,
    }


def test_the_summary_says_what_was_measured_and_what_was_not() -> None:
    rows = dict(evidence_rows(_evidence()))
    assert rows["size"] == "23.4 MB, 0.260x of fp32 (90 MB)"
    assert rows["logits: cosine"] == "0.9932 [0.9920, 0.9940], n=64, worst 0.9800"
    assert rows["logits: top-1 agreement"].startswith("0.993 ")
    assert rows["quantized weights"].startswith("2 of 3 ")
    assert rows["latency"] == "not this runtime's kernels"
    assert rows["peak memory"] == NOT_MEASURED
    assert rows["compared on"] == "64 samples of synthetic (not real data)"
    assert [rows[name] for name in ("lowered", "executed here", "numerics verified")] == ["yes", "none", "no"]


def test_the_summary_flags_an_invalid_latency_and_values_that_are_not_finite() -> None:
    latency = {"ratio": {"mean": 0.43}, "p50_ms": 17.1, "p90_ms": 20.0, "threads": 1}
    latency |= {"valid": False, "note": "too short", "cpu_ratio": {"mean": 0.41}}
    parity = [{"output": "y", "finite": False, "cosine": None, "cosine_worst": None}]
    size = {"bytes": 1000, "baseline_bytes": None, "ratio": None}
    rows = dict(evidence_rows(_evidence(latency=latency, parity=parity, size=size)))
    said = "0.43x of fp32, p50 17.1 ms, p90 20.0 ms, 1 thread; processor time 0.41x; not valid: too short"
    assert rows["latency"] == said
    alone = _evidence(latency={**latency, "ratio": None, "cpu_ratio": None, "valid": True})
    assert dict(evidence_rows(alone))["latency"] == "p50 17.1 ms, p90 20.0 ms, 1 thread"
    assert rows["y: finite"].startswith("NO")
    assert rows["y: cosine"] == NOT_MEASURED
    assert rows["size"] == "1 kB"


def test_the_summary_has_suites_delegates_and_work() -> None:
    share = {"mean": 0.8, "low": 0.75, "high": 0.85, "n": 200}
    task = {"suite": "intents", "metric": "accuracy", "artifact": share, "original": {**share, "mean": 0.81}}
    task |= {"n": 200, "worse": 4, "better": 2}
    task |= {"difference": {"mean": -0.01, "low": -0.03, "high": 0.01, "n": 200}, "baseline_problem": None}
    work = {"input_shapes": {"x": [1, 2]}, "flops": 20_000_000, "weight_bytes": 900_000, "activation_bytes": 100_000}
    delegation = {"delegate": "xnnpack", "delegates": 3, "kernels": ["a", "b"]}
    rows = dict(evidence_rows(_evidence(tasks=[task], delegation=delegation, work=work)))
    said = "0.8000 [0.7500, 0.8500], n=200; original 0.8100, difference -0.0100 [-0.0300, +0.0100]"
    said += "; of 200 4 are worse, 2 better"
    assert rows["intents: accuracy"] == said
    assert rows["delegated to xnnpack"].startswith("3 parts of the file; 2 kinds of kernels")
    assert rows["one inference"] == "0.02 Gflop, 1 MB moved"
    broken = {**task, "difference": None, "artifact": None, "baseline_problem": "at chance"}
    assert dict(evidence_rows(_evidence(tasks=[broken])))["intents: accuracy"].endswith("; at chance")
