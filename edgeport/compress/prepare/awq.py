"""AWQ: scale up the columns that large activations multiply, so that rounding harms them less.

`s = mean|x|^α`, α searched on a grid for the least error of the outputs, section 3.2 of
https://arxiv.org/abs/2306.00978. With the second moment H = E[x xᵀ] of the input the error needs no data:

    E ||(Q(W s) / s - W) x||² = tr(D H Dᵀ),  D = Q(W s) / s - W.

α = 0 is s = 1, so the error is never above that of leaving the weights alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from edgeport.compress.prepare.statistics import check_channels, per_channel
from edgeport.compress.quantize.grid import Grid
from edgeport.compress.quantize.rtn import quantize_rtn
from edgeport.quantized import dequantize

ALPHAS = tuple(step / 20 for step in range(20))
"""0, 0.05, ... 0.95."""

LEAST = 1e-4
"""Least scale before normalisation, as in the authors' code."""


def scaled_error(
    weights: Sequence[torch.Tensor],
    second_moment: torch.Tensor,
    scale: torch.Tensor,
    grid: Grid,
    *,
    scale_search: bool = True,
    weighted: bool = True,
) -> float:
    """tr(D H Dᵀ), summed over the weights, with D = Q(W s) / s - W.

    Args:
        weights: of the Linears that share an input, each (N_i, K).
        second_moment: (K, K), H.
        scale: (K,), s, positive.
        grid: what Q rounds to; its group size divides K.
        scale_search: see `quantize_rtn`.
        weighted: the search for the grid's scales weighs each column by its share of the error, H_jj / s_j².
    """
    importance = second_moment.diagonal() / scale.square() if weighted else None
    total = 0.0
    for weight in weights:
        scaled = weight.detach().to(torch.float32) * scale
        rounded = dequantize(quantize_rtn(scaled, grid, scale_search=scale_search, importance=importance))
        difference = (rounded - scaled) / scale
        total += float(((difference @ second_moment) * difference).sum(dtype=torch.float64))
    return total


def awq_scale(
    weights: Sequence[torch.Tensor],
    second_moment: torch.Tensor,
    mean_abs: torch.Tensor,
    grid: Grid,
    *,
    columns: torch.Tensor | None = None,
    scale_search: bool = True,
    weighted: bool = True,
    rows: int | None = None,
) -> torch.Tensor:
    """The factors to fold across a pair (`fold.scale_pair`).

    Args:
        weights, second_moment, grid, scale_search, weighted: see `scaled_error`; how the weights will be quantized
            afterwards is how the error should be measured here.
        mean_abs: (K,), the mean |x| of each input channel, or the sum: a common factor changes nothing.
        columns: `Pair.columns`: the channel that each column reads; None when each has its own.
        rows: α is chosen on this many evenly spaced rows of each weight, and kept only if it lowers the error of
            all of them; None means all.

    Returns:
        Positive float32 (channels,), with the least error on the grid of α; all 1 if no α > 0 lowers it.

    Raises:
        BadInputError: a statistic has another size than the weights' columns, or is not finite.
    """
    check_channels(weights, mean_abs, "mean |x|")
    check_channels(weights, second_moment, "the second moment")
    activation = per_channel(mean_abs.to(torch.float32), columns, "mean")
    activation = activation / activation.mean().clamp_min(torch.finfo(torch.float32).tiny)
    moment = second_moment.to(torch.float32)

    def error(some: Sequence[torch.Tensor], factors: torch.Tensor) -> float:
        spread = factors if columns is None else factors[columns]
        return scaled_error(some, moment, spread, grid, scale_search=scale_search, weighted=weighted)

    sample = weights if rows is None else [weight[:: -(-weight.shape[0] // rows)] for weight in weights]
    ones = torch.ones_like(activation)
    best, least = ones, float("inf")
    for alpha in ALPHAS:
        scale = (activation**alpha).clamp_min(LEAST)
        scale = scale / (scale.max() * scale.min()).sqrt()
        found = error(sample, scale)
        if found < least:
            best, least = scale, found
    if rows is not None and error(weights, best) > error(weights, ones):
        return ones
    return best
