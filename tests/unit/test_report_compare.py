"""Several bundles beside each other: what dominates what, what is paired, and what is refused."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest  # type: ignore[import-untyped]

from edgeport.errors import BadInputError
from edgeport.report.compare import compare, unique_labels
from edgeport.report.comparison import Candidate
from edgeport.report.deltas import deltas
from edgeport.report.markdown import comparison_markdown, plain, report_markdown
from edgeport.validate.evidence import (
    DataRecord,
    Evidence,
    Interval,
    Latency,
    Machine,
    Memory,
    OutputParity,
    Size,
    States,
    TaskScore,
    Verdict,
)
from edgeport.validate.tasks import score_task

HERE = Machine(platform="Linux", cpu="a cpu", cores=2, memory_gb=8, python="3.11", versions={})
DATA = DataRecord(name="d", real=True, sha256={"f": "0"}, slice="all", licence=None, samples=200)


def manifest(files: str = "0", name: str = "tiny") -> dict[str, Any]:
    return {
        "name": name,
        "task": "text-classification",
        "source": {"files": {"model.safetensors": files}, "reference": "zoo:tiny"},
        "target": {"name": "a-target"},
        "recipe": {"name": "int8"},
        "runtime": "onnxruntime",
        "parameters": 1000,
        "toolchain": {"torch": "2.13.0"},
        "files": {"model/model.onnx": {"sha256": "abc", "bytes": 1}},
    }


@functools.cache
def suite(wrong: int, name: str = "intents", slice_: str = "all") -> TaskScore:
    """Of 200 samples that the original has right but for 20, the first `wrong` are wrong."""
    original = [1.0] * 180 + [0.0] * 20
    artifact = [0.0] * wrong + original[wrong:]
    data = DATA.model_copy(update={"slice": slice_})
    return score_task(
        suite=name, metric="accuracy", unit="share", chance=0.1, original=original, artifact=artifact, data=data
    )


def latency(p50: float, **changes: Any) -> Latency:
    return Latency(
        threads=1,
        queries=1024,
        warmup=10,
        p50_ms=p50,
        p90_ms=1.1 * p50,
        cpu_ms=p50,
        baseline_p50_ms=20,
        baseline_p90_ms=22,
        ratio=Interval(mean=p50 / 20, low=p50 / 20 * 0.99, high=p50 / 20 * 1.01, n=1024),
        input_shapes={"x": (1, 8)},
        **{"valid": True, "note": "", **changes},
    )


def evidence(size: int = 1000, wrong: int | None = 0, p50: float | None = 10.0, **changes: Any) -> Evidence:
    cosine = Interval(mean=0.99, low=0.98, high=0.995, n=200)
    whole = Evidence(
        measured_at="2026-01-02T03:04:05Z",
        machine=HERE,
        states=States(lowered="yes", executed_here="runtime", numerics_verified="yes", statement="Run here."),
        data=DATA,
        parity=(OutputParity(output="y", max_abs=0.1, relative_l2=0.1, cosine=cosine, cosine_worst=0.9, finite=True),),
        weights=None,
        size=Size(bytes=size, baseline_bytes=4000, ratio=size / 4000),
        latency=None if p50 is None else latency(p50),
        memory=Memory(peak_rss_mb=size / 10, runtime_rss_mb=1, baseline_peak_rss_mb=500, load_ms=1, first_run_ms=1),
        tasks=() if wrong is None else (suite(wrong),),
        verdict=Verdict(passed=True, exit_code=0, checks=()),
    )
    return whole.model_copy(update=changes)


def candidates(*found: Evidence, **manifests: dict[str, Any]) -> list[Candidate]:
    return [Candidate(f"b{index}", manifests.get(f"b{index}", manifest()), each) for index, each in enumerate(found)]


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 3), st.integers(1, 3)), min_size=2, max_size=6))
def test_dominated_is_what_another_beats_in_every_axis(points: list[tuple[int, int, int]]) -> None:
    found = compare(candidates(*(evidence(1000 * size, 10 * wrong, 5.0 * p50) for size, wrong, p50 in points)))
    assert found.axes == ("size", "quality", "latency")
    for row, mine in zip(found.rows, points, strict=True):
        # All costs, less is better: bytes, wrong answers, milliseconds.
        beaten = [other for other in points if other != mine and all(o <= m for o, m in zip(other, mine, strict=True))]
        assert (row.dominated_by is not None) == bool(beaten)
        if row.dominated_by is not None:
            assert points[int(row.dominated_by[1:])] in beaten
            assert next(each for each in found.rows if each.label == row.dominated_by).dominated_by is None


def test_pairs_on_the_same_samples_with_an_exact_test() -> None:
    found = compare(candidates(evidence(wrong=0), evidence(wrong=30), evidence(wrong=33)))
    assert [(pair.first, pair.second, pair.worse, pair.better) for pair in found.pairs] == [
        ("b0", "b1", 30, 0),
        ("b0", "b2", 33, 0),
        ("b1", "b2", 3, 0),
    ]
    first, _, last = found.pairs
    assert first.change == pytest.approx(-30 / 200)
    assert first.mcnemar_p == pytest.approx(binomtest(30, 30, 0.5).pvalue)
    assert (first.answer, last.answer) == ("worse", "no difference shown")
    assert first.low < first.change < first.high < 0
    # Three pairs together: each interval is wider than that of a single pair.
    alone = compare(candidates(evidence(wrong=0), evidence(wrong=30))).pairs[0]
    assert alone.high - alone.low < first.high - first.low


def test_an_error_rate_is_told_in_its_own_direction() -> None:
    def lost(share: float) -> TaskScore:
        losses = [1.0 + share * (1 + index % 3) for index in range(60)]
        return score_task(
            suite="text", metric="loss", unit="nats", higher_is_better=False, original=[1.0] * 60, artifact=losses,
            data=DATA,
        )  # fmt: skip

    found = compare(candidates(evidence(900, tasks=(lost(0.2),)), evidence(1000, tasks=(lost(0.1),))))
    (pair,) = found.pairs
    assert pair.change == pytest.approx(-0.2)
    assert pair.answer == "better"
    assert pair.low < pair.high < 0
    assert [row.dominated_by for row in found.rows] == [None, None]


def test_different_models_are_refused_unless_asked_for() -> None:
    two = candidates(evidence(), evidence(), b1=manifest("1", "other"))
    with pytest.raises(BadInputError, match="different models: b1"):
        compare(two)
    found = compare(two, different_models=True)
    assert (found.axes, found.pairs) == ((), ())
    assert found.notes[0].startswith("Different models: b1")
    with pytest.raises(BadInputError, match="One bundle"):
        compare(two[:1])


def test_what_can_not_be_compared_is_marked_and_left_out_of_the_front() -> None:
    elsewhere = HERE.model_copy(update={"cpu": "another"})
    found = compare(
        candidates(
            evidence(1000, 0),
            evidence(900, 4),
            evidence(800, tasks=(suite(0, slice_="other rows"),), machine=elsewhere),
            evidence(700, 2, latency=latency(1.0, valid=False, note="it drifted")),
        ),
        by="intents",
    )
    assert found.axes == ("size", "quality")
    assert [row.why_quality for row in found.rows] == [None, None, "the samples are not the same", None]
    assert [row.why_times for row in found.rows] == [
        None, None, "measured on another machine", "not valid: it drifted"
    ]  # fmt: skip
    assert [row.why_memory for row in found.rows] == [None, None, "measured on another machine", None]
    assert [row.dominated_by for row in found.rows] == [None, "b3", None, None]
    assert {(pair.first, pair.second) for pair in found.pairs} == {("b0", "b1"), ("b0", "b3"), ("b1", "b3")}
    text = comparison_markdown(found)
    assert "b2: times are not comparable (measured on another machine)" in text
    assert "On the front of size, quality: b0, b3." in text


def test_quality_is_a_suite_that_all_have_else_agreement_with_the_original() -> None:
    both = compare(candidates(evidence(), evidence()))
    assert both.measure is not None
    assert (both.measure.name, both.measure.baseline) == ("intents", 0.9)
    one = compare(candidates(evidence(), evidence(wrong=None)))
    assert one.measure is not None
    assert one.measure.name == "cosine"
    asked = compare(candidates(evidence(), evidence(wrong=None)), by="intents")
    assert [row.why_quality for row in asked.rows] == [None, "not measured"]
    assert asked.axes == ()
    with pytest.raises(BadInputError, match="measured by 'spelling'"):
        compare(candidates(evidence(), evidence()), by="spelling")


def test_a_baseline_that_solves_nothing_is_no_measure_of_quality() -> None:
    broken = suite(0).model_copy(update={"baseline_problem": "not better than chance"})
    found = compare(candidates(evidence(tasks=(broken,)), evidence(tasks=(broken,))))
    assert found.measure is not None
    assert found.measure.name == "cosine"


def test_labels_are_as_short_as_can_be() -> None:
    assert unique_labels([("out", "int8"), ("out", "int4")]) == ["int8", "int4"]
    assert unique_labels([("out", "a", "b"), ("out", "c", "b")]) == ["a/b", "c/b"]
    with pytest.raises(BadInputError, match="named twice"):
        unique_labels([("out", "a"), ("out", "a")])


def test_deltas_say_what_is_shown_and_what_is_not() -> None:
    old = evidence(1000, 0, 10.0)
    new = evidence(800, 30, 12.0)
    found = {delta.what: delta for delta in deltas(new, old)}
    assert (found["size"].change, found["size"].direction) == ("−20.0 %", "better")
    worse = found["intents: accuracy"]
    assert worse.change.startswith("−15.0 points [")
    assert (worse.before, worse.after, worse.direction) == ("90.0 %", "75.0 %", "worse")
    assert (found["latency, p50"].change, found["latency, p50"].direction) == ("+20.0 %", "not shown")
    ratio = found["latency over the fp32 file's"]
    # Two independent relative errors of 1% make one of sqrt(2)%.
    assert ratio.change.startswith("+20.0 % [")
    assert ratio.direction == "worse"
    assert f"+{100 * (1.2 * math.exp(math.hypot(math.log(1.01), math.log(0.99))) - 1):.1f} %" in ratio.change
    assert found["peak memory"].change == "−20.0 %"
    assert found["cosine to the original, y"].direction == "same"


@pytest.mark.parametrize(("by", "change", "direction"), [(1e-12, "+0", "same"), (1e-3, "−0.001", "worse")])
def test_a_change_in_the_last_bits_is_none(by: float, change: str, direction: str) -> None:
    old = evidence(1000, 0, 10.0)
    (parity,) = old.parity
    assert parity.cosine is not None
    cosine = parity.cosine.model_copy(update={"mean": parity.cosine.mean - by})
    new = old.model_copy(update={"parity": (parity.model_copy(update={"cosine": cosine}),)})
    (found,) = (delta for delta in deltas(new, old) if delta.what == "cosine to the original, y")
    assert (found.change, found.direction) == (change, direction)


def test_deltas_of_what_differs_anyway_are_not_told() -> None:
    elsewhere = HERE.model_copy(update={"memory_gb": 16.0})
    other = DATA.model_copy(update={"slice": "other"})
    old = evidence(1000, tasks=(suite(0, slice_="x"), suite(0, "gone")), machine=elsewhere, data=other)
    found = {delta.what: delta for delta in deltas(evidence(800), old)}
    assert {
        delta.direction for what, delta in found.items() if what not in ("size", "latency over the fp32 file's")
    } == {"unknown"}
    assert found["intents: accuracy"].note == "the samples are not the same"
    assert found["gone: accuracy"].note == "run on one of the two only"
    assert found["latency, p90"].note == "measured on another machine"
    assert found["cosine to the original, y"].note == "compared on other inputs"


def test_an_invalid_run_is_no_change_of_latency() -> None:
    noisy = evidence(latency=latency(10.0, valid=False, note="it drifted"))
    for new, old, whose in ((noisy, evidence(), "this"), (evidence(), noisy, "the older")):
        found = [delta for delta in deltas(new, old) if delta.what.startswith("latency")]
        assert len(found) == 3
        assert {(delta.direction, delta.note) for delta in found} == {("unknown", f"{whose} bundle's run is not valid")}


EVIL = "</script><img src=x onerror=alert(1)>|`[x](y) @someone\n# h"


def test_markdown_shows_untrusted_text_as_text() -> None:
    value = evidence(tasks=(suite(3, EVIL),), measured_at=EVIL)
    text = report_markdown(EVIL, {**manifest(), "name": EVIL}, value, changes=deltas(value, evidence()), against=EVIL)
    allowed = ("<details>", "<summary>", "</summary>", "</details>")
    bare = text
    for tag in allowed:
        bare = bare.replace(tag, "")
    assert "<" not in bare
    assert "\n# h" not in text
    # As many unescaped bars in each row of a table as in its head: nothing makes another cell.
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert all(line.endswith("|") for line in rows)
    assert plain(EVIL) in text
    assert "\\@someone" in text


def test_markdown_has_the_verdict_the_figures_and_the_changes() -> None:
    value = evidence(800, 30)
    text = report_markdown("out/new", manifest(), value, changes=deltas(value, evidence()), against="old")
    assert text.startswith("## ✅ tiny, int8, a-target: all checks passed\n")
    assert "| size | 1.00 kB | 800 B | −20.0 % | better |" in text
    assert "| intents: accuracy | 200 | 90.0 % | 75.0 % | −15.0 points" in text
    assert "30 worse, 0 better" in text
