"""What a suite hands over: a score a sample, of the original and of the artifact on the same inputs.

A suite decides what a sample's score is (1 where the answer is right, a word error rate, the loss of a text); this file
makes the evidence of it, and refuses an original that is no yardstick: a model that answers by chance, or the same
whatever it is asked, can't be made worse by compression.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING

from edgeport.errors import BadInputError
from edgeport.units import MetricUnit
from edgeport.validate.evidence import DataRecord, Interval, TaskScore
from edgeport.validate.intervals import CONFIDENCE, mean_interval, share_interval
from edgeport.validate.paired import Difference, compare_scores, is_binary, mcnemar, studentized

if TYPE_CHECKING:
    import numpy as np


def score_task(
    *,
    suite: str,
    metric: str,
    unit: MetricUnit,
    original: Sequence[float],
    artifact: Sequence[float],
    data: DataRecord,
    higher_is_better: bool = True,
    chance: float | None = None,
    weights: Sequence[float] | None = None,
    answers: Sequence[Hashable] | None = None,
    artifact_answers: Sequence[Hashable] | None = None,
    confidence: Sequence[float] | None = None,
    rows: Sequence[int] | None = None,
) -> TaskScore:
    """The evidence of one metric.

    A metric that is no mean over samples takes `edgeport.validate.paired.pseudo_values` as scores.

    Args:
        original, artifact: one score a sample, in the same order; not finite where a model gave nothing usable.
        chance: score of an answer that knows nothing (one over the number of classes, share of the largest class).
        weights: positive, where the metric is a weighted mean of the scores.
        answers: what the original answered to each sample, where it can be told when it always answers the same.
        artifact_answers: what the artifact answered; confidence: the original's probability of its own answer.
        rows: which of the suite's rows the samples are.

    Raises:
        BadInputError: no samples, or sequences of different lengths.
    """
    import numpy as np

    lengths = {
        len(each)
        for each in (original, artifact, weights, answers, artifact_answers, confidence, rows)
        if each is not None
    }
    if len(lengths) != 1 or 0 in lengths:
        raise BadInputError(
            f"A suite needs as many scores of the original as of the artifact, one at least; got {sorted(lengths)}.",
            where=f"suite {suite}",
        )
    before, after = (np.asarray(each, dtype=np.float64) for each in (original, artifact))
    weight = None if weights is None else np.asarray(weights, dtype=np.float64)
    usable = bool(np.isfinite(before).all() and np.isfinite(after).all())
    sign = 1.0 if higher_is_better else -1.0
    change = sign * (after - before)
    binary = usable and weight is None and is_binary(before, after)
    worse, better = int((change < 0).sum()), int((change > 0).sum())
    return TaskScore(
        suite=suite,
        metric=metric,
        unit=unit,
        higher_is_better=higher_is_better,
        chance=chance,
        n=len(before),
        original=_interval(before, weight),
        artifact=_interval(after, weight),
        difference=_difference(before, after, weight, unit) if usable else None,
        worse=worse,
        better=better,
        mcnemar_p=mcnemar(worse, better) if binary else None,
        baseline_problem=baseline_problem(
            before, chance=chance, higher_is_better=higher_is_better, weights=weight, answers=answers
        ),
        original_scores=_kept(before),
        artifact_scores=_kept(after),
        weights=None if weight is None else tuple(weight.tolist()),
        rows=None if rows is None else tuple(rows),
        original_answers=None if answers is None else tuple(str(answer) for answer in answers),
        artifact_answers=None if artifact_answers is None else tuple(str(answer) for answer in artifact_answers),
        confidence=None if confidence is None else _kept(np.asarray(confidence, dtype=np.float64)),
        data=data,
    )


def baseline_problem(
    scores: np.ndarray,
    *,
    chance: float | None,
    higher_is_better: bool = True,
    weights: np.ndarray | None = None,
    answers: Sequence[Hashable] | None = None,
) -> str | None:
    """Why an original with these scores is no yardstick, in words; None when it is one.

    Args:
        scores: float64 (n,).
    """
    import numpy as np
    from scipy.stats import binomtest  # type: ignore[import-untyped]

    broken = int((~np.isfinite(scores)).sum())
    n = len(scores)
    if broken:
        return f"the original's own score is not finite on {broken} of {n} samples"
    if answers is not None and n > 1 and len(set(answers)) == 1:
        return f"the original gives the same answer ({answers[0]!r}) to all {n} samples"
    if chance is None:
        return None
    weight = np.ones(n) if weights is None else weights
    mean = float(weight @ scores / weight.sum())
    told = f"the original's own score is {mean:.4g} over {n} samples, not better than chance ({chance:.4g}) at 95%"
    sign = 1.0 if higher_is_better else -1.0
    if weights is None and is_binary(scores) and 0 < chance < 1:
        side = "greater" if higher_is_better else "less"
        return told if binomtest(int(scores.sum()), n, chance, alternative=side).pvalue > 1 - CONFIDENCE else None
    if n < 2:
        return told
    lower, _ = studentized((sign * scores)[:, None], weight, confidence=CONFIDENCE)
    return told if lower[0] <= sign * chance else None


def differences(task: TaskScore, *, confidence: float) -> Difference | None:
    """The task's paired difference with one-sided bounds, less being worse; None where a score is not finite."""
    return difference_of(task, task.original_scores, task.artifact_scores, confidence=confidence)


def difference_of(
    task: TaskScore, before: Sequence[float | None], after: Sequence[float | None], *, confidence: float
) -> Difference | None:
    """The paired difference of two score lists of a task's metric; None where a score is not finite."""
    import numpy as np

    if None in before or None in after:
        return None
    pair = (before, after) if task.higher_is_better else (after, before)
    return compare_scores(
        np.array(pair[0], dtype=np.float64),
        np.array(pair[1], dtype=np.float64),
        unit=task.unit,
        confidence=confidence,
        weights=None if task.weights is None else np.array(task.weights),
    )


def score_bounds(task: TaskScore, *, confidence: float) -> tuple[float, float] | None:
    """One-sided bounds of the artifact's own score, each at `confidence`; None where a score is not finite."""
    import numpy as np
    from scipy.stats import binomtest

    if None in task.artifact_scores:
        return None
    scores = np.array(task.artifact_scores, dtype=np.float64)
    if task.weights is None and is_binary(scores):
        ends = binomtest(int(scores.sum()), task.n).proportion_ci(2 * confidence - 1, method="wilson")
        return float(ends.low), float(ends.high)
    if task.n < 2:
        return float("-inf"), float("inf")
    weights = np.ones(task.n) if task.weights is None else np.array(task.weights)
    lows, highs = studentized(scores[:, None], weights, confidence=confidence)
    return float(lows[0]), float(highs[0])


def _kept(scores: np.ndarray) -> tuple[float | None, ...]:
    return tuple(value if math.isfinite(value) else None for value in scores.tolist())


def _interval(scores: np.ndarray, weights: np.ndarray | None) -> Interval | None:
    """Two-sided 95% interval of a mean score."""
    import numpy as np

    if not np.isfinite(scores).all():
        return None
    if weights is None and is_binary(scores):
        return share_interval(scores, np.ones(len(scores)))
    return mean_interval(scores if weights is None else scores * weights, weights)


def _difference(before: np.ndarray, after: np.ndarray, weights: np.ndarray | None, unit: MetricUnit) -> Interval | None:
    if len(before) < 2:
        mean = float((after - before)[0])
        return Interval(mean=mean, low=mean, high=mean, n=1)
    each_side = 1 - (1 - CONFIDENCE) / 2
    found = compare_scores(before, after, unit=unit, confidence=each_side, weights=weights)
    return Interval(mean=found.mean, low=found.lower, high=found.upper, n=found.n)
