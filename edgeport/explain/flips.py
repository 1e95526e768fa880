"""Which inputs flipped, of one suite: from each sample's score in the file and in what it is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from edgeport.explain.document import Flip, SuiteFlips
from edgeport.explain.inputs import Asked
from edgeport.explain.slices import measure_slices, slice_samples
from edgeport.validate.evidence import TaskScore

if TYPE_CHECKING:
    pass

MOST_FLIPS = 50
"""Inputs of a suite that are told one by one."""
ORIGINAL = "the original"


def suite_flips(
    task: TaskScore, inputs: Sequence[Asked] | None, why: str, *, older: TaskScore | None = None, other: str = ORIGINAL
) -> SuiteFlips:
    """The flips of a suite against the original, or against an older bundle's file.

    Args:
        inputs: one a sample; None where they can't be shown, for the reason `why`.
        older: the same suite's scores of the other file, on the same samples; None compares with the original.
    """
    import numpy as np

    before_scores = task.original_scores if older is None else older.artifact_scores
    before_answers = task.original_answers if older is None else older.artifact_answers
    sign = 1 if task.higher_is_better else -1
    usable = None not in before_scores and None not in task.artifact_scores
    notes = [] if inputs is not None else [f"the inputs can't be shown: {why}"]
    slices = []
    if not usable:
        notes.append("a score is not finite, so nothing can be averaged over slices")
    elif inputs is not None:
        members, unsliced = slice_samples(inputs, task.confidence)
        notes += unsliced
        slices = measure_slices(
            members,
            np.array(before_scores, np.float64),
            np.array(task.artifact_scores, np.float64),
            unit=task.unit,
            higher_is_better=task.higher_is_better,
            weights=None if task.weights is None else np.array(task.weights),
        )
    change = [_change(a, b, sign) for a, b in zip(before_scores, task.artifact_scores, strict=True)]
    order = sorted((index for index, each in enumerate(change) if each), key=lambda index: (change[index], index))
    worse = [index for index in order if change[index] < 0]
    better = [index for index in reversed(order) if change[index] > 0]
    flips = []
    if task.rows is not None:
        for index in (*worse, *better)[:MOST_FLIPS]:
            shown = Asked(task.rows[index], None) if inputs is None else inputs[index]
            flips.append(_flip(task, index, shown, before_scores, before_answers, change[index] < 0))
    return SuiteFlips(
        suite=task.suite,
        metric=task.metric,
        unit=task.unit,
        higher_is_better=task.higher_is_better,
        other=other,
        n=task.n,
        worse=len(worse),
        better=len(better),
        slices=tuple(slices),
        flips=tuple(flips),
        left_out=len(worse) + len(better) - len(flips),
        notes=tuple(notes),
    )


def _change(before: float | None, after: float | None, sign: int) -> float:
    """How much better the file scores; a score that is not finite is as bad as can be."""
    if after is None or before is None:
        return 0.0 if after is before else float("-inf") if after is None else float("inf")
    return sign * (after - before)


def _flip(
    task: TaskScore,
    index: int,
    asked: Asked,
    before_scores: Sequence[float | None],
    before_answers: Sequence[str] | None,
    worse: bool,
) -> Flip:
    text, cut = asked.shown
    return Flip(
        row=asked.row,
        worse=worse,
        shown=text,
        cut=cut,
        length=asked.length,
        label=asked.label,
        other_answer=None if before_answers is None else asked.answer(before_answers[index]),
        answer=None if task.artifact_answers is None else asked.answer(task.artifact_answers[index]),
        other_score=before_scores[index],
        score=task.artifact_scores[index],
        confidence=None if task.confidence is None else task.confidence[index],
    )
