"""Checks against an older bundle: what was good enough yesterday, and measured then, must not get worse unseen."""

from __future__ import annotations

import math

from edgeport.budgets import CONFIDENCE, Regression
from edgeport.errors import EXIT_LATENCY, EXIT_MEMORY, EXIT_NOT_VALID, EXIT_PARITY, EXIT_SIZE
from edgeport.gate.accuracy import drop_check, main_metrics, margin_of, refused
from edgeport.validate.evidence import Check, DataRecord, Interval, Measurements, TaskScore
from edgeport.validate.tasks import difference_of

PREFIX = "regression."
ADVICE = "Compare both with `edgeport inspect`: what changed in the recipe, the model or the toolchain?"
AGAIN = "Measure the new bundle as the older one was: the same samples, shapes and suites."


def regression_checks(new: Measurements, old: Measurements, budget: Regression) -> tuple[list[Check], list[str]]:
    """Everything that both have, and a failure for what only the older one has.

    Returns:
        The checks, and what could not be compared because the older bundle lacks it, in words.

    Raises:
        BadInputError: a margin doesn't fit its metric.
    """
    notes: list[str] = []
    checks = [
        *_parity(new, old, budget),
        *_accuracy(new, old, budget, notes),
        *_latency(new, old, budget, notes),
        _growth("size_growth_max", new.size.bytes / old.size.bytes - 1, budget.size_growth_max, EXIT_SIZE),
        *_memory(new, old, budget, notes),
    ]
    return checks, notes


def same_samples(new: DataRecord, old: DataRecord) -> bool:
    """Both were measured on the same samples of the same data."""
    return (new.name, new.sha256, new.slice, new.samples) == (old.name, old.sha256, old.slice, old.samples)


def _check(metric: str, measured: float, allowed: float, code: int, message: str, **more: object) -> Check:
    fields = {"passed": measured <= allowed, "exit_code": code, "advice": ADVICE, **more}
    return Check.model_validate(
        {"metric": PREFIX + metric, "measured": measured, "allowed": allowed, "message": message, **fields}
    )


def _lost(metric: str, output: str | None, allowed: float, why: str) -> Check:
    what = metric if output is None else f"{metric} of {output}"
    return Check(
        metric=PREFIX + metric,
        output=output,
        measured=None,
        allowed=allowed,
        passed=False,
        exit_code=EXIT_NOT_VALID,
        message=f"{what} can't be compared with the older bundle's: {why}",
        advice=AGAIN,
    )


def _growth(metric: str, growth: float, allowed: float, code: int, interval: Interval | None = None) -> Check:
    spread = "" if interval is None else f" [{interval.low:+.1%}, {interval.high:+.1%}]"
    message = f"{metric}: {growth:+.2%}{spread} against the older bundle; at most {allowed:+.2%} is allowed"
    ends = {} if interval is None else {"low": interval.low, "high": interval.high, "n": interval.n}
    return _check(metric, growth, allowed, code, message, unit="relative", **ends)


def _parity(new: Measurements, old: Measurements, budget: Regression) -> list[Check]:
    """Agreement with the original, on the same samples: a number against a number, with nothing left to chance."""
    checks = []
    found = {parity.output: parity for parity in new.parity}
    kinds = (
        ("cosine_drop_max", "cosine", budget.cosine_drop_max, -1.0, ""),
        ("top1_agreement_drop_max", "top1_agreement", budget.top1_agreement_drop_max, -1.0, ""),
        ("kl_rise_max", "kl", budget.kl_rise_max, 1.0, "nats"),
    )
    for before in old.parity:
        after = found.get(before.output)
        for metric, field, allowed, sign, unit in kinds:
            was: Interval | None = getattr(before, field)
            now: Interval | None = None if after is None else getattr(after, field)
            if was is None:
                continue
            if now is None:
                checks.append(_lost(metric, before.output, allowed, "it was measured there, and is missing here"))
            elif not same_samples(new.data, old.data):
                checks.append(_lost(metric, before.output, allowed, "the samples are not the same"))
            else:
                worse = sign * (now.mean - was.mean)
                message = f"{field} of {before.output} went from {was.mean:.4g} to {now.mean:.4g}; "
                message += f"at most {allowed:.4g} {unit} worse is allowed".replace("  ", " ")
                checks.append(_check(metric, worse, allowed, EXIT_PARITY, message, output=before.output, unit=unit))
    return checks


def _accuracy(new: Measurements, old: Measurements, budget: Regression, notes: list[str]) -> list[Check]:
    metric = PREFIX + "accuracy_drop_max"
    before, after = main_metrics(old.tasks), main_metrics(new.tasks)
    notes += [f"suite {name}: the older bundle was not measured on it" for name in after if name not in before]
    checks = []
    for name, was in before.items():
        if was.artifact is None:
            notes.append(f"suite {name}: the older bundle's score is not finite")
            continue
        now = after.get(name)
        why = incomparable(now, was)
        if now is None or why is not None:
            checks.append(refused(metric, was, 0.0, f"can't be compared with the older bundle's: {why}", AGAIN))
            continue
        text = budget.accuracy_drop_max
        margin = margin_of(text, was.artifact.mean, now.unit, "gate.regression.accuracy_drop_max")
        found = difference_of(now, was.artifact_scores, now.artifact_scores, confidence=CONFIDENCE)
        check = drop_check(metric, now, found, margin, text, CONFIDENCE, "the older bundle")
        if check.undecided and not worse_samples(was, now):
            # A suite too small to say more of all inputs still says this: nothing that was right became wrong.
            message = f"{name}: none of {now.n} samples scores worse than in the older bundle"
            check = check.model_copy(update={"passed": True, "undecided": False, "message": message, "needed": None})
        checks.append(check)
    return checks


def worse_samples(was: TaskScore, now: TaskScore) -> int:
    """Samples on which the newer artifact scores worse than the older; None scores count as worse."""
    sign = 1.0 if now.higher_is_better else -1.0
    pairs = zip(was.artifact_scores, now.artifact_scores, strict=True)
    return sum(before is None or after is None or sign * (after - before) < 0 for before, after in pairs)


def incomparable(now: TaskScore | None, was: TaskScore) -> str | None:
    """Why two bundles' scores of a suite can't be compared sample by sample; None where they can."""
    if now is None:
        return "the suite was not run"
    if (now.metric, now.unit, now.higher_is_better) != (was.metric, was.unit, was.higher_is_better):
        return f"its metric is {now.metric}, it was {was.metric}"
    if not same_samples(now.data, was.data) or now.n != was.n or now.weights != was.weights:
        return "the samples are not the same"
    return None


def _latency(new: Measurements, old: Measurements, budget: Regression, notes: list[str]) -> list[Check]:
    """Relative to fp32 then and now: so the two may have been measured on two days, and on two machines."""
    metric, allowed = "latency_growth_max", budget.latency_growth_max
    was, now = old.latency, new.latency
    if was is None or not was.valid or was.ratio is None:
        notes.append("latency: the older bundle has no valid run")
        return []
    if now is None or not now.valid or now.ratio is None:
        return [_lost(metric, None, allowed, _why_no_latency(new))]
    if (now.threads, now.input_shapes) != (was.threads, was.input_shapes):
        return [_lost(metric, None, allowed, "threads or input shapes are not the same")]
    interval = growth_of_ratio(now.ratio, was.ratio)
    check = _growth(metric, interval.mean, allowed, EXIT_LATENCY, interval)
    if interval.low <= allowed < interval.high:
        changes = {"passed": False, "undecided": True, "exit_code": EXIT_NOT_VALID, "advice": AGAIN}
        return [check.model_copy(update={**changes, "message": check.message + "; the two runs don't decide it"})]
    return [check]


def _why_no_latency(new: Measurements) -> str:
    if new.latency is None:
        return new.latency_absent or "no reason is recorded"
    if not new.latency.valid:
        return f"the run is not valid: {new.latency.note}"
    return "there is no fp32 artifact of the same runtime"


def growth_of_ratio(now: Interval, was: Interval) -> Interval:
    """Interval of now / was - 1; the two runs are independent, so their errors add in squares (of logarithms)."""
    center = math.log(now.mean / was.mean)
    below = math.hypot(math.log(now.low / now.mean), math.log(was.high / was.mean))
    above = math.hypot(math.log(now.high / now.mean), math.log(was.low / was.mean))
    ends = (math.expm1(value) for value in (center, center - below, center + above))
    return Interval(**dict(zip(("mean", "low", "high"), ends, strict=True)), n=min(now.n, was.n))


def _memory(new: Measurements, old: Measurements, budget: Regression, notes: list[str]) -> list[Check]:
    metric, allowed = "memory_growth_max", budget.memory_growth_max
    if old.memory is None:
        notes.append("memory: the older bundle has no figure")
        return []
    if new.memory is None:
        return [_lost(metric, None, allowed, new.memory_absent or "no reason is recorded")]
    growth = new.memory.peak_rss_mb / old.memory.peak_rss_mb - 1
    return [_growth(metric, growth, allowed, EXIT_MEMORY)]
