"""The gate on suites and against an older bundle: each verdict from scores, and what can't be compared."""

import numpy as np
import pytest

from edgeport.budgets import Budgets
from edgeport.errors import BadInputError
from edgeport.gate import judge
from edgeport.validate.evidence import (
    DataRecord,
    Interval,
    Latency,
    Machine,
    Measurements,
    Memory,
    OutputParity,
    Size,
    States,
    WeightCheck,
)
from edgeport.validate.tasks import score_task

DATA = DataRecord(name="d", real=True, sha256={"f": "0"}, slice="all", licence=None, samples=1000)


def interval(mean, width=0.0):
    return Interval(mean=mean, low=mean - width, high=mean + width, n=100)


def scores(right, worse, better, n=1000):
    """The original's and the artifact's right-or-wrong scores."""
    original = np.repeat([1.0, 0.0], [right, n - right])
    artifact = original.copy()
    artifact[:worse] = 0.0
    artifact[right : right + better] = 1.0
    return {"original": list(original), "artifact": list(artifact)}


def suite(right=900, worse=10, better=10, *, name="intents", n=1000, **changes):
    fields = {"suite": name, "metric": "accuracy", "unit": "share", "chance": 0.5, "data": DATA, **changes}
    return score_task(**{**scores(right, worse, better, n), **fields})


def latency(ratio=0.5, width=0.01, **changes):
    fields = {
        "threads": 1,
        "queries": 1024,
        "warmup": 10,
        "p50_ms": 5.0,
        "p90_ms": 6.0,
        "p90": interval(6.0, 0.2),
        "cpu_ms": 5.0,
        "baseline_p50_ms": 10.0,
        "baseline_p90_ms": 12.0,
        "ratio": interval(ratio, width),
        "cpu_ratio": interval(ratio, width),
        "valid": True,
        "note": "",
        "input_shapes": {"x": (1, 8)},
    }
    return Latency(**{**fields, **changes})


def measured(*tasks, **changes):
    parity = OutputParity(
        output="logits",
        max_abs=0.1,
        relative_l2=0.05,
        cosine=interval(0.99),
        cosine_worst=0.98,
        top1_agreement=interval(0.95),
        kl=interval(0.02),
        positions=100,
        finite=True,
    )
    fields = {
        "measured_at": "2026-01-01T00:00:00+00:00",
        "machine": Machine(platform="p", cpu="c", cores=2, memory_gb=8.0, python="3.11", versions={}),
        "states": States(lowered="yes", executed_here="runtime", numerics_verified="no", statement="s"),
        "data": DATA,
        "parity": (parity,),
        "weights": WeightCheck(checked=4, equal=4, different=()),
        "size": Size(bytes=25_000_000, baseline_bytes=100_000_000, ratio=0.25),
        "latency": latency(),
        "memory": Memory(
            peak_rss_mb=60.0,
            runtime_rss_mb=40.0,
            baseline_peak_rss_mb=100.0,
            load_ms=3.0,
            cold_load_ms=30.0,
            first_run_ms=9.0,
        ),
        "tasks": tasks,
    }
    return Measurements(**{**fields, **changes})


def one(verdict, metric):
    found = [check for check in verdict.checks if check.metric == metric]
    assert len(found) == 1, verdict.checks
    return found[0]


def budget(**fields):
    return Budgets(accuracy={"intents": fields})


@pytest.mark.parametrize(
    ("worse", "better", "outcome", "code"),
    [(10, 10, "passed", 0), (60, 10, "failed", 11), (30, 10, "undecided", 15)],
)
def test_three_answers_to_one_question(worse, better, outcome, code):
    """A margin of 2 points on 1000 samples: no change, 5 points worse, 2 points worse."""
    verdict = judge(measured(suite(worse=worse, better=better)), budget(drop_max="2 points"))
    check = one(verdict, "accuracy_drop_max")
    assert check.outcome == outcome
    assert verdict.exit_code == code
    assert check.allowed == pytest.approx(0.02)
    assert check.measured == pytest.approx((worse - better) / 1000)
    assert check.low < check.measured < check.high
    assert (check.low <= 0.02 < check.high) == (outcome == "undecided")
    assert (check.n, check.unit, check.output) == (1000, "share", "intents")


def test_too_few_samples_say_how_many_would_do():
    verdict = judge(measured(suite(90, 1, 1, n=100)), budget(drop_max="1 point"))
    check = one(verdict, "accuracy_drop_max")
    assert (check.outcome, verdict.exit_code) == ("undecided", 15)
    assert str(check.needed) in check.advice
    share = check.needed // 100
    again = judge(measured(suite(90 * share, share, share, n=100 * share)), budget(drop_max="1 point"))
    assert again.passed


@pytest.mark.parametrize("text", [10, "10", "150 points"])
def test_ten_points_on_a_metric_from_0_to_1_are_refused_with_what_would_be_right(text):
    with pytest.raises(BadInputError) as caught:
        judge(measured(suite()), budget(drop_max=text))
    assert caught.value.where == "gate.accuracy.intents.drop_max"
    if text != "150 points":
        assert '"10 points" or 0.1' in caught.value.what
    assert judge(measured(suite()), budget(drop_max="10 points")).passed


def test_a_relative_margin_is_of_the_originals_score():
    check = one(judge(measured(suite()), budget(drop_max="2% relative")), "accuracy_drop_max")
    assert check.allowed == pytest.approx(0.018)


@pytest.mark.parametrize(
    ("allowed", "outcome", "code"), [(0.85, "passed", 0), (0.95, "failed", 11), (0.9, "undecided", 15)]
)
def test_the_score_itself(allowed, outcome, code):
    verdict = judge(measured(suite()), budget(score_min=allowed))
    assert one(verdict, "accuracy_score_min").outcome == outcome
    assert verdict.exit_code == code


def test_an_error_rate_is_bounded_from_above():
    mirrored = {name: [1 - value for value in row] for name, row in scores(900, 10, 10).items()}
    task = score_task(suite="intents", metric="e", unit="share", higher_is_better=False, data=DATA, **mirrored)
    assert judge(measured(task), budget(score_min=0.15)).passed
    assert judge(measured(task), budget(score_min=0.05)).exit_code == 11


@pytest.mark.parametrize(
    ("tasks", "words"),
    [
        ((), "not measured"),
        ((suite(name="other"),), "not measured"),
        ((suite(right=510),), "not better than chance"),
        ((suite(answers=["a"] * 1000),), "same answer"),
    ],
)
def test_without_a_yardstick_nothing_passes(tasks, words):
    verdict = judge(measured(*tasks), budget(drop_max="50 points"))
    assert verdict.exit_code == 15
    assert words in one(verdict, "accuracy").message


def test_an_artifact_without_finite_scores_fails():
    broken = {"artifact": [float("nan")] * 1000}
    verdict = judge(measured(suite(**broken)), budget(drop_max="50 points", score_min=0.0))
    assert [check.metric for check in verdict.checks if not check.passed] == ["accuracy_drop_max", "accuracy_score_min"]
    assert verdict.exit_code == 11


def test_one_budget_for_every_suite():
    tasks = (suite(worse=60, name="a"), suite(name="b"), suite(worse=60, name="own"))
    budgets = Budgets(accuracy={"*": {"drop_max": "2 points"}, "own": {"drop_max": "20 points"}})
    verdict = judge(measured(*tasks), budgets)
    assert {check.output for check in verdict.checks if not check.passed} == {"a"}
    assert {check.output for check in verdict.checks if check.metric == "accuracy_drop_max"} == {"a", "b", "own"}
    assert judge(measured(), Budgets(accuracy={"*": {"drop_max": "2 points"}})).exit_code == 15


# a budget with a unit, one that passes and one that fails, its exit code, the number in the budget's unit
ABSOLUTE = [
    ("size_max", "26 MB", "24 MB", 13, 25.0),
    ("latency_p90_max", "7 ms", "5 ms", 12, 6.0),
    ("cpu_ratio_max", 0.6, 0.4, 12, 0.5),
    ("cold_load_max", "0.04 s", "20 ms", 12, 30.0),
    ("first_run_max", "10 ms", "8 ms", 12, 9.0),
    ("peak_memory_max", "0.1 GB", "50 MB", 14, 60.0),
]


@pytest.mark.parametrize(("name", "passes", "fails", "code", "number"), ABSOLUTE)
def test_budgets_with_units(name, passes, fails, code, number):
    good = judge(measured(), Budgets(**{name: passes}))
    assert good.passed
    assert one(good, name).measured == pytest.approx(number)
    bad = judge(measured(), Budgets(**{name: fails}))
    assert bad.exit_code == code
    assert not one(bad, name).passed


@pytest.mark.parametrize(
    ("name", "allowed", "changes", "words"),
    [
        ("latency_p90_max", "9 s", {"latency": None, "latency_absent": "reference"}, "reference"),
        ("latency_p90_max", "9 s", {"latency": latency(valid=False, note="too short")}, "too short"),
        ("latency_p90_max", "9 s", {"latency": latency(p90=None)}, "older"),
        ("latency_ratio_max", 9.0, {"latency": latency(ratio=1.0).model_copy(update={"ratio": None})}, "fp32"),
        ("cpu_ratio_max", 9.0, {"latency": latency(cpu_ratio=None)}, "too few"),
        ("cold_load_max", "9 s", {"memory": None, "memory_absent": "killed"}, "killed"),
        ("peak_memory_max", "9 GB", {"memory": None, "memory_absent": "killed"}, "killed"),
    ],
)
def test_what_was_not_measured_does_not_pass(name, allowed, changes, words):
    verdict = judge(measured(**changes), Budgets(**{name: allowed}))
    assert verdict.exit_code == 15
    assert words in one(verdict, name).message


@pytest.mark.parametrize(("allowed", "outcome"), [(0.45, "failed"), (0.495, "undecided"), (0.505, "undecided")])
def test_a_latency_whose_interval_holds_the_budget_is_not_decided(allowed, outcome):
    assert one(judge(measured(), Budgets(latency_ratio_max=allowed)), "latency_ratio_max").outcome == outcome


def test_noisy_wall_time_does_not_stop_a_budget_on_processor_time():
    noisy = measured(latency=latency(valid=False, note="busy"))
    assert judge(noisy, Budgets(cpu_ratio_max=0.6)).passed
    assert judge(noisy, Budgets(latency_ratio_max=0.6)).exit_code == 15


def failing(new, old, **regression):
    verdict = judge(new, Budgets(regression=regression), against=old)
    return {check.metric.removeprefix("regression."): check.exit_code for check in verdict.checks if not check.passed}


def test_a_bundle_is_no_worse_than_itself():
    same = measured(suite())
    verdict = judge(same, Budgets(), against=same)
    # The same scores on 1000 samples: at most 0.37% of more samples would differ.
    assert verdict.passed
    assert {check.metric for check in verdict.checks if check.metric.startswith("regression.")} == {
        "regression.cosine_drop_max",
        "regression.top1_agreement_drop_max",
        "regression.kl_rise_max",
        "regression.accuracy_drop_max",
        "regression.latency_growth_max",
        "regression.size_growth_max",
        "regression.memory_growth_max",
    }


def test_each_regression_has_its_code():
    old = measured(suite())
    parity = old.parity[0]
    worse = {"cosine": interval(0.98), "top1_agreement": interval(0.90), "kl": interval(0.05)}
    assert failing(measured(suite(), parity=(parity.model_copy(update=worse),)), old) == {
        "cosine_drop_max": 10,
        "top1_agreement_drop_max": 10,
        "kl_rise_max": 10,
    }
    assert failing(measured(suite(worse=60)), old) == {"accuracy_drop_max": 11}
    assert failing(measured(suite(), latency=latency(0.6)), old) == {"latency_growth_max": 12}
    assert failing(measured(suite(), size=Size(bytes=26_000_000, baseline_bytes=None, ratio=None)), old) == {
        "size_growth_max": 13
    }
    more = old.memory.model_copy(update={"peak_rss_mb": 70.0})
    assert failing(measured(suite(), memory=more), old) == {"memory_growth_max": 14}
    assert failing(measured(suite(), memory=more), old, memory_growth_max="20%") == {}


def test_what_the_older_bundle_had_must_not_be_lost():
    old = measured(suite())
    other = DATA.model_copy(update={"slice": "others"})
    assert failing(measured(), old) == {"accuracy_drop_max": 15}
    assert failing(measured(suite(data=other)), old) == {"accuracy_drop_max": 15}
    assert failing(measured(suite(), latency=None), old) == {"latency_growth_max": 15}
    assert failing(measured(suite(), latency=latency(valid=False, note="busy")), old) == {"latency_growth_max": 15}
    assert failing(measured(suite(), memory=None), old) == {"memory_growth_max": 15}
    assert failing(measured(suite(), parity=(), data=DATA), old)["cosine_drop_max"] == 15
    assert failing(measured(suite(), data=other), old) == {
        "cosine_drop_max": 15,
        "top1_agreement_drop_max": 15,
        "kl_rise_max": 15,
    }


def test_what_the_older_bundle_lacks_is_told():
    old = measured(latency=None, memory=None)
    verdict = judge(measured(suite()), Budgets(), against=old)
    assert verdict.passed
    assert [note.partition(":")[0] for note in verdict.notes] == ["suite intents", "latency", "memory"]


def test_two_latencies_that_overlap_are_not_decided():
    verdict = judge(measured(latency=latency(0.54, 0.03)), Budgets(), against=measured())
    check = one(verdict, "regression.latency_growth_max")
    assert check.measured == pytest.approx(0.08)
    assert check.outcome == "undecided"
    assert verdict.exit_code == 15
    # Independent errors add in squares: of 2% and 5.6% about 5.9%.
    assert check.high - check.low == pytest.approx(2 * 1.08 * np.hypot(0.02, 0.0556), rel=0.02)
