"""Do the inputs that flipped have something in common? Slices of a suite, each with its own paired difference.

Many slices are looked at, and by luck alone one in twenty would leave the line at 95%. So each slice has two intervals:
its own, and one at the confidence that holds for all slices together (Bonferroni: an error of 5% shared among them).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

from edgeport.explain.document import Slice
from edgeport.explain.inputs import Asked
from edgeport.units import MetricUnit
from edgeport.validate.evidence import Interval
from edgeport.validate.paired import compare_scores

if TYPE_CHECKING:
    import numpy as np

By = Literal["length", "class", "language", "script", "confidence"]

ERROR = 0.05
"""Of all slices of a suite together."""
PIECES = 3
"""Into which what is counted is cut: as many samples in each as can be."""
LEAST = 10
"""Samples of a class that is a slice of its own; rarer ones are taken together."""


def slice_samples(
    inputs: Sequence[Asked], confidence: Sequence[float | None] | None
) -> tuple[dict[tuple[By, str], list[int]], list[str]]:
    """Which samples are in each slice, and what could not be sliced, in words.

    Args:
        inputs: one a sample; confidence: of the original in its own answer.
    """
    found: dict[tuple[By, str], list[int]] = {}
    notes = []
    by_kind: dict[By, list[str | None]] = {
        "length": _pieces([item.length for item in inputs], "tokens"),
        "class": _classes([item.label for item in inputs]),
        "language": [item.language for item in inputs],
        "script": [item.script for item in inputs],
        "confidence": [None] * len(inputs) if confidence is None else _pieces(confidence, "sure"),
    }
    for by, values in by_kind.items():
        names = sorted({value for value in values if value is not None}, key=_order(values))
        if len(names) < 2:
            if (note := _why(by, names, confidence is None)) is not None:
                notes.append(note)
            continue
        for name in names:
            found[by, name] = [index for index, value in enumerate(values) if value == name]
    return found, notes


def measure_slices(
    slices: dict[tuple[By, str], list[int]],
    before: np.ndarray,
    after: np.ndarray,
    *,
    unit: MetricUnit,
    higher_is_better: bool,
    weights: np.ndarray | None,
) -> list[Slice]:
    """The paired difference in every slice.

    Args:
        before, after: float64 (n,), finite: scores of what the file is compared with, and of the file.
    """
    import numpy as np

    every = np.ones(len(before)) if weights is None else weights
    whole = float(every @ (after - before) / every.sum())
    sign = 1 if higher_is_better else -1
    rows = []
    for (by, name), members in slices.items():
        a, b, weight = before[members], after[members], every[members]
        own = together = None
        if len(members) > 1:
            own, together = (
                _interval(a, b, unit, None if weights is None else weight, each)
                for each in (1 - ERROR / 2, 1 - ERROR / (2 * len(slices)))
            )
        change = sign * (b - a)
        rows.append(
            Slice(
                by=by,
                value=name,
                n=len(members),
                other_score=float(weight @ a / weight.sum()),
                score=float(weight @ b / weight.sum()),
                worse=int((change < 0).sum()),
                better=int((change > 0).sum()),
                difference=own,
                low=None if together is None else together.low,
                high=None if together is None else together.high,
                stands_out=together is not None and not together.low <= whole <= together.high,
            )
        )
    return rows


def _interval(
    before: np.ndarray, after: np.ndarray, unit: MetricUnit, weights: np.ndarray | None, confidence: float
) -> Interval | None:
    found = compare_scores(before, after, unit=unit, confidence=confidence, weights=weights)
    if not math.isfinite(found.lower) or not math.isfinite(found.upper):
        return None
    return Interval(mean=found.mean, low=found.lower, high=found.upper, n=found.n)


def _pieces(values: Sequence[float | None], unit: Literal["tokens", "sure"]) -> list[str | None]:
    """Each value's piece, named by the least and the greatest value in it. Equal values share a piece."""
    import numpy as np

    known = np.array([value for value in values if value is not None], np.float64)
    if len(known) < 2 * PIECES:
        return [None] * len(values)
    cuts = np.quantile(known, [(index + 1) / PIECES for index in range(PIECES - 1)])
    places = [None if value is None else int(np.searchsorted(cuts, value)) for value in values]
    names = {}
    for place in {place for place in places if place is not None}:
        members = [value for value, at in zip(values, places, strict=True) if at == place and value is not None]
        low, high = min(members), max(members)
        names[place] = f"{low:.0f} to {high:.0f} tokens" if unit == "tokens" else f"{low:.2f} to {high:.2f}"
    return [None if place is None else names[place] for place in places]


def _classes(labels: Sequence[str | None]) -> list[str | None]:
    """Each label, rare ones together."""
    counts = Counter(label for label in labels if label is not None)
    rare = {label for label, count in counts.items() if count < LEAST}
    other = f"{len(rare)} rarer classes"
    return [None if label is None else other if label in rare else label for label in labels]


def _order(values: Sequence[str | None]) -> Callable[[str], tuple[float, str]]:
    """The most samples first; pieces of a number by their least value."""
    counts = Counter(values)

    def key(name: str) -> tuple[float, str]:
        first = name.split(" to ")[0]
        return (float(first), name) if " to " in name and first.replace(".", "").isdigit() else (-counts[name], name)

    return key


def _why(by: By, names: Sequence[str], unsure: bool) -> str | None:
    """Why there are no slices of a kind; None where nothing was to be expected."""
    if by == "confidence" and unsure:
        return "confidence: the evidence has none; measure the suite again with this edgeport"
    if by == "language":
        return "language: the suite's rows name none; see script"
    if by == "script" and names:
        return f"script: all texts are written in one ({names[0]})"
    return f"{by}: too few different ones"
