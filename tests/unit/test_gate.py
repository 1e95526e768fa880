"""The gate: every budget, both sides of it, and everything that was not measured."""

import pytest

from edgeport.gate import conclude, judge
from edgeport.recipe import Budgets
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


def interval(mean):
    return Interval(mean=mean, low=mean, high=mean, n=10)


def parity(output="logits", **changes):
    fields = {
        "output": output,
        "max_abs": 0.1,
        "relative_l2": 0.05,
        "cosine": interval(0.99),
        "cosine_worst": 0.98,
        "top1_agreement": interval(0.9),
        "kl": interval(0.02),
        "positions": 100,
        "finite": True,
    }
    return OutputParity(**{**fields, **changes})


EMBEDDING = parity("last_hidden_state", top1_agreement=None, kl=None, positions=None)
BROKEN = {
    "finite": False,
    "max_abs": None,
    "relative_l2": None,
    "cosine": None,
    "cosine_worst": None,
    "top1_agreement": None,
    "kl": None,
}
LATENCY = Latency(
    threads=1,
    queries=100,
    warmup=10,
    p50_ms=5.0,
    p90_ms=6.0,
    cpu_ms=5.0,
    baseline_p50_ms=10.0,
    baseline_p90_ms=12.0,
    ratio=interval(0.5),
    valid=True,
    note="",
    input_shapes={"x": (1, 8)},
)
MEMORY = Memory(peak_rss_mb=60.0, runtime_rss_mb=40.0, baseline_peak_rss_mb=100.0, load_ms=3.0, first_run_ms=9.0)


def measured(**changes):
    fields = {
        "measured_at": "2026-01-01T00:00:00+00:00",
        "machine": Machine(platform="p", cpu="c", cores=2, memory_gb=8.0, python="3.11", versions={}),
        "states": States(lowered="yes", executed_here="runtime", numerics_verified="no", statement="s"),
        "data": DataRecord(name="d", real=True, sha256={}, slice="all", licence=None, samples=10),
        "parity": (parity(),),
        "weights": WeightCheck(checked=4, equal=4, different=()),
        "size": Size(bytes=25, baseline_bytes=100, ratio=0.25),
        "latency": LATENCY,
        "memory": MEMORY,
    }
    return Measurements(**{**fields, **changes})


def failed(verdict):
    return {(check.metric, check.output): check.exit_code for check in verdict.checks if not check.passed}


# budget, a value that passes, one that fails, the exit code
TABLE = [
    ("cosine_min", 0.98, 0.995, 10),
    ("relative_l2_max", 0.06, 0.04, 10),
    ("top1_agreement_min", 0.85, 0.95, 10),
    ("kl_max", 0.03, 0.01, 10),
    ("latency_ratio_max", 0.6, 0.4, 12),
    ("size_ratio_max", 0.3, 0.2, 13),
    ("peak_memory_ratio_max", 0.7, 0.5, 14),
]


@pytest.mark.parametrize(("budget", "passes", "fails", "code"), TABLE)
def test_each_budget_passes_and_fails(budget, passes, fails, code):
    good = judge(measured(), Budgets(**{budget: passes}))
    assert good.passed
    assert good.exit_code == 0
    assert budget in {check.metric for check in good.checks}
    bad = judge(measured(), Budgets(**{budget: fails}))
    assert not bad.passed
    assert bad.exit_code == code
    assert [metric for metric, _ in failed(bad)] == [budget]
    check = next(check for check in bad.checks if not check.passed)
    assert check.allowed == fails
    assert check.measured is not None
    assert f"{check.measured:.4g}" in check.message
    assert check.advice


def test_the_measured_number_is_the_one_of_its_own_metric():
    budgets = Budgets(**{budget: passes for budget, passes, _, _ in TABLE})
    found = {check.metric: check.measured for check in judge(measured(), budgets).checks}
    assert found == {
        "finite": 1.0,
        "varies": 1.0,
        "weights_equal": 1.0,
        "cosine_min": 0.99,
        "relative_l2_max": 0.05,
        "top1_agreement_min": 0.9,
        "kl_max": 0.02,
        "latency_ratio_max": 0.5,
        "size_ratio_max": 0.25,
        "peak_memory_ratio_max": 0.6,
    }


@pytest.mark.parametrize(("budget", "allowed"), [("size_ratio_max", 0.25), ("cosine_min", 0.99)])
def test_a_budget_met_exactly_passes(budget, allowed):
    assert judge(measured(), Budgets(**{budget: allowed})).passed


UNMEASURED = [
    ("latency_ratio_max", {"latency": None, "latency_absent": "reference evaluator"}, 15, "reference evaluator"),
    (
        "latency_ratio_max",
        {"latency": LATENCY.model_copy(update={"valid": False, "note": "too short"})},
        15,
        "too short",
    ),
    ("latency_ratio_max", {"latency": LATENCY.model_copy(update={"ratio": interval(float("nan"))})}, 12, ""),
    ("size_ratio_max", {"size": Size(bytes=25, baseline_bytes=None, ratio=None)}, 15, "fp32"),
    ("size_ratio_max", {"size": Size(bytes=25, baseline_bytes=0, ratio=float("nan"))}, 13, ""),
    ("peak_memory_ratio_max", {"memory": None, "memory_absent": "killed"}, 15, "killed"),
    ("peak_memory_ratio_max", {"memory": MEMORY.model_copy(update={"baseline_peak_rss_mb": None})}, 15, "fp32"),
    ("cosine_min", {"parity": ()}, 15, "not compared"),
    ("relative_l2_max", {"parity": ()}, 15, "not compared"),
    ("kl_max", {"parity": ()}, 15, "not compared"),
    ("cosine_min", {"parity": (parity(cosine=interval(float("nan"))),)}, 10, ""),
    ("top1_agreement_min", {"parity": (parity(top1_agreement=None),)}, 10, "missing"),
    ("kl_max", {"parity": (parity(kl=None),)}, 10, "missing"),
    ("relative_l2_max", {"parity": (parity(relative_l2=float("inf")),)}, 10, ""),
]


@pytest.mark.parametrize(("budget", "changes", "code", "why"), UNMEASURED)
def test_what_was_not_measured_does_not_pass(budget, changes, code, why):
    """The loosest budget there is: only the missing number can fail it."""
    loosest = 0.0 if budget.endswith("_min") else 2.0
    verdict = judge(measured(**changes), Budgets(**{budget: loosest}))
    assert not verdict.passed
    found = [check for check in verdict.checks if check.metric == budget]
    assert [check.exit_code for check in found] == [code]
    assert found[0].measured is None
    assert why in found[0].message


def test_what_has_no_budget_is_not_judged():
    changes = {"latency": None, "memory": None, "size": Size(bytes=1, baseline_bytes=None, ratio=None)}
    assert judge(measured(**changes), Budgets()).passed


def test_three_checks_need_no_budget():
    assert failed(judge(measured(parity=(parity(**BROKEN),)), Budgets())) == {("finite", "logits"): 10}
    assert failed(judge(measured(parity=(parity(varies=False),)), Budgets())) == {("varies", "logits"): 10}
    assert failed(judge(measured(parity=()), Budgets())) == {("finite", None): 15}
    assert failed(judge(measured(weights=None), Budgets())) == {("weights_equal", None): 15}
    different = WeightCheck(checked=4, equal=3, different=("a.weight: 1 of 9 codes differ",))
    verdict = judge(measured(weights=different), Budgets())
    assert failed(verdict) == {("weights_equal", None): 10}
    assert "a.weight" in next(check.message for check in verdict.checks if not check.passed)
    unnamed = WeightCheck(checked=4, equal=3, different=())
    assert not judge(measured(weights=unnamed), Budgets()).passed
    assert judge(measured(weights=WeightCheck(checked=0, equal=0, different=())), Budgets()).passed
    only_in_file = WeightCheck(checked=0, equal=0, different=("b: compressed in the file only",))
    assert not judge(measured(weights=only_in_file), Budgets()).passed


def test_not_finite_fails_every_parity_budget():
    budgets = Budgets(cosine_min=0.0, relative_l2_max=9.0, top1_agreement_min=0.0, kl_max=9.0)
    verdict = judge(measured(parity=(parity(**BROKEN),)), budgets)
    assert {metric for metric, _ in failed(verdict)} == {
        "finite",
        "cosine_min",
        "relative_l2_max",
        "top1_agreement_min",
        "kl_max",
    }
    assert verdict.exit_code == 10


def test_class_budgets_do_not_apply_to_embeddings():
    verdict = judge(measured(parity=(EMBEDDING,)), Budgets(top1_agreement_min=1.0, kl_max=1e-9, cosine_min=0.9))
    assert verdict.passed
    assert {check.metric for check in verdict.checks} == {"finite", "varies", "cosine_min", "weights_equal"}


def test_each_output_is_judged():
    outputs = (EMBEDDING, parity("sentence_embedding", cosine=interval(0.5), positions=None))
    assert failed(judge(measured(parity=outputs), Budgets(cosine_min=0.9))) == {
        ("cosine_min", "sentence_embedding"): 10
    }
    broken = parity("pooler_output", **BROKEN)
    assert failed(judge(measured(parity=(EMBEDDING, broken)), Budgets())) == {("finite", "pooler_output"): 10}


def test_the_lowest_code_wins_and_all_are_listed():
    budgets = Budgets(size_ratio_max=0.1, latency_ratio_max=0.1, peak_memory_ratio_max=0.1, kl_max=0.5)
    verdict = judge(measured(), budgets)
    assert verdict.exit_code == 12
    assert sorted(failed(verdict).values()) == [12, 13, 14]
    everything = judge(measured(latency=None), Budgets(cosine_min=1.0, latency_ratio_max=1.0, size_ratio_max=0.1))
    assert everything.exit_code == 10
    assert sorted(failed(everything).values()) == [10, 13, 15]


@pytest.mark.parametrize(
    ("changes", "budgets", "state"),
    [
        ({}, Budgets(cosine_min=0.9), "yes"),
        ({}, Budgets(cosine_min=1.0), "failed"),
        ({}, Budgets(size_ratio_max=0.1), "yes"),
        ({"parity": (parity(**BROKEN),)}, Budgets(), "failed"),
        ({"parity": (parity(varies=False),)}, Budgets(), "failed"),
        ({"parity": ()}, Budgets(), "no"),
    ],
)
def test_numerics_verified_is_said_by_the_parity_checks(changes, budgets, state):
    evidence = conclude(measured(**changes), budgets)
    assert evidence.states.numerics_verified == state
    assert evidence.states.statement == "s"
    assert evidence.verdict == judge(measured(**changes), budgets)
    assert type(evidence).model_validate_json(evidence.model_dump_json()) == evidence
