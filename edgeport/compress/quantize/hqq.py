"""HQQ: a grid whose error is sparse, found without data.

Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", 2023
(https://mobiusml.github.io/hqq_blog/). The error |W - Q|_p with p < 1 lets a few weights be far off and keeps
the many close, where least squares spends the grid on outliers. It is split in two by an auxiliary E,

    E = shrink(W - Q),    shrink(d) = sign(d) max(|d| - |d|^(p-1) / beta, 0)

and the zero point that fits W - E to the codes is a mean, z = mean(code - (W - E) / s); beta grows. The method
leaves z a float. Backends store whole zero points, which moves of less than half a step do not change: so the
scale is refitted as well, s = <code - z, W - E> / <code - z, code - z>; that is all there is to move on a
symmetric grid. Each round is judged as it would be stored, and the best round of each group stays.
"""

from __future__ import annotations

import torch

from edgeport.compress.quantize.grid import BLOCK, Grid, fit_scales, round_to_grid, stored_scales
from edgeport.quantized import QuantizedTensor, as_matrix

ROUNDS, P, BETA, GROWTH = 20, 0.7, 10.0, 1.01
"""The reference implementation's: rounds, norm, beta of the first round and its growth from round to round."""


def _shrink(difference: torch.Tensor, beta: float) -> torch.Tensor:
    size = difference.abs()
    return difference.sign() * (size - size.clamp_min(1e-12).pow(P - 1) / beta).clamp_min(0)


def _solve(
    groups: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, grid: Grid
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Better scales or zero points. groups (N, G, g); scale, zero (N, G)."""
    lowest, highest = grid.range
    # beta is no number of the weights' size: errors are counted in steps of the grid.
    unit = scale.abs().unsqueeze(-1)
    values, step = groups / unit, scale.unsqueeze(-1) / unit
    shift = torch.zeros_like(step) if zero is None else zero.unsqueeze(-1)

    def error(step: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        codes = torch.clamp(torch.round(values / step) + shift, lowest, highest)
        return (values - (codes - shift) * step).abs().pow(P).sum(-1, keepdim=True)

    best, least = (step, shift), error(step, shift)
    beta = BETA
    for _ in range(ROUNDS):
        codes = torch.clamp(torch.round(values / step + shift), lowest, highest)
        kept = values - _shrink(values - (codes - shift) * step, beta)
        if zero is not None:
            shift = (codes - kept / step).mean(-1, keepdim=True)
        whole = shift.round().clamp(lowest, highest)
        steps = codes - whole
        square = (steps * steps).sum(-1, keepdim=True)
        fitted = (steps * kept).sum(-1, keepdim=True) / square.clamp_min(1)
        step = torch.where((square > 0) & (fitted * step > 0), fitted, step)
        trial = (stored_scales((step * unit).squeeze(-1), grid).unsqueeze(-1) / unit, whole)
        found = error(*trial)
        better = found < least
        best = (torch.where(better, trial[0], best[0]), torch.where(better, trial[1], best[1]))
        least = torch.minimum(found, least)
        beta *= GROWTH
    found_scale = stored_scales((best[0] * unit).squeeze(-1), grid)
    return found_scale, None if zero is None else best[1].squeeze(-1)


def quantize_hqq(weight: torch.Tensor, grid: Grid, *, axis: int = 0) -> QuantizedTensor:
    """Quantize one weight.

    Args:
        weight: float tensor with at least two dimensions.
        grid: see `Grid`; its group size divides the weights of a channel.
    """
    matrix = as_matrix(weight.detach().to(torch.float32), axis)
    scale, zero = fit_scales(matrix, grid)
    rows = max(1, BLOCK // matrix.shape[1])
    zeros = [None] * len(torch.split(scale, rows)) if zero is None else torch.split(zero.to(torch.float32), rows)
    blocks = zip(torch.split(grid.groups(matrix), rows), torch.split(scale, rows), zeros, strict=True)
    solved = [_solve(block, start, shift, grid) for block, start, shift in blocks]
    moved = [shift for _, shift in solved if shift is not None]
    zero_point = torch.cat(moved).to(torch.int8) if moved else None
    return round_to_grid(weight, grid, torch.cat([found for found, _ in solved]), zero_point, axis)
