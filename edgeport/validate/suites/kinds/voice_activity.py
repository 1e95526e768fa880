"""Does somebody speak? The area under the ROC curve over frames of 32 ms: how often speech is rated above silence.

Frames of a recording hang together, so recordings are left out one by one, and what each contributes is its score
(Tukey's jackknife pseudo-values).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgeport.data.audio import RATE, SPEECH_FRAME
from edgeport.errors import BadInputError
from edgeport.validate.paired import pseudo_values
from edgeport.validate.suites.kinds import Asked, Scores

if TYPE_CHECKING:
    import numpy as np


def score(asked: Asked) -> Scores:
    """One score a recording: the pseudo-value of the area without it. Chance is a half.

    Raises:
        BadInputError: a recording can't be read, or there is speech everywhere or nowhere.
    """
    import numpy as np

    rows = asked.rows.evaluation
    rated: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    spoken: list[np.ndarray] = []
    for done, row in enumerate(rows):
        samples = row["audio"].samples()
        spoken.append(frames_within(row["speech"], len(samples) // SPEECH_FRAME))
        for found, subject in zip(rated, asked.both, strict=True):
            found.append(subject.speech(samples))
        asked.watch(done + 1, len(rows))
    owner = np.repeat(np.arange(len(rows)), [len(frames) for frames in spoken])
    truth = np.concatenate(spoken)
    without = [owner != index for index in range(len(rows))]
    if not all(0 < truth[kept].sum() < kept.sum() for kept in without):
        raise BadInputError(
            "Speech, or silence, is in one recording at most.",
            where=f"suite {asked.suite.name}",
            allowed="frames with speech and frames without, in two recordings at least",
        )
    scores = []
    for each in rated:
        values = np.concatenate(each).astype(np.float64)
        left = np.array([area(values[kept], truth[kept]) for kept in without])
        scores.append(pseudo_values(area(values, truth), left))
    return Scores("roc_auc", "share", scores[0].tolist(), scores[1].tolist(), chance=0.5, rows=range(len(rows)))


def frames_within(intervals: list[tuple[float, float]], count: int) -> np.ndarray:
    """Which frames have their middle in one of the intervals, bool (count,)."""
    import numpy as np

    middles = (np.arange(count) + 0.5) * SPEECH_FRAME / RATE
    spoken = np.zeros(count, bool)
    for start, stop in intervals:
        spoken |= (middles >= start) & (middles < stop)
    return spoken


def area(values: np.ndarray, truth: np.ndarray) -> float:
    """The area under the ROC curve by Mann and Whitney's U; ties count half. NaN where a value is not finite.

    Args:
        values: float64 (n,); truth: bool (n,), with both values.
    """
    import numpy as np
    from scipy.stats import rankdata  # type: ignore[import-untyped]

    if not np.isfinite(values).all():
        return float("nan")
    positive = int(truth.sum())
    ranks = float(rankdata(values)[truth].sum())
    return (ranks - positive * (positive + 1) / 2) / (positive * (len(truth) - positive))
