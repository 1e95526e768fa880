"""Palettes for what a layer's output loses: GPTQ's compensation, then entries and codes fitted in turn.

Clustering (`palette.py`) places entries where the weights are. With H the second moment of the layer's inputs the
error that counts is tr(D H D^T), D = Q - W, and three steps lower it:

1. columns are rounded to the nearest entry one after the other, each leaving its error to those that follow
   (`gptq.py`; GPTVQ, https://arxiv.org/abs/2402.15319, does so with codebooks of vectors);
2. for these codes the best entries v of a palette solve a linear system, the least squares of

       sum over its channels n of  |C_n v - w_n|^2_H,     C_n the choice of entries by codes, (K, E)

   by conjugate gradients: one product with H a step, and no matrix of entries by entries;
3. for these entries the best code of one column, all others given, is the entry nearest to w_j - (D H)_j / H_jj
   as in `refine.py`.

A palette keeps a change only when its error fell.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from edgeport.compress.quantize.gptq import Round, column_importance, compensated
from edgeport.compress.quantize.palette import nearest_entries, quantize_palette, stored_entries
from edgeport.compress.quantize.refine import damped_second, swept_codes
from edgeport.quantized import QuantizedTensor, ScaleDtype, as_matrix, from_matrix

STEPS = 12
"""Steps of conjugate gradients: enough for the optimum of a 3-bit palette. Larger ones stop short of it, at entries
that the new codes move again."""


def _nearest(palette: torch.Tensor) -> Round:
    """Rounds the values of a column, (N,), each to the nearest entry of its channel's palette. palette (P, E)."""

    def rounded(_column: int, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        codes = nearest_entries(values.reshape(palette.shape[0], -1).contiguous(), palette)
        return codes.flatten().float(), palette.gather(1, codes.long()).flatten()

    return rounded


def best_entries(
    palette: torch.Tensor, codes: torch.Tensor, target: torch.Tensor, second: torch.Tensor
) -> torch.Tensor:
    """The entries of least error for given codes, (P, E), by conjugate gradients from those at hand.

    Args:
        codes: (P, n) int64, n the weights of a palette's channels.
        target: (N, K), the float weight.
    """

    def gathered(values: torch.Tensor) -> torch.Tensor:
        """Summed over the weights that have an entry: (N, K) -> (P, E)."""
        return torch.zeros_like(palette).scatter_add_(1, codes, values.reshape(codes.shape))

    def product(entries: torch.Tensor) -> torch.Tensor:
        """sum_n C_n^T H C_n v: (P, E) -> (P, E)."""
        return gathered(entries.gather(1, codes).reshape(target.shape) @ second)

    mass = gathered(second.diagonal().expand(target.shape)).clamp_min(1e-30)
    found, residual = palette, gathered(target @ second) - product(palette)
    direction = residual / mass
    energy = (residual * direction).sum(1, keepdim=True)
    for _ in range(STEPS):
        moved = product(direction)
        length = energy / (direction * moved).sum(1, keepdim=True).clamp_min(1e-30)
        found, residual = found + length * direction, residual - length * moved
        following = (residual * residual / mass).sum(1, keepdim=True)
        direction = residual / mass + following / energy.clamp_min(1e-30) * direction
        energy = following
    return torch.where(torch.isfinite(found), found, palette)


def fit_palette(tensor: QuantizedTensor, weight: torch.Tensor, second: torch.Tensor, *, rounds: int) -> QuantizedTensor:
    """The same weight with entries and codes that change the layer's output less.

    Args:
        tensor: a palette's form.
        weight: the float weight, in its own shape.
        second: (K, K) float32, the sum of x x^T over the layer's inputs.
        rounds: of entries, then codes.

    Returns:
        A weight whose error tr(D H D^T) is no larger, for the channels of any palette; palettes ascending.
    """
    assert tensor.palette is not None
    target, second = as_matrix(weight.detach().to(torch.float32), tensor.axis), damped_second(second)
    palette = tensor.palette
    codes = as_matrix(tensor.codes, tensor.axis).reshape(palette.shape[0], -1).long()

    def change(palette: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        return palette.gather(1, codes).reshape(target.shape) - target

    def errors(change: torch.Tensor) -> torch.Tensor:
        """tr(D H D^T) of the channels of each palette, (P, 1)."""
        return (change @ second).mul_(change).reshape(palette.shape[0], -1).sum(1, keepdim=True)

    error = errors(change(palette, codes))
    for _ in range(rounds):
        entries, order = stored_entries(best_entries(palette, codes, target, second), tensor.scale_dtype).sort(1)
        renamed = order.argsort(1).gather(1, codes)
        trial = errors(change(entries, renamed))
        palette = torch.where(trial < error, entries, palette)
        codes = torch.where(trial < error, renamed, codes)
        error = torch.minimum(error, trial)
        swept = swept_codes(
            codes.reshape(target.shape).float(), change(palette, codes), target, second, _nearest(palette)
        )
        renamed = swept.long().reshape(codes.shape)
        trial = errors(change(palette, renamed))
        codes = torch.where(trial < error, renamed, codes)
        error = torch.minimum(error, trial)
    stored = codes.to(torch.uint8).reshape(target.shape)
    return replace(tensor, codes=from_matrix(stored, tensor.codes.shape, tensor.axis), palette=palette)


def quantize_fitted_palette(
    weight: torch.Tensor,
    second: torch.Tensor,
    *,
    bits: int,
    group_size: int | None,
    axis: int = 0,
    scale_dtype: ScaleDtype,
    act_order: bool = True,
    damping: float = 0.01,
    rounds: int = 2,
) -> QuantizedTensor:
    """Replace a weight's values by palette entries so that the layer's output changes least.

    Args:
        weight, bits, group_size, axis, scale_dtype: as `quantize_palette` takes them.
        second, act_order, damping: as `quantize_gptq` takes them.
        rounds: see `fit_palette`.

    Raises:
        BadInputError: the channels can't be cut into such groups.
    """
    clustered = quantize_palette(
        weight,
        bits=bits,
        group_size=group_size,
        axis=axis,
        scale_dtype=scale_dtype,
        importance=column_importance(second),
    )
    assert clustered.palette is not None
    matrix = as_matrix(weight.detach().to(torch.float32), axis)
    codes = compensated(matrix, second, _nearest(clustered.palette), act_order=act_order, damping=damping)
    rounded = replace(clustered, codes=from_matrix(codes.to(torch.uint8), weight.shape, axis))
    return fit_palette(rounded, weight, second, rounds=rounds)
