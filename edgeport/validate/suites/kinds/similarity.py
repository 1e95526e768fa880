"""Do likenesses of texts agree with what people say? Pearson's correlation of cosines with ratings, over pairs.

Pairs of the same documents hang together, so documents are left out one by one, with all their pairs, and what they
contribute to the correlation is their score (Tukey's jackknife pseudo-values).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgeport.validate.paired import pseudo_values
from edgeport.validate.suites.kinds import Asked, Scores

if TYPE_CHECKING:
    import numpy as np


def score(asked: Asked) -> Scores:
    """One score a text: the pseudo-value of the correlation without it."""
    import numpy as np

    rows, most = asked.rows.evaluation, asked.most_tokens
    texts = sorted({row[side] for row in rows for side in ("first", "second")})
    place = {text: index for index, text in enumerate(texts)}
    first = np.array([place[row["first"]] for row in rows])
    second = np.array([place[row["second"]] for row in rows])
    rated = np.array([row["score"] for row in rows], np.float64)
    without = [(first != index) & (second != index) for index in range(len(texts))]
    scores = []
    for number, subject in enumerate(asked.both):
        vectors = []
        for text in texts:
            vectors.append(subject.embed(text, most).astype(np.float64))
            asked.watch(number * len(texts) + len(vectors), 2 * len(texts))
        stacked = np.stack(vectors)
        cosines = (stacked[first] * stacked[second]).sum(axis=1)
        left = np.array([_pearson(cosines[kept], rated[kept]) for kept in without])
        scores.append(pseudo_values(_pearson(cosines, rated), left))
    return Scores("pearson", "correlation", scores[0].tolist(), scores[1].tolist(), chance=0.0)


def _pearson(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's correlation of two float64 (n,)."""
    import numpy as np

    return float(np.corrcoef(a, b)[0, 1])
