"""Confidence intervals: how far a mean over a few samples can be trusted.

The bootstrap resamples whole samples (all positions of a text go together), with a fixed seed. Its
percentiles are expanded for small n after Hesterberg 2015, "What Teachers Should Know About the
Bootstrap", section 3.2 (https://arxiv.org/abs/1411.5279): the plain percentile interval is too narrow
by sqrt((n - 1) / n) and by the difference between Student's t and the normal distribution.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from edgeport.validate.evidence import Interval

if TYPE_CHECKING:
    import numpy as np

RESAMPLES = 2000
SEED = 20240607
CONFIDENCE = 0.95
LEAST_RESAMPLES, MOST_RESAMPLED = 200, 20_000_000
"""Of long runs: so many resamples at least, and otherwise no more values than that in all of them."""


def tail_probability(n: int) -> float:
    """The percentile (0 to 1) at which the lower end of an expanded interval over n samples stands."""
    from scipy.special import ndtr, stdtrit  # type: ignore[import-untyped]

    quantile = stdtrit(n - 1, (1 + CONFIDENCE) / 2)
    return float(ndtr(-((n / (n - 1)) ** 0.5) * quantile))


def bootstrap_sums(columns: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray]) -> Interval:
    """Interval of a statistic that depends on sums over samples only.

    Args:
        columns: float64, shape (n, k): k quantities of each sample.
        statistic: from sums, shape (r, k), to values, shape (r,).
    """
    import numpy as np

    n = len(columns)
    value = float(statistic(columns.sum(axis=0, keepdims=True))[0])
    if n == 1:
        return Interval(mean=value, low=value, high=value, n=1)
    counts = np.random.default_rng(SEED).multinomial(n, np.full(n, 1 / n), size=RESAMPLES)
    tail = tail_probability(n)
    low, high = np.quantile(statistic(counts @ columns), [tail, 1 - tail])
    # The value itself belongs to the interval: summing in another order may leave it out by one ulp.
    return Interval(mean=value, low=min(float(low), value), high=max(float(high), value), n=n)


def mean_interval(totals: Any, weights: Any | None = None) -> Interval:
    """Interval of sum(totals) / sum(weights).

    Args:
        totals: one number a sample; with weights, the sum over the sample's positions.
        weights: positions of each sample, positive; 1 each when left out.
    """
    import numpy as np

    numerator = np.asarray(totals, dtype=np.float64)
    denominator = np.ones_like(numerator) if weights is None else np.asarray(weights, dtype=np.float64)
    return bootstrap_sums(np.stack([numerator, denominator], axis=1), lambda sums: sums[:, 0] / sums[:, 1])


def share_interval(hits: Any, trials: Any) -> Interval:
    """Interval of sum(hits) / sum(trials), a share between 0 and 1.

    Where every trial hit (or none did) the bootstrap sees no spread and would claim certainty; the Wilson
    score interval takes its place, with each *sample* as one trial, as positions of a sample hang together.
    """
    import numpy as np

    hit, tried = np.asarray(hits, dtype=np.float64), np.asarray(trials, dtype=np.float64)
    share = float(hit.sum() / tried.sum())
    if 0 < share < 1:
        return mean_interval(hit, tried)
    low, high = wilson(round(share) * len(hit), len(hit))
    return Interval(mean=share, low=low, high=high, n=len(hit))


def wilson(hits: int, n: int) -> tuple[float, float]:
    """Wilson score interval of a share (Wilson 1927, https://doi.org/10.1080/01621459.1927.10502953)."""
    z = 1.959963984540054  # the normal distribution's 97.5% quantile
    share = hits / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5
    return (0.0 if hits == 0 else centre - half), (1.0 if hits == n else centre + half)


def ratio_of_medians(numerator: np.ndarray, denominator: np.ndarray) -> Interval:
    """Interval of median(numerator) / median(denominator) over pairs measured one after the other.

    Neighbours in time are alike (clock, temperature, other processes), so runs of n^(1/3) pairs are
    resampled together: the circular block bootstrap (Politis & Romano 1992).

    Args:
        numerator, denominator: float64, shape (n,), positive, in the order of measuring.
    """
    import numpy as np

    n = len(numerator)
    value = float(np.median(numerator) / np.median(denominator))
    block = max(1, round(n ** (1 / 3)))
    random = np.random.default_rng(SEED)
    ratios = []
    # One resample at a time: a minute of a small model is half a million calls.
    for _ in range(max(LEAST_RESAMPLES, min(RESAMPLES // 2, MOST_RESAMPLED // n))):
        starts = random.integers(0, n, size=-(-n // block))
        chosen = ((starts[:, None] + np.arange(block)) % n).reshape(-1)[:n]
        ratios.append(np.median(numerator[chosen]) / np.median(denominator[chosen]))
    low, high = np.quantile(ratios, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(mean=value, low=min(float(low), value), high=max(float(high), value), n=n)


def percentile_interval(values: np.ndarray, share: float) -> Interval:
    """A percentile with the interval between two of the values themselves (order statistics; Conover 1999, 3.2).

    The number of values below the true percentile is binomial, whatever their distribution.

    Args:
        values: float64 (n,).
        share: 0.9 for the p90.
    """
    import numpy as np
    from scipy.stats import binom  # type: ignore[import-untyped]

    n = len(values)
    ordered = np.sort(values)
    value = float(np.percentile(ordered, 100 * share))
    low, high = (int(binom.ppf(each, n, share)) for each in ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2))
    ends = float(ordered[max(low - 1, 0)]), float(ordered[min(high, n - 1)])
    return Interval(mean=value, low=min(ends[0], value), high=max(ends[1], value), n=n)
