"""Is the artifact worse than the original? One-sided bounds from scores of both on the same samples.

A difference is artifact minus original, turned so that less is worse. `lower` and `upper` each hold at the stated
confidence, so that "no worse than m" (lower > -m: a non-inferiority test) and "worse than m" (upper < -m) are each
wrong in at most 1 - confidence of all runs. Between the two stands a third answer: not enough samples to decide.

Right-or-wrong scores take the score interval of Tango 1998 ("Equivalence test and confidence interval for the
difference in proportions for the paired-sample design", Statistics in Medicine 17:891), whose test of no difference is
McNemar's. All others take the studentized bootstrap (Efron & Tibshirani 1993, section 12.5). Of 50 samples of which
10% change it passed a mean at the very margin in 4.5% of 1000 runs (stated: 5%), where BCa did in 8% and percentiles in
13%; where rare samples lose very much (differences like a log-normal) in 9%, at 1000 samples in 4%. Where fewer than
LEAST_CHANGED scores changed, neither holds, and exact bounds of the counts take their place: they claim no certainty
where nothing changed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from edgeport.units import WIDTHS, MetricUnit
from edgeport.validate.intervals import SEED

if TYPE_CHECKING:
    import numpy as np

RESAMPLES = 2000
POWER = 0.8
"""Chance with which the number of samples that is asked for would decide."""
LEAST_CHANGED = 10
"""With fewer samples whose score changed, resampling and normal approximation see too little of what may change."""
LEAST_SPREAD = 1e-6
"""Of a resample, relative to the standard error: below is rounding."""
CHUNK = 4_000_000
"""Counts of resampled samples held at once."""

Decision = Literal["no worse", "worse", "undecided"]


@dataclass(frozen=True)
class Difference:
    """How two scores on the same samples differ; less is worse.

    Attributes:
        mean: artifact minus original.
        lower, upper: one-sided bounds, each at the confidence asked for.
        deviation: standard deviation of one sample's difference.
        n: samples.
        unit: of the scores.
    """

    mean: float
    lower: float
    upper: float
    deviation: float
    n: int
    unit: MetricUnit

    def decide(self, margin: float) -> Decision:
        """Whether the artifact is worse by more than `margin`, in the scores' unit."""
        if self.lower >= -margin:
            return "no worse"
        return "worse" if self.upper < -margin else "undecided"

    def samples_needed(self, margin: float, confidence: float) -> int | None:
        """Samples that would decide with probability POWER, were the true difference the one seen.

        None where the difference seen is the margin itself: then no number would.
        """
        from scipy.special import ndtri  # type: ignore[import-untyped]

        distance = abs(self.mean + margin)
        variance = self.deviation**2
        if (width := WIDTHS.get(self.unit)) is not None:
            # Samples that did not change may have come by luck: at the margin's edge this many would.
            variance = max(variance, margin * (width - margin))
        if distance == 0 or variance == 0:
            return None
        needed = math.ceil((float(ndtri(confidence)) + float(ndtri(POWER))) ** 2 * variance / distance**2)
        return max(needed, self.n + 1)


def studentized(
    values: np.ndarray, weights: np.ndarray, *, confidence: float, resamples: int = RESAMPLES
) -> tuple[np.ndarray, np.ndarray]:
    """One-sided bounds of weighted means by the studentized bootstrap, for several columns over the same samples.

    Args:
        values: float64 (n, k), n at least 2.
        weights: float64 (n,), positive.

    Returns:
        Lower and upper bounds, float64 (k,).
    """
    import numpy as np

    total = weights.sum()
    mean = weights @ values / total
    centred = values - mean
    error = np.sqrt(weights**2 @ centred**2) / total
    columns = [weights[:, None] * centred, (weights[:, None] * centred) ** 2, weights[:, None] ** 2 * centred]
    random = np.random.default_rng(SEED)
    n = len(values)
    rows = []
    step = max(1, CHUNK // n)
    for start in range(0, resamples, step):
        count = random.multinomial(n, np.full(n, 1 / n), size=min(step, resamples - start)).astype(np.float64)
        first, square, cross = (count @ column for column in columns)
        weight, weight_square = (count @ weights)[:, None], (count @ weights**2)[:, None]
        shift = first / weight
        variance = (square - 2 * shift * cross + shift**2 * weight_square) / weight**2
        # A resample of values equal but for rounding has no spread: it stands far out on its side.
        spread = np.sqrt(np.maximum(variance, 0.0))
        far = np.select([shift > 0, shift < 0], [np.inf, -np.inf], 0.0)
        rows.append(np.divide(shift, spread, out=far, where=spread > LEAST_SPREAD * error))
    scaled = np.sort(np.concatenate(rows), axis=0)
    tail = max(0, math.ceil((1 - confidence) * resamples) - 1)
    with np.errstate(invalid="ignore"):
        lower, upper = mean - scaled[-1 - tail] * error, mean - scaled[tail] * error
    return np.where(error > 0, lower, mean), np.where(error > 0, upper, mean)


def tango(worse: int, better: int, n: int, confidence: float) -> tuple[float, float]:
    """One-sided bounds of the difference of two shares over the same n samples (Tango 1998).

    Args:
        worse: samples that the original has right and the artifact wrong; better: the other way round.
    """
    from scipy.optimize import brentq  # type: ignore[import-untyped]
    from scipy.special import ndtri

    quantile = float(ndtri(confidence))

    def score(difference: float) -> float:
        """Standardized distance of what was counted from a true difference (his equation 5)."""
        b = -worse - better + (2 * n + worse - better) * difference
        c = -worse * difference * (1 - difference)
        share = (math.sqrt(max(b * b - 8 * n * c, 0.0)) - b) / (4 * n)
        variance = n * (2 * share + difference * (1 - difference))
        distance = better - worse - n * difference
        return distance / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, distance)

    def end(sign: float) -> float:
        edge = 1 - 1e-12
        low, high = (score(at) - sign * quantile for at in (-edge, edge))
        if low <= 0:
            return -1.0
        return 1.0 if high >= 0 else float(brentq(lambda at: score(at) - sign * quantile, -edge, edge, xtol=1e-12))

    return end(1.0), end(-1.0)


def mcnemar(worse: int, better: int) -> float:
    """McNemar's exact test: the probability of counts at least this uneven were both equally likely (two-sided)."""
    from scipy.stats import binomtest  # type: ignore[import-untyped]

    return 1.0 if worse + better == 0 else float(binomtest(worse, worse + better, 0.5).pvalue)


def is_binary(*scores: np.ndarray) -> bool:
    """Every score is 0 or 1: right or wrong."""
    import numpy as np

    return all(bool(np.isin(score, (0.0, 1.0)).all()) for score in scores)


def compare_scores(
    original: np.ndarray,
    artifact: np.ndarray,
    *,
    unit: MetricUnit,
    confidence: float,
    weights: np.ndarray | None = None,
) -> Difference:
    """The difference of two models' mean scores, with bounds.

    Args:
        original, artifact: float64 (n,), finite, more is better (give an error rate with its sign turned).
        weights: (n,), positive, where the metric is a weighted mean (words of a text, tokens of a window).
    """
    import numpy as np

    n = len(original)
    weight = np.ones(n) if weights is None else weights
    change = artifact - original
    mean = float(weight @ change / weight.sum())
    deviation = float(np.sqrt(weight**2 @ (change - mean) ** 2 / n) / weight.mean())
    worse, better = int((change < 0).sum()), int((change > 0).sum())
    binary = weights is None and is_binary(original, artifact)
    most = 1.0 if binary else WIDTHS.get(unit, float(np.abs(change).max()))
    lower, upper = -math.inf, math.inf
    if n >= 2 and worse + better >= LEAST_CHANGED:
        if binary:
            lower, upper = tango(worse, better, n, confidence)
        else:
            lows, highs = studentized(change[:, None], weight, confidence=confidence)
            lower, upper = float(lows[0]), float(highs[0])
    if n >= 2 and not math.isfinite(lower + upper):
        # Too few changed, or all by the same, so that resamples have no spread to be measured by.
        lower, upper = rarely(worse, better, n, confidence, least=float(binary), most=most)
    # Summing in another order may leave the mean out by one ulp.
    return Difference(mean, min(lower, mean), max(upper, mean), deviation, n, unit)


def rarely(worse: int, better: int, n: int, confidence: float, *, least: float, most: float) -> tuple[float, float]:
    """Bounds where next to nothing changed, from exact bounds of the two shares (Clopper & Pearson 1934, each at half
    the error allowed).

    Args:
        least, most: by how much a score that changes does; a most that is only the largest change seen is a guess.
    """
    from scipy.stats import beta

    half = (1 - confidence) / 2

    def ends(count: int) -> tuple[float, float]:
        low = float(beta.ppf(half, count, n - count + 1)) if count else 0.0
        return low, float(beta.ppf(1 - half, count + 1, n - count)) if count < n else 1.0

    (worse_low, worse_high), (better_low, better_high) = ends(worse), ends(better)
    return better_low * least - worse_high * most, better_high * most - worse_low * least


def pseudo_values(whole: float, without: np.ndarray) -> np.ndarray:
    """Scores a sample for a metric that is no mean (F1, a correlation): Tukey's jackknife pseudo-values.

    Their mean is the metric with its bias removed to first order, and their spread its standard error (Efron &
    Tibshirani 1993, chapter 11), so that whatever is done with scores can be done with them.

    Args:
        whole: the metric over all n samples.
        without: over all but one, float64 (n,).
    """
    n = len(without)
    values: np.ndarray = n * whole - (n - 1) * without
    return values
