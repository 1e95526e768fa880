"""SmoothQuant: share the difficulty of quantizing between activations and weights.

`s_j = max|X_j|^α / max|W_j|^(1-α)`, eq. 4 of https://arxiv.org/abs/2211.10438: what feeds the Linears is divided by
s, their columns are multiplied by it (`fold.scale_pair`). The greater alpha, the flatter the activations.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from edgeport.compress.prepare.statistics import check_channels, per_channel

LEAST = 1e-5
"""Least scale and least column, as in the authors' code: a channel that is always 0 must not be divided by 0."""


def smooth_scale(
    weights: Sequence[torch.Tensor],
    max_abs: torch.Tensor,
    alpha: float = 0.5,
    *,
    columns: torch.Tensor | None = None,
) -> torch.Tensor:
    """The factors to fold across a pair.

    Args:
        weights: of the Linears that share an input, each (N_i, K).
        max_abs: (K,), the largest |x| of each input channel over the calibration data.
        alpha: 0 to 1. The paper takes 0.5, and 0.8 to 0.9 where activations are harder (Llama, Mistral).
        columns: `Pair.columns`: the channel that each column reads; None when each has its own.

    Returns:
        Positive float32 (channels,).

    Raises:
        BadInputError: `max_abs` has another length than the weights have columns, or is not finite.
    """
    check_channels(weights, max_abs, "max|x|")
    largest = torch.stack([weight.detach().to(torch.float64).abs().amax(0) for weight in weights]).amax(0)
    activation = per_channel(max_abs.to(torch.float64), columns, "amax")
    weight = per_channel(largest, columns, "amax").clamp_min(LEAST)
    return (activation**alpha / weight ** (1 - alpha)).clamp_min(LEAST).to(torch.float32)
