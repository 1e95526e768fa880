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

from collections.abc import Callable

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


Round = Callable[[int, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""(column, (N,) values) -> their codes and what these stand for, each (N,) float32."""


def compensated(
    matrix: torch.Tensor, second: torch.Tensor, rounded: Round, *, act_order: bool, damping: float
) -> torch.Tensor:
    """The codes of a weight's columns, each rounded after those before it left their errors to it. (N, K) float32.

    Args:
        matrix: (N, K) float32.
        second, act_order, damping: as in `quantize_gptq`.
        rounded: rounds the values of one column.
    """
    columns = matrix.shape[1]
    energy = second.diagonal()
    # An input that is always 0 says nothing about its column; 1 keeps H invertible and the column its own.
    hessian = second + torch.diag((energy == 0).to(second.dtype) * max(float(energy.mean()), 1e-30))
    order = torch.argsort(energy, descending=True, stable=True) if act_order else torch.arange(columns)
    matrix = matrix[:, order]
    factor = inverse_factor(hessian[order][:, order], damping)
    codes = torch.empty_like(matrix)
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        block, errors = matrix[:, start:stop], torch.empty(matrix.shape[0], stop - start)
        for offset in range(stop - start):
            index, column = start + offset, int(order[start + offset])
            value = block[:, offset]
            codes[:, column], rounding = rounded(column, value)
            error = (value - rounding) / factor[index, index]
            block[:, offset:] -= torch.outer(error, factor[index, index:stop])
            errors[:, offset] = error
        matrix[:, stop:] -= errors @ factor[start:stop, stop:]
    return codes


def column_importance(second: torch.Tensor) -> torch.Tensor:
    """The weight of each column's squared error: its input's energy, 1 on average. (K,), nowhere 0."""
    energy = second.diagonal()
    return energy / energy.mean().clamp_min(1e-30) + 1e-6


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
    matrix = as_matrix(weight.detach().to(torch.float32), axis)
    scale, zero = fit_scales(matrix, grid, importance=column_importance(second))
    size = grid.group_size or matrix.shape[1]
    lowest, highest = grid.range
    shifts = torch.zeros_like(scale) if zero is None else zero.to(torch.float32)

    def rounded(column: int, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        step, shift = scale[:, column // size], shifts[:, column // size]
        codes = torch.clamp(torch.round(values / step) + shift, lowest, highest)
        return codes, (codes - shift) * step

    codes = compensated(matrix, second, rounded, act_order=act_order, damping=damping)
    return QuantizedTensor(
        codes=from_matrix(codes.to(torch.int8), weight.shape, axis),
        scale=scale,
        zero_point=zero,
        bits=grid.bits,
        group_size=size,
        axis=axis,
        scale_dtype=grid.scale_dtype,
    )
