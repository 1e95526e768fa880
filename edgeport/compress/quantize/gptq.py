"""GPTQ: round a column, let the columns that follow make up for the error.

Frantar et al. 2022 (https://arxiv.org/abs/2210.17323). With H the second moment of the layer's inputs, damped,
and U the upper Cholesky factor of its inverse, column i of W is rounded, and its error

    e = (w_i - q_i) / U_ii

is taken from the later columns, W_j -= e U_ij. Columns go in blocks of 128, so that most of the work is matrix
products. With act-order the columns with the largest inputs come first. Scales are searched beforehand on the
weight as it is, each column's error weighted by its input's energy ("static groups"): the order then changes
nothing in how the weight is stored.
"""

from __future__ import annotations

import torch

from edgeport.compress.quantize.grid import Grid, fit_scales
from edgeport.quantized import QuantizedTensor, as_matrix, from_matrix

BLOCK = 128


def inverse_factor(second: torch.Tensor, damping: float) -> torch.Tensor:
    """U, upper triangular with H^-1 = U^T U, for the damped H. (K, K) float32 from (K, K) float32.

    Args:
        damping: added to the diagonal, relative to its mean; ten times more as long as H is not positive definite.
    """
    diagonal = second.diagonal()
    mean = float(diagonal.mean()) or 1.0
    amount = damping
    while True:
        damped = second.to(torch.float64) + torch.diag(torch.full_like(diagonal, amount * mean)).to(torch.float64)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            inverse = torch.cholesky_inverse(factor)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not int(failed):
                found: torch.Tensor = upper.to(torch.float32)
                return found
        amount *= 10


def quantize_gptq(
    weight: torch.Tensor,
    second: torch.Tensor,
    grid: Grid,
    *,
    axis: int = 0,
    act_order: bool = True,
    damping: float = 0.01,
) -> QuantizedTensor:
    """Quantize one weight so that the layer's output changes least.

    Args:
        weight: float tensor with at least two dimensions, (N, K) when flattened.
        second: (K, K) float32, the sum of x x^T over the layer's inputs. A column that is always 0 in them is
            rounded to the nearest code.
        act_order: columns in descending order of their inputs' energy.
        damping: see `inverse_factor`.
    """
    matrix = as_matrix(weight.detach().to(torch.float32), axis).clone()
    rows, columns = matrix.shape
    energy = second.diagonal()
    # An input that is always 0 says nothing about its column; 1 keeps H invertible and the column its own.
    hessian = second + torch.diag((energy == 0).to(second.dtype) * max(float(energy.mean()), 1e-30))
    importance = energy / energy.mean().clamp_min(1e-30) + 1e-6
    scale, zero = fit_scales(matrix, grid, importance=importance)
    size = grid.group_size or columns
    lowest, highest = grid.range
    column_scale = scale.repeat_interleave(size, 1)
    column_zero = torch.zeros_like(column_scale) if zero is None else zero.to(torch.float32).repeat_interleave(size, 1)

    order = torch.argsort(energy, descending=True, stable=True) if act_order else torch.arange(columns)
    matrix, column_scale, column_zero = matrix[:, order], column_scale[:, order], column_zero[:, order]
    factor = inverse_factor(hessian[order][:, order], damping)
    codes = torch.empty_like(matrix)
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        block, errors = matrix[:, start:stop], torch.empty(rows, stop - start)
        for offset in range(stop - start):
            index = start + offset
            value, step, shift = block[:, offset], column_scale[:, index], column_zero[:, index]
            code = torch.clamp(torch.round(value / step) + shift, lowest, highest)
            codes[:, index] = code
            error = (value - (code - shift) * step) / factor[index, index]
            block[:, offset:] -= torch.outer(error, factor[index, index:stop])
            errors[:, offset] = error
        matrix[:, stop:] -= errors @ factor[start:stop, stop:]
    restored = torch.empty_like(codes)
    restored[:, order] = codes
    return QuantizedTensor(
        codes=from_matrix(restored.to(torch.int8), weight.shape, axis),
        scale=scale,
        zero_point=zero,
        bits=grid.bits,
        group_size=size,
        axis=axis,
        scale_dtype=grid.scale_dtype,
    )
