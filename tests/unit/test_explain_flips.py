"""Flips, slices and certainty of claims, against counts by hand and by simulation."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from edgeport.data.audio import Recording
from edgeport.explain.claims import make_claims
from edgeport.explain.errors import Sums, aligned
from edgeport.explain.flips import MOST_FLIPS, suite_flips
from edgeport.explain.inputs import MOST_SHOWN, Asked, _asked, asked, script_of
from edgeport.explain.slices import measure_slices, slice_samples
from edgeport.validate.evidence import Check, DataRecord, Interval, Verdict
from edgeport.validate.paired import compare_scores
from edgeport.validate.tasks import score_task

DATA = DataRecord(name="mine", real=True, sha256={}, slice="", licence=None, samples=60)


def a_task(before, after, **more):
    count = len(before)
    fields = {"rows": range(count), "confidence": np.linspace(0.5, 1, count), **more}
    return score_task(
        suite="mine", metric="accuracy", unit="share", original=before, artifact=after, data=DATA, **fields
    )


def inputs_of(count: int) -> list[Asked]:
    return [
        Asked(index, f"text {index}", length=index + 1, label="ab"[index % 2], script="Latin") for index in range(count)
    ]


def test_flips_are_those_that_a_count_by_hand_finds():
    generator = np.random.default_rng(0)
    before, after = generator.integers(0, 2, (2, 60)).astype(float)
    answers = [f"was {index}" for index in range(60)]
    task = a_task(before, after, answers=answers, artifact_answers=[f"is {index}" for index in range(60)])
    found = suite_flips(task, inputs_of(60), "")
    worse = [index for index in range(60) if after[index] < before[index]]
    better = [index for index in range(60) if after[index] > before[index]]
    assert (found.worse, found.better, found.n) == (len(worse), len(better), 60)
    assert sorted(flip.row for flip in found.flips if flip.worse) == worse
    assert sorted(flip.row for flip in found.flips if not flip.worse) == better
    one = found.flips[0]
    assert (one.shown, one.answer, one.other_answer) == (f"text {one.row}", f"is {one.row}", f"was {one.row}")
    for each in found.slices:
        if each.by == "class":
            members = [index for index in range(60) if "ab"[index % 2] == each.value]
            assert (each.n, each.worse) == (len(members), len(set(members) & set(worse)))
            assert each.score == pytest.approx(after[members].mean())
    assert sum(each.n for each in found.slices if each.by == "length") == 60


def test_the_other_direction_and_the_largest_change_first():
    """A loss: more is worse; what lost most stands first, and no more than a page holds is told."""
    before = np.ones(80)
    after = 1 + np.arange(80) / 10
    task = score_task(
        suite="mine",
        metric="loss",
        unit="nats",
        original=before,
        artifact=after,
        data=DATA,
        higher_is_better=False,
        rows=range(80),
    )
    found = suite_flips(task, None, "they are elsewhere")
    assert [flip.row for flip in found.flips] == [*range(79, 79 - MOST_FLIPS, -1)]
    assert (found.worse, found.left_out) == (79, 79 - MOST_FLIPS)
    assert any("they are elsewhere" in note for note in found.notes)


def test_another_bundle_takes_the_originals_place():
    task = a_task([1.0] * 12, [1.0] * 6 + [0.0] * 6)
    older = a_task([1.0] * 12, [0.0] * 6 + [1.0] * 6)
    found = suite_flips(task, inputs_of(12), "", older=older, other="old")
    assert (found.other, found.worse, found.better) == ("old", 6, 6)
    assert {flip.row for flip in found.flips if flip.worse} == {*range(6, 12)}


def test_an_interval_holds_for_all_slices_together():
    """Bonferroni by hand: an error of 5% shared among k slices, half of it on each side."""
    generator = np.random.default_rng(1)
    before = generator.random(90)
    after = before + generator.normal(0, 0.1, 90)
    members, _ = slice_samples(inputs_of(90), None)
    found = measure_slices(members, before, after, unit="score", higher_is_better=True, weights=None)
    assert len(found) == 5
    one = next(each for each in found if each.by == "class" and each.value == "b")
    rows = [*range(1, 90, 2)]
    alone = compare_scores(before[rows], after[rows], unit="score", confidence=0.975)
    together = compare_scores(before[rows], after[rows], unit="score", confidence=1 - 0.05 / 10)
    assert (one.difference.low, one.difference.high) == (alone.lower, alone.upper)
    assert (one.low, one.high) == (together.lower, together.upper)
    assert together.lower < alone.lower


def test_slices_seldom_stand_out_where_nothing_differs_and_do_where_one_does():
    """Of suites without any difference between slices at most 5% have one that stands out; a planted one is found."""
    members, _ = slice_samples(inputs_of(120), np.linspace(0.3, 1, 120))
    members = {key: rows for key, rows in members.items() if key[0] != "script"}
    generator = np.random.default_rng(2)
    alarms = 0
    for _ in range(200):
        before = generator.integers(0, 2, 120).astype(float)
        after = np.where(generator.random(120) < 0.3, 1 - before, before)
        found = measure_slices(members, before, after, unit="share", higher_is_better=True, weights=None)
        alarms += any(each.stands_out for each in found)
    # 5% of 200 and three standard errors of that.
    assert alarms <= 10 + 3 * math.sqrt(200 * 0.05 * 0.95)
    before, after = np.ones(120), np.ones(120)
    after[1:100:2] = 0
    found = measure_slices(members, before, after, unit="share", higher_is_better=True, weights=None)
    assert [each.value for each in found if each.stands_out and each.by == "class"] == ["a", "b"]


def test_rare_classes_are_taken_together_and_what_was_not_sliced_is_said():
    labels = ["x"] * 20 + ["y"] * 15 + ["p", "q", "r"]
    inputs = [Asked(index, "text", length=5, label=label, script="Latin") for index, label in enumerate(labels)]
    members, notes = slice_samples(inputs, None)
    assert {value: len(rows) for (by, value), rows in members.items() if by == "class"} == {
        "x": 20,
        "y": 15,
        "3 rarer classes": 3,
    }
    assert any(note.startswith("length") for note in notes)
    assert any(note.startswith("confidence: the evidence has none") for note in notes)
    assert any("Latin" in note for note in notes)


def test_of_a_picture_and_of_a_recording_the_files_are_shown(tmp_path):
    seen = _asked(3, {"path": tmp_path / "cat" / "1.png", "label": 7}, None)
    assert (seen.row, seen.text, seen.label, seen.length) == (3, "cat/1.png", "7", None)
    heard = _asked(0, {"audio": Recording((tmp_path / "a" / "b.wav",)), "text": "hello"}, len)
    assert (heard.text, heard.label) == ("a/b.wav", "hello")


def test_what_is_shown_of_an_input():
    assert Asked(0, "a" * (MOST_SHOWN + 1)).shown == ("a" * MOST_SHOWN + "…", True)
    assert Asked(0, "short").shown == ("short", False)
    assert Asked(0, "which?", choices=("this", "that")).answer("1") == "that"
    assert script_of("Привет, world и мир") == "Cyrillic"
    assert script_of("42!") is None


def test_the_rows_of_a_suite_are_found_again_or_it_is_said_why(tmp_path):
    rows = [
        {"text": f"number {index}", "label": str(index % 2), "language": ("de", "en")[index % 4 == 0]}
        for index in range(20)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "mine.toml"
    path.write_text(
        'name = "mine"\ntitle = "mine"\nkind = "text_classification"\ndata = "rows.jsonl"\n'
        "[evaluation]\nstart = 0\nstop = 20\n"
    )
    from edgeport.validate.suites.definition import load_suite
    from edgeport.validate.suites.rows import load_rows

    suite, folder = load_suite(str(path))
    loaded = load_rows(suite, folder, quick=False)
    task = a_task([1.0] * 20, [0.0] * 20).model_copy(update={"data": loaded.record})
    found, why = asked(task, [str(path)], len)
    assert why == ""
    assert [item.text for item in found] == [row["text"] for row in loaded.evaluation]
    assert [item.label for item in found] == [row["label"] for row in loaded.evaluation]
    members, _ = slice_samples(found, None)
    assert {value: len(rows) for (by, value), rows in members.items() if by == "language"} == {"de": 15, "en": 5}
    (tmp_path / "rows.jsonl").write_text(json.dumps(rows[0]) + "\n")
    assert asked(task, [str(path)], len) == (None, "the suite's rows are not those that were measured on")
    assert "can't be read here" in asked(task, [], len)[1]


class Evidence:
    """As much of the evidence as claims are made of."""

    parity = tasks = ()
    latency = memory = None

    def __init__(self, *checks):
        self.verdict = Verdict(passed=True, exit_code=0, checks=checks)
        self.size = type("Size", (), {"bytes": 2_000_000})()


def a_check(measured, low, high, allowed, n=64, **more):
    fields = {"passed": True, "exit_code": 10, "message": "", "advice": ""}
    return Check(
        metric="cosine_min",
        output="y",
        measured=measured,
        low=low,
        high=high,
        n=n,
        allowed=allowed,
        **{**fields, **more},
    )


def test_how_many_samples_would_decide():
    """n (h / d)^2: a half width of 0.02 at a distance of 0.01 over 64 samples takes 4 times as many."""
    decided, open_, exact, absent = make_claims(
        Evidence(
            a_check(0.95, 0.93, 0.97, 0.9),
            a_check(0.95, 0.93, 0.97, 0.94),
            a_check(1.0, None, None, 1.0).model_copy(update={"metric": "finite"}),
            a_check(None, None, None, 0.9),
        )
    )[:4]
    assert (decided.state, decided.needed) == ("decided", None)
    assert decided.decided_by == pytest.approx(0.05 / 0.02)
    assert decided.half_width == pytest.approx(0.02)
    assert (open_.state, open_.needed) == ("undecided", 256)
    assert (exact.state, absent.state) == ("exact", "not measured")


def test_the_gates_own_number_of_samples_is_taken():
    check = a_check(0.02, 0.005, 0.035, 0.03, undecided=True, needed=777)
    assert make_claims(Evidence(check))[0].needed == 777


def test_a_number_without_a_budget_is_told_too():
    evidence = Evidence()
    interval = Interval(mean=0.9, low=0.85, high=0.95, n=50)
    evidence.tasks = (a_task([1.0] * 30 + [0.0] * 10, [1.0] * 25 + [0.0] * 15),)
    evidence.parity = (type("P", (), {"output": "y", "cosine": interval, "top1_agreement": None, "kl": None})(),)
    claims = {claim.metric: claim for claim in make_claims(evidence)}
    assert claims["cosine"].state == "no budget"
    assert "200 samples" in claims["cosine"].words
    # A drop of 5 in 40, told as a drop: its interval is the difference's, turned.
    difference = evidence.tasks[0].difference
    assert claims["accuracy_drop"].value == pytest.approx(5 / 40)
    assert (claims["accuracy_drop"].low, claims["accuracy_drop"].high) == (-difference.high, -difference.low)
    assert (claims["size"].value, claims["size"].state) == (2.0, "exact")


def test_sums_are_the_errors_of_everything_at_once():
    generator = np.random.default_rng(3)
    reference = generator.normal(size=(3, 4, 8)).astype(np.float32)
    found = reference + generator.normal(0, 0.1, reference.shape).astype(np.float32)
    sums = Sums()
    for a, b in zip(found, reference, strict=True):
        sums.add(a, b)
    ratio = np.linalg.norm(found - reference) / np.linalg.norm(reference)
    assert sums.relative == pytest.approx(ratio, rel=1e-5)
    assert sums.snr_db == pytest.approx(-20 * np.log10(ratio), rel=1e-5)
    cosine = (found * reference).sum() / np.linalg.norm(found) / np.linalg.norm(reference)
    assert sums.cosine == pytest.approx(cosine, rel=1e-5)
    each = [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(found, reference, strict=True)]
    assert sums.worst == pytest.approx(max(each), rel=1e-5)


def test_rows_are_brought_together():
    reference = np.arange(24, dtype=np.float32).reshape(1, 6, 4)
    mask = np.array([[1, 1, 1, 1, 0, 0]])
    a, b = aligned(reference.reshape(6, 4), reference, mask)
    assert np.array_equal(a, reference[0, :4])
    assert np.array_equal(a, b)
    last, same = aligned(reference[:, -1:], reference, None)
    assert np.array_equal(last, reference[0, -1:])
    assert np.array_equal(last, same)
    assert aligned(np.zeros((2, 5), np.float32), reference, None) is None
