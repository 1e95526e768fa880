"""Choose an int8 grid for a tensor from a histogram of the values that it takes.

A grid that holds the largest value is coarse for all the others; a narrower one clips. Four answers:

minmax      hold every value seen
percentile  cut off a ten-thousandth of the values, half at each end
mse         least mean squared error of rounding and clipping together (Sung et al. 2015,
            https://arxiv.org/abs/1511.06488)
entropy     least Kullback-Leibler divergence between the clipped values' distribution and its rounded form (Migacz,
            "8-bit inference with TensorRT", GTC 2017)

A histogram's bins span the values that were seen, so its memory is bounded and two passes over the data fill it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from edgeport.activations import LEVELS, ActivationGrid, grid_of
from edgeport.recipe import RangeMethod

BINS = 8192
"""32 bins a step of the widest grid: a bin's width is nothing beside the rounding that is judged."""

KEPT = 1 - 1e-4
"""Share of the values that `percentile` keeps."""

NARROWEST = 1 / 64
"""Of the range that was seen, the least that is tried."""


class Histogram:
    """Counts of values in equal bins between two bounds.

    Attributes:
        low, high: least and greatest value; everything that is added lies between them.
        counts: (BINS,) int64.
    """

    def __init__(self, low: float, high: float) -> None:
        self.low, self.high = low, high
        self.counts = torch.zeros(BINS, dtype=torch.int64)

    def add(self, values: torch.Tensor) -> None:
        """Count the values of a float32 tensor of any shape."""
        if self.high > self.low:
            clipped = values.detach().reshape(-1).clamp(self.low, self.high)
            self.counts += torch.histc(clipped, BINS, self.low, self.high).to(torch.int64)

    @property
    def centers(self) -> torch.Tensor:
        """The middle of each bin, (BINS,) float64."""
        width = (self.high - self.low) / BINS
        return self.low + width * (torch.arange(BINS, dtype=torch.float64) + 0.5)


def _percentile(histogram: Histogram) -> tuple[float, float]:
    share = histogram.counts.cumsum(0).double() / histogram.counts.sum()
    tail = (1 - KEPT) / 2
    edges = torch.linspace(histogram.low, histogram.high, BINS + 1, dtype=torch.float64)
    first = int((share <= tail).sum())
    last = int((share < 1 - tail).sum()) + 1
    return float(edges[first]), float(edges[last])


def _squared_error(histogram: Histogram, low: float, high: float) -> float:
    """Mean squared error of rounding to the grid over a range."""
    grid = grid_of(low, high)
    centers = histogram.centers
    rounded = (torch.round(centers / grid.scale)).clamp(-128 - grid.zero_point, 127 - grid.zero_point) * grid.scale
    return float((histogram.counts * (rounded - centers).square()).sum() / histogram.counts.sum())


def _divergence(histogram: Histogram, low: float, high: float) -> float:
    """KL(clipped || rounded) over the bins of a range: P piles what it clips on its ends, Q knows only steps."""
    centers, counts = histogram.centers, histogram.counts.double()
    # Every grid holds 0 exactly: the zeros that a ReLU makes would outweigh all else, as in TensorRT's first bin.
    counts[(centers.abs() <= (histogram.high - histogram.low) / BINS)] = 0
    inside = (centers >= low) & (centers <= high)
    kept = counts * inside
    clipped = kept.clone()
    where = inside.nonzero().reshape(-1)
    if where.numel() == 0:
        return math.inf
    clipped[where[0]] += counts[: where[0]].sum()
    clipped[where[-1]] += counts[where[-1] + 1 :].sum()
    # Each step's count is spread over those of its bins that hold anything.
    scale = max(high - low, 1e-300) / LEVELS
    steps = torch.round((centers - low) / scale).clamp(0, LEVELS).to(torch.int64)
    filled = (kept > 0).double()
    mass = torch.zeros(LEVELS + 1, dtype=torch.float64).index_add_(0, steps, kept)
    room = torch.zeros(LEVELS + 1, dtype=torch.float64).index_add_(0, steps, filled)
    spread = (mass / room.clamp_min(1))[steps] * filled
    p, q = clipped / clipped.sum(), spread / spread.sum().clamp_min(1e-300)
    used = p > 0
    return float((p[used] * (p[used] / q[used].clamp_min(1e-12)).log()).sum())


def _search(histogram: Histogram, cost: Callable[[Histogram, float, float], float]) -> tuple[float, float]:
    """The range of least cost: both ends drawn in together at first, then each on its own."""
    low, high = min(histogram.low, 0.0), max(histogram.high, 0.0)
    shares = [NARROWEST ** (step / 48) for step in range(49)]
    best = min((cost(histogram, low * s, high * s), -s) for s in shares)
    ends = [-best[1], -best[1]]
    for _ in range(2):
        for side in (0, 1):
            if (low, high)[side] == 0:
                continue
            trials = []
            for step in range(-12, 13):
                moved = list(ends)
                moved[side] = min(ends[side] * NARROWEST ** (step / 96), 1.0)
                trials.append((cost(histogram, low * moved[0], high * moved[1]), -moved[side]))
            ends[side] = -min(trials)[1]
    return low * ends[0], high * ends[1]


def choose_range(histogram: Histogram, method: RangeMethod) -> tuple[float, float]:
    """The ends of a grid for the values of a histogram; 0 lies between them or on one."""
    if not bool(histogram.counts.any()) or method == "minmax":
        low, high = histogram.low, histogram.high
    elif method == "percentile":
        low, high = _percentile(histogram)
    else:
        low, high = _search(histogram, _squared_error if method == "mse" else _divergence)
    return min(low, 0.0), max(high, 0.0)


def choose_grid(histogram: Histogram, method: RangeMethod) -> ActivationGrid:
    """The int8 grid for the values of a histogram."""
    return grid_of(*choose_range(histogram, method))
