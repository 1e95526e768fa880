"""The integer grid of a weight, and the search for its scales.

Absolute-maximum scaling spends the whole grid on the largest weight. Shrinking the range a little clips that
weight and rounds all others more finely. The best shrink factor is searched on a fixed list for every group at
once, as in the clip search of AWQ (https://arxiv.org/abs/2306.00978, section 3); the error may be weighted by
what each column is multiplied with. Afterwards each scale is the least-squares one for its codes, alternating
with new codes as long as the error falls (the coordinate descent of k-means with evenly spaced centres).

Two's complement has one code more below zero than above. A backend that takes negative scales can put that
code at the end where the group needs it; `signed_scales` searches both.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from edgeport.quantized import QuantizedTensor, ScaleDtype, as_matrix, code_range, quantize_with_scale, round_scale

BLOCK = 1 << 17
"""Weights searched at a time: their temporaries stay in the second-level cache."""

REFITS = 2
"""Rounds of least squares after the search: a third lowers the error of MiniLM by less than a thousandth."""


@dataclass(frozen=True)
class Grid:
    """What codes and scales may be: the target's form of a weight format.

    Attributes:
        bits: 2 to 8.
        group_size: columns that share a scale; None means the whole channel.
        symmetric: without zero points.
        scale_dtype: scales are searched among the values that this type can hold.
        signed_scales: the backend takes negative scales.
    """

    bits: int
    group_size: int | None = None
    symmetric: bool = True
    scale_dtype: ScaleDtype = "float32"
    signed_scales: bool = False

    @property
    def range(self) -> tuple[int, int]:
        """Least and greatest code."""
        return code_range(self.bits, symmetric=self.symmetric)

    def groups(self, matrix: torch.Tensor) -> torch.Tensor:
        """A (N, K) matrix as (N, G, g)."""
        return matrix.reshape(matrix.shape[0], -1, self.group_size or matrix.shape[1])

    @property
    def least_scale(self) -> float:
        """The smallest scale that is a normal number in its type, so that rounding it can't give 0."""
        return 2.0**-14 if self.scale_dtype == "float16" else torch.finfo(torch.float32).tiny


def shrink_factors(bits: int) -> tuple[float, ...]:
    """Factors tried, largest first. The more bits, the less there is to win by clipping: over all groups of
    MiniLM the best factor was never below 0.98 with 8 bits and never below 0.80 with 4."""
    lowest, step = (0.9, 0.02) if bits >= 7 else (0.7, 0.02) if bits >= 4 else (0.4, 0.02)
    return tuple(1 - step * index for index in range(round((1 - lowest) / step) + 1))


def stored_scales(scale: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Scales as the backend stores them, kept away from 0 and from infinity."""
    magnitude = scale.abs().clamp(grid.least_scale, torch.finfo(getattr(torch, grid.scale_dtype)).max)
    return round_scale(torch.where(scale < 0, -magnitude, magnitude), grid.scale_dtype)


def _steps(groups: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, grid: Grid) -> torch.Tensor:
    """code - zero_point of each weight, float. groups (N, G, g); scale, zero (N, G)."""
    lowest, highest = grid.range
    steps = groups.div(scale.unsqueeze(-1)).round_()
    if zero is None:
        return steps.clamp_(lowest, highest)
    shift = zero.unsqueeze(-1)
    return torch.clamp(steps, lowest - shift, highest - shift)


def _error(
    groups: torch.Tensor, steps: torch.Tensor, scale: torch.Tensor, importance: torch.Tensor | None
) -> torch.Tensor:
    """Summed squared error of each group, (N, G)."""
    difference = steps.mul(scale.unsqueeze(-1)).sub_(groups).square_()
    return (difference if importance is None else difference.mul_(importance)).sum(-1)


def _starts(groups: torch.Tensor, grid: Grid) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """Scale and zero point of the whole range, one or two to begin from. Each (N, G)."""
    lowest, highest = grid.range
    if not grid.symmetric:
        # 0 stays on the grid: padding, pruned and missing weights must be exact.
        low, high = groups.amin(-1).clamp_max(0), groups.amax(-1).clamp_min(0)
        scale = (high - low) / (highest - lowest)
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        return [(scale, torch.clamp(torch.round(lowest - low / scale), lowest, highest))]
    largest = groups.abs().amax(-1)
    flat = largest == 0
    whole = torch.where(flat, torch.ones_like(largest), largest / highest)
    if -lowest == highest or grid.bits == 8:
        return [(whole, None)]
    extreme = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)).squeeze(-1)
    wide = torch.where(flat, torch.ones_like(largest), extreme / lowest)
    # Without negative scales the spare code serves the groups whose largest weight is negative.
    return [(whole, None), (wide if grid.signed_scales else torch.where(wide > 0, wide, whole), None)]


def _refit(
    groups: torch.Tensor,
    best: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor],
    grid: Grid,
    importance: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Least-squares scales for the codes, new codes for the scales, kept where the error falls."""
    scale, zero, error = best
    for _ in range(REFITS):
        steps = _steps(groups, scale, zero, grid)
        weighted = steps if importance is None else steps * importance
        square = (weighted * steps).sum(-1)
        trial = torch.where(square > 0, (weighted * groups).sum(-1) / square.clamp_min(1e-30), scale)
        # A least-squares scale may change its sign only where every code is 0 or noise: leave those.
        trial = stored_scales(torch.where(trial * scale > 0, trial, scale), grid)
        trial_error = _error(groups, _steps(groups, trial, zero, grid), trial, importance)
        better = trial_error < error
        scale, error = torch.where(better, trial, scale), torch.where(better, trial_error, error)
    return scale, zero


def _search(
    groups: torch.Tensor, grid: Grid, importance: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    best: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor] | None = None
    for start, zero in _starts(groups, grid):
        for factor in shrink_factors(grid.bits):
            scale = stored_scales(start * factor, grid)
            error = _error(groups, _steps(groups, scale, zero, grid), scale, importance)
            if best is None:
                best = (scale, zero, error)
                continue
            better = error < best[2]
            kept_zero = None if zero is None or best[1] is None else torch.where(better, zero, best[1])
            best = (torch.where(better, scale, best[0]), kept_zero, torch.where(better, error, best[2]))
    assert best is not None
    return _refit(groups, best, grid, importance)


def fit_scales(
    matrix: torch.Tensor, grid: Grid, *, search: bool = True, importance: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scales and zero points of a weight.

    Args:
        matrix: (N, K) float32, finite.
        grid: its group size divides K.
        search: look for the least error; otherwise every group's range is that of its weights.
        importance: (K,), not negative: the weight of each column's squared error, for example the mean square
            of its input.

    Returns:
        scale (N, G) float32, representable in the grid's type; zero_point (N, G) int8, None when symmetric. A
        group of zeros gets scale 1.
    """
    groups = grid.groups(matrix)
    if not search:
        start, zero = _starts(groups, grid)[0]
        return stored_scales(start, grid), None if zero is None else zero.to(torch.int8)
    weights = None if importance is None else importance.reshape(groups.shape[1:])
    found = [_search(block, grid, weights) for block in torch.split(groups, max(1, BLOCK // matrix.shape[1]))]
    zeros = [zero for _, zero in found if zero is not None]
    return torch.cat([scale for scale, _ in found]), torch.cat(zeros).to(torch.int8) if zeros else None


def round_to_grid(
    weight: torch.Tensor, grid: Grid, scale: torch.Tensor, zero_point: torch.Tensor | None, axis: int = 0
) -> QuantizedTensor:
    """The nearest codes of a weight of any shape."""
    return quantize_with_scale(
        weight,
        scale,
        bits=grid.bits,
        group_size=grid.group_size or as_matrix(weight, axis).shape[1],
        axis=axis,
        scale_dtype=grid.scale_dtype,
        zero_point=zero_point,
    )
