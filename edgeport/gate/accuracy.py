"""Checks of suites: is the artifact worse than the original by more than allowed, at the stated confidence?"""

from __future__ import annotations

import math

from edgeport.budgets import EVERY_SUITE, AccuracyBudget, Budgets
from edgeport.errors import EXIT_ACCURACY, EXIT_NOT_VALID, BadInputError
from edgeport.units import Margin, MetricUnit, read_margin
from edgeport.validate.evidence import Check, Measurements, TaskScore
from edgeport.validate.paired import Difference
from edgeport.validate.tasks import differences, score_bounds

ADVICE = "Look at the samples that flipped; keep the layers with the largest relative error in float (`exclude`)."
BROKEN_ADVICE = "Check the checkpoint, the labels and the preprocessing: the original itself does not solve this suite."
ABSENT_ADVICE = "Run the suite on this model, or take its budget out."
NO_NUMBER = "Choose another margin: the difference seen lies on it, so that no number of samples would decide."
MOST_SAMPLES = 1_000_000
"""Beyond this a number of samples is no advice."""


def accuracy_checks(measurements: Measurements, budgets: Budgets) -> list[Check]:
    """One check for each budget of each suite.

    Raises:
        BadInputError: a margin doesn't fit its metric.
    """
    main = main_metrics(measurements.tasks)
    checks = []
    for name, budget in budgets.accuracy.items():
        rest = [task for suite, task in main.items() if suite not in budgets.accuracy]
        tasks = rest if name == EVERY_SUITE else [main[name]] if name in main else []
        if not tasks and not (name == EVERY_SUITE and main):
            checks.append(_absent(name, budget))
        for task in tasks:
            checks += _checks(task, budget, f"gate.accuracy.{name}")
    return checks


def main_metrics(tasks: tuple[TaskScore, ...]) -> dict[str, TaskScore]:
    """Suites by name, each with its first metric."""
    main: dict[str, TaskScore] = {}
    for task in tasks:
        main.setdefault(task.suite, task)
    return main


def margin_of(text: str, original: float, unit: MetricUnit, where: str) -> float:
    """A margin in the metric's own unit.

    Raises:
        BadInputError: it doesn't fit the metric; the message says what would.
    """
    margin: Margin = read_margin(text)
    try:
        return margin.absolute(original, unit)
    except ValueError as error:
        raise BadInputError(f"The budget {text!r} does not fit: {error}.", where=where) from error


def drop_check(
    metric: str, task: TaskScore, found: Difference | None, margin: float, text: str, confidence: float, than: str
) -> Check:
    """The test of non-inferiority as a check.

    Args:
        found: None where a score is not finite.
        margin: in the metric's unit; text: as the budget has it.
        than: what it is compared with, in words.
    """
    if found is None:
        return _check(metric, task, margin, f"{task.suite}: the artifact's {task.metric} is not finite", ADVICE)
    decision = found.decide(margin)
    drop, low, high = -found.mean, -found.upper, -found.lower
    percent = f"{confidence:.6g}"
    words = {
        "no worse": f"not worse by more than {text} at confidence {percent}",
        "worse": f"worse by more than {text} at confidence {percent}",
        "undecided": f"{task.n} samples don't decide whether it is worse by more than {text} at confidence {percent}",
    }[decision]
    message = (
        f"{task.suite}: {task.metric} is {_mean(task)}, {abs(drop):.4g} {'worse' if drop >= 0 else 'better'} than "
        f"{than} [{low:.4g}, {high:.4g}] over {task.n} samples: {words}"
    )
    needed = found.samples_needed(margin, confidence) if decision == "undecided" else None
    advice = ADVICE
    if decision == "undecided":
        known = needed is not None and needed <= MOST_SAMPLES
        advice = f"Measure on about {needed} samples, or allow a wider margin." if known else NO_NUMBER
    return _check(
        metric,
        task,
        margin,
        message,
        advice,
        measured=drop,
        low=low,
        high=high,
        passed=decision == "no worse",
        undecided=decision == "undecided",
        needed=needed,
    )


def _check(
    metric: str,
    task: TaskScore,
    allowed: float,
    message: str,
    advice: str,
    *,
    measured: float | None = None,
    low: float | None = None,
    high: float | None = None,
    passed: bool = False,
    undecided: bool = False,
    needed: int | None = None,
    exit_code: int = EXIT_ACCURACY,
) -> Check:
    """A check of a task's score; undecided is 15 and no failure of accuracy."""
    return Check(
        metric=metric,
        output=task.suite,
        measured=measured,
        allowed=allowed,
        unit=task.unit,
        # One sample has no bound, and JSON no infinity.
        low=low if low is not None and math.isfinite(low) else None,
        high=high if high is not None and math.isfinite(high) else None,
        n=task.n,
        passed=passed,
        undecided=undecided,
        needed=needed,
        exit_code=EXIT_NOT_VALID if undecided else exit_code,
        message=message,
        advice=advice,
    )


def refused(metric: str, task: TaskScore, allowed: float, why: str, advice: str) -> Check:
    """The suite says nothing here (15)."""
    return _check(metric, task, allowed, f"{task.suite}: {why}", advice, exit_code=EXIT_NOT_VALID)


def _mean(task: TaskScore) -> str:
    return "not finite" if task.artifact is None else f"{task.artifact.mean:.4g}"


def _absent(name: str, budget: AccuracyBudget) -> Check:
    suite = "any suite" if name == EVERY_SUITE else f"the suite {name!r}"
    return Check(
        metric="accuracy",
        output=name,
        measured=None,
        allowed=budget.score_min if budget.score_min is not None else 0.0,
        passed=False,
        exit_code=EXIT_NOT_VALID,
        message=f"{suite} was not measured",
        advice=ABSENT_ADVICE,
    )


def _checks(task: TaskScore, budget: AccuracyBudget, where: str) -> list[Check]:
    """The drop against the original, and the artifact's own score."""
    if task.baseline_problem is not None or task.original is None:
        return [refused("accuracy", task, 0.0, task.baseline_problem or "the original has no score", BROKEN_ADVICE)]
    checks = []
    if budget.drop_max is not None:
        margin = margin_of(budget.drop_max, task.original.mean, task.unit, f"{where}.drop_max")
        found = differences(task, confidence=budget.confidence)
        than = "the original"
        checks.append(drop_check("accuracy_drop_max", task, found, margin, budget.drop_max, budget.confidence, than))
    if budget.score_min is not None:
        checks.append(_score_check(task, budget.score_min, budget.confidence))
    return checks


def _score_check(task: TaskScore, allowed: float, confidence: float) -> Check:
    """The artifact's own score against a bound, at the stated confidence."""
    ends = score_bounds(task, confidence=confidence)
    if ends is None or task.artifact is None:
        return drop_check("accuracy_score_min", task, None, allowed, "", confidence, "")
    low, high = ends
    enough, missed = (low >= allowed, high < allowed)
    if not task.higher_is_better:
        enough, missed = high <= allowed, low > allowed
    side = "at least" if task.higher_is_better else "at most"
    message = f"{task.suite}: {task.metric} is {_mean(task)} [{low:.4g}, {high:.4g}]; {side} {allowed:.4g} is allowed"
    undecided = not (enough or missed)
    return _check(
        "accuracy_score_min",
        task,
        allowed,
        f"{message}; {task.n} samples don't decide it" if undecided else message,
        "Measure on more samples, or allow a lower score." if undecided else ADVICE,
        measured=task.artifact.mean,
        low=low,
        high=high,
        passed=enough,
        undecided=undecided,
    )
