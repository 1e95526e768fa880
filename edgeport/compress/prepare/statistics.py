"""What SmoothQuant and AWQ share: checks of what calibration gave, and channels that several columns read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from edgeport.errors import BadInputError


def check_channels(weights: Sequence[torch.Tensor], statistic: torch.Tensor, name: str) -> None:
    """Refuse a statistic of a Linear's input that doesn't fit its weights, or is not finite.

    Raises:
        BadInputError: saying which.
    """
    widths = sorted({weight.shape[1] for weight in weights})
    if widths != sorted({*statistic.shape}):
        raise BadInputError(
            f"{name} of the input has shape {tuple(statistic.shape)}, but the weights have {widths} columns.",
            allowed="one statistic of an input that all these weights read",
        )
    if not bool(torch.isfinite(statistic).all()):
        raise BadInputError(
            f"{name} of the input is NaN or infinite.",
            next_step="Check the calibration data and the checkpoint: the float model itself gives such activations.",
        )


def per_channel(values: torch.Tensor, columns: torch.Tensor | None, reduce: Literal["amax", "mean"]) -> torch.Tensor:
    """The greatest or mean value (channels,) of the columns (K,) that read each channel. `columns`: (K,) int64."""
    if columns is None:
        return values
    channels = int(columns.max()) + 1
    return values.new_zeros(channels).scatter_reduce(0, columns, values, reduce, include_self=False)
