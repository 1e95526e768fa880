"""Normalisations (coremltools `normalization.py`)."""

from __future__ import annotations

import torch
from torch.nn import functional

from edgeport.runtime.coreml.ops.arguments import Operators, Tensor, along, axes_of


def batch_norm(
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: Tensor | float = 1e-5,
) -> Tensor:
    """gamma * (x - mean) / sqrt(variance + epsilon) + beta, per channel of axis 1."""
    out = (x - along(mean, 1, x.ndim)) / along(torch.sqrt(variance + epsilon), 1, x.ndim)
    return _scale_shift(out, gamma, beta)


def instance_norm(
    x: Tensor, gamma: Tensor | None = None, beta: Tensor | None = None, epsilon: Tensor | float = 1e-5
) -> Tensor:
    """Batch norm with the mean and variance of each sample's channel over its spatial axes; x (n, C, *D)."""
    return _scale_shift(_standardise(x, list(range(2, x.ndim)), epsilon), gamma, beta)


def layer_norm(
    x: Tensor,
    axes: Tensor | None = None,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: Tensor | float = 1e-5,
) -> Tensor:
    """gamma * (x - E[x]) / sqrt(Var[x] + epsilon) + beta over `axes`; gamma and beta have the shape of those axes."""
    chosen = sorted(axes_of(axes, x.ndim))
    if chosen == list(range(x.ndim - len(chosen), x.ndim)):
        return functional.layer_norm(x, [x.shape[axis] for axis in chosen], gamma, beta, float(epsilon))
    out = _standardise(x, chosen, epsilon)
    shape = [size if axis in chosen else 1 for axis, size in enumerate(x.shape)]
    if gamma is not None:
        out = out * gamma.reshape(shape)
    return out if beta is None else out + beta.reshape(shape)


def l2_norm(x: Tensor, epsilon: Tensor | float = 1e-6) -> Tensor:
    """x / sqrt(sum(x^2) + epsilon) over the last three axes."""
    return x / torch.sqrt(torch.sum(x * x, dim=(-3, -2, -1), keepdim=True) + epsilon)


def _standardise(x: Tensor, axes: list[int], epsilon: Tensor | float) -> Tensor:
    centred = x - torch.mean(x, dim=axes, keepdim=True)
    return centred * torch.rsqrt(torch.mean(centred * centred, dim=axes, keepdim=True) + epsilon)


def _scale_shift(x: Tensor, gamma: Tensor | None, beta: Tensor | None) -> Tensor:
    if gamma is not None:
        x = x * along(gamma, 1, x.ndim)
    return x if beta is None else x + along(beta, 1, x.ndim)


OPERATORS: Operators = {
    "batch_norm": batch_norm,
    "instance_norm": instance_norm,
    "l2_norm": l2_norm,
    "layer_norm": layer_norm,
}
