"""Round to nearest, with a scale searched for the least squared error.

Absolute-maximum scaling spends the whole grid on the largest weight. Shrinking the range a little clips
that weight and rounds all others more finely; the best shrink factor is searched on a fixed grid for
every group at once, as in the clip search of AWQ (https://arxiv.org/abs/2306.00978, section 3) without
activations. Data-free and deterministic.
"""

from __future__ import annotations

import torch

from edgeport.quantized import QuantizedTensor, ScaleDtype, as_matrix, quantize_with_scale, round_scale

SHRINK_STEPS = 40
"""Shrink factors tried: 1.0 down to 0.6 in steps of 0.01. Below 0.7 nothing has won on 4 bits or more."""


def _squared_error(groups: torch.Tensor, scale: torch.Tensor, limit: int) -> torch.Tensor:
    """Summed squared rounding error of each group. groups (N, G, g), scale (N, G) -> (N, G)."""
    codes = torch.clamp(torch.round(groups / scale.unsqueeze(-1)), -limit, limit)
    return (codes * scale.unsqueeze(-1) - groups).square().sum(-1)


def quantize_rtn(
    weight: torch.Tensor,
    *,
    bits: int,
    group_size: int | None,
    axis: int = 0,
    scale_dtype: ScaleDtype = "float32",
    scale_search: bool = True,
) -> QuantizedTensor:
    """Quantize one weight symmetrically.

    Args:
        weight: float tensor with at least two dimensions.
        bits: 2 to 8.
        group_size: columns that share a scale; None means the whole channel.
        scale_dtype: scales are searched among the values that this type can hold.
        scale_search: search the shrink factor; otherwise scale = max|w| / (2**(bits-1) - 1).

    Returns:
        Codes in the weight's shape. A group of zeros gets scale 1 and codes 0.
    """
    matrix = as_matrix(weight.detach().to(torch.float32), axis)
    size = group_size or matrix.shape[1]
    groups = matrix.reshape(matrix.shape[0], -1, size)
    limit = 2 ** (bits - 1) - 1
    largest = groups.abs().amax(-1)
    # The smallest scale that is a normal number in every scale type, so that rounding it can't give 0.
    floor = 2.0**-14 if scale_dtype == "float16" else torch.finfo(torch.float32).tiny
    base = torch.where(largest > 0, largest / limit, torch.ones_like(largest)).clamp_min(floor)
    best = round_scale(base, scale_dtype)
    if scale_search:
        error = _squared_error(groups, best, limit)
        for step in range(1, SHRINK_STEPS + 1):
            trial = round_scale((base * (1 - 0.01 * step)).clamp_min(floor), scale_dtype)
            trial_error = _squared_error(groups, trial, limit)
            better = trial_error < error
            best = torch.where(better, trial, best)
            error = torch.where(better, trial_error, error)
    return quantize_with_scale(weight, best, bits=bits, group_size=size, axis=axis, scale_dtype=scale_dtype)
