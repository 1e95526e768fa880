"""One file a kind of suite: how answers become scores."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgeport.units import MetricUnit

if TYPE_CHECKING:
    import numpy as np

    from edgeport.validate.suites.definition import Suite
    from edgeport.validate.suites.remembered import Asker
    from edgeport.validate.suites.rows import Rows

Watch = Callable[[int, int], None]
"""Told (rows done, rows in all)."""


@dataclass(frozen=True)
class Scores:
    """One metric's scores of both models, a row each; the arguments of `edgeport.validate.tasks.score_task`."""

    metric: str
    unit: MetricUnit
    original: Sequence[float]
    artifact: Sequence[float]
    higher_is_better: bool = True
    chance: float | None = None
    weights: Sequence[float] | None = None
    answers: Sequence[Hashable] | None = None
    artifact_answers: Sequence[Hashable] | None = None
    confidence: Sequence[float] | None = None
    rows: Sequence[int] | None = None


@dataclass(frozen=True)
class Asked:
    """What a kind is given: the suite, its rows, and the two models."""

    suite: Suite
    rows: Rows
    original: Asker
    artifact: Asker
    watch: Watch

    @property
    def both(self) -> tuple[Asker, Asker]:
        """The original, then the artifact."""
        return self.original, self.artifact

    @property
    def most_tokens(self) -> int:
        """The most tokens of a text that both models take."""
        return min(subject.most_tokens(self.suite.most_tokens) for subject in self.both)


def certainty(scores: np.ndarray) -> float:
    """The probability of the most likely class: scores (C,), logits or probabilities; NaN where one is not finite."""
    import numpy as np

    values = scores.astype(np.float64)
    if not bool(np.isfinite(values).all()):
        return float("nan")
    if bool((values >= 0).all()) and abs(float(values.sum()) - 1) < 1e-3:
        return float(values.max())
    return float(1 / np.exp(values - values.max()).sum())


def right(answer: Hashable, wanted: Hashable) -> float:
    """1 where the answer is the one wanted, else 0."""
    return float(answer == wanted)
