"""Round to nearest, on scales searched for the least squared error (`grid.py`). Data-free and deterministic."""

from __future__ import annotations

import torch

from edgeport.compress.quantize.grid import Grid, fit_scales, round_to_grid
from edgeport.quantized import QuantizedTensor, as_matrix


def quantize_rtn(
    weight: torch.Tensor,
    grid: Grid,
    *,
    axis: int = 0,
    scale_search: bool = True,
    importance: torch.Tensor | None = None,
) -> QuantizedTensor:
    """Quantize one weight.

    Args:
        weight: float tensor with at least two dimensions.
        grid: see `Grid`; its group size divides the weights of a channel.
        scale_search, importance: see `fit_scales`.

    Returns:
        Codes in the weight's shape. A group of zeros gets scale 1 and codes 0 (its zero point when asymmetric).
    """
    matrix = as_matrix(weight.detach().to(torch.float32), axis)
    scale, zero_point = fit_scales(matrix, grid, search=scale_search, importance=importance)
    return round_to_grid(weight, grid, scale, zero_point, axis)
