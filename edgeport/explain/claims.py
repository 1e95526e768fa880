"""How far each number of the evidence can be trusted, and how many more samples would decide what is open.

An interval's half width shrinks with the root of the samples. So a number that is d away from its budget, with a half
width of h over n samples, is decided by about n (h / d)^2 of them, were the value seen the true one.
"""

from __future__ import annotations

import math

from edgeport.explain.document import Claim
from edgeport.validate.evidence import Check, Evidence, Interval

EXACT = {
    "finite",
    "varies",
    "weights_equal",
    "delegated",
    "tokenizer",
    "size_ratio_max",
    "size_max",
    "regression.size_growth_max",
}
"""Checks of counts and bytes: another run gives the same."""
MOST = 10**9
"""More samples than that are no advice."""


def make_claims(evidence: Evidence) -> tuple[Claim, ...]:
    """A claim for each check of the gate, then for each number that no budget is on."""
    checks = [_of_check(check) for check in evidence.verdict.checks]
    covered = {
        (check.metric.removesuffix("_min").removesuffix("_max"), check.output) for check in evidence.verdict.checks
    }
    return (*checks, *(claim for claim in _numbers(evidence) if (claim.metric, claim.output) not in covered))


def _of_check(check: Check) -> Claim:
    known = check.low is not None and check.high is not None and check.measured is not None
    interval = Interval(mean=check.measured or 0.0, low=check.low or 0.0, high=check.high or 0.0, n=check.n or 1)
    claim = _claim(check.metric, check.output, check.unit, check.measured, interval if known else None, check.allowed)
    if check.measured is None:
        return claim.model_copy(update={"state": "not measured", "words": check.message})
    if check.metric in EXACT:
        return claim.model_copy(update={"state": "exact", "words": "A count: another run gives the same."})
    if check.undecided and claim.state != "undecided":
        claim = claim.model_copy(update={"state": "undecided"})
    return claim if check.needed is None else claim.model_copy(update={"needed": check.needed})


def _numbers(evidence: Evidence) -> list[Claim]:
    """What is measured, whether or not a budget is on it, under the budgets' names."""
    found = []
    for parity in evidence.parity:
        for metric, unit in (("cosine", ""), ("top1_agreement", ""), ("kl", "nats")):
            interval = getattr(parity, metric)
            if interval is not None:
                found.append(_claim(metric, parity.output, unit, interval.mean, interval))
    for task in evidence.tasks:
        if task.difference is not None:
            sign = -1 if task.higher_is_better else 1
            ends = sorted((sign * task.difference.low, sign * task.difference.high))
            drop = Interval(mean=sign * task.difference.mean, low=ends[0], high=ends[1], n=task.difference.n)
            found.append(_claim("accuracy_drop", task.suite, task.unit, drop.mean, drop))
        if task.artifact is not None:
            found.append(_claim("accuracy_score", task.suite, task.unit, task.artifact.mean, task.artifact))
    if (latency := evidence.latency) is not None:
        for metric, unit, interval in (
            ("latency_p90", "ms", latency.p90),
            ("latency_ratio", "", latency.ratio),
            ("cpu_ratio", "", latency.cpu_ratio),
        ):
            if interval is not None:
                claim = _claim(metric, None, unit, interval.mean, interval)
                note = "" if latency.valid else " The run is not valid."
                found.append(claim.model_copy(update={"words": claim.words + note}))
    found.append(_exact("size", evidence.size.bytes / 1e6, "MB"))
    if (memory := evidence.memory) is not None:
        found.append(_one_run("peak_memory", memory.peak_rss_mb, "MB"))
        found.append(_one_run("first_run", memory.first_run_ms, "ms"))
    return found


def _claim(
    metric: str,
    output: str | None,
    unit: str,
    value: float | None,
    interval: Interval | None,
    allowed: float | None = None,
) -> Claim:
    claim = Claim(metric=metric, output=output, unit=unit, value=value, allowed=allowed, state="one run", words="")
    if interval is None:
        words = "Measured without an interval: another run may give another number."
        return claim.model_copy(update={"words": words})
    half = (interval.high - interval.low) / 2
    more = {"n": interval.n, "low": interval.low, "high": interval.high, "half_width": half}
    claim = claim.model_copy(update=more)
    if interval.n < 2:
        return claim.model_copy(update={"words": "A single sample has no spread to be measured by."})
    if allowed is None:
        words = f"No budget is on it; an interval half as wide takes about {4 * interval.n} samples."
        return claim.model_copy(update={"state": "no budget", "words": words})
    distance = abs(interval.mean - allowed)
    ratio = distance / half if half > 0 else None
    if not interval.low < allowed < interval.high:
        words = "The interval has no width: what was measured did not vary."
        if ratio is not None:
            words = f"The budget is {ratio:.3g} half widths away."
        return claim.model_copy(update={"state": "decided", "decided_by": ratio, "words": words})
    needed = math.ceil(interval.n * (half / distance) ** 2) if distance > 0 else None
    needed = None if needed is None or needed > MOST else max(needed, interval.n + 1)
    words = "The interval holds the budget" + (
        f"; about {needed} samples would decide." if needed is not None else ", and lies on it: no number would decide."
    )
    return claim.model_copy(update={"state": "undecided", "decided_by": ratio, "needed": needed, "words": words})


def _exact(metric: str, value: float, unit: str) -> Claim:
    return Claim(metric=metric, unit=unit, value=value, state="exact", words="A count: another run gives the same.")


def _one_run(metric: str, value: float, unit: str) -> Claim:
    return _claim(metric, None, unit, value, None)
