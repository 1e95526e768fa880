"""Move factors across a `Pair`: out of the producer's channels, into the consumers' columns.

Scaling (SmoothQuant, https://arxiv.org/abs/2211.10438, eq. 3): `(x / s) (s W)`. Mixing the channels of a head by
an orthogonal matrix (QuaRot, https://arxiv.org/abs/2404.00456, section 4): `(x R) (Rᵀ W)`. Both change weights in
place and are computed in float64.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from edgeport.compress.prepare.pair import Pair
from edgeport.errors import BadInputError


def parameters_of(module: torch.nn.Module) -> Mapping[str, torch.nn.Parameter]:
    """Every parameter under each of its names."""
    return dict(module.named_parameters(remove_duplicate=False))


def _producer(parameters: Mapping[str, torch.nn.Parameter], pair: Pair) -> list[torch.nn.Parameter]:
    return [parameters[name] for name in (pair.weight, pair.bias) if name is not None]


@torch.no_grad()
def scale_pair(module: torch.nn.Module, pair: Pair, scale: torch.Tensor) -> None:
    """Divide the producer's channels by `scale` and multiply the consumers' columns by it, in place.

    Args:
        module: a copy: the caller's own.
        scale: (pair.channels,), finite, not zero.

    Raises:
        BadInputError: the scale has another shape, or values that can't be divided by.
    """
    if scale.shape != (pair.channels,) or not bool((torch.isfinite(scale) & (scale != 0)).all()):
        raise BadInputError(
            f"A scale of shape {tuple(scale.shape)}, {scale.min():.3g} to {scale.max():.3g}, can't be folded.",
            where=pair.weight,
            allowed=f"{pair.channels} finite factors, none of them zero",
        )
    parameters, factor = parameters_of(module), scale.to(torch.float64)
    for parameter in _producer(parameters, pair):
        part = parameter[slice(*pair.rows)]
        offset = pair.offset if parameter is parameters[pair.weight] else 0.0
        shape = (-1, *[1] * (part.dim() - 1))
        part.copy_((part.to(torch.float64) + offset) / factor.reshape(shape) - offset)
    for name in pair.consumers:
        parameters[name].copy_(parameters[name].to(torch.float64) * factor[pair.columns])


@torch.no_grad()
def mix_heads(module: torch.nn.Module, pair: Pair, rotation: torch.Tensor) -> None:
    """Rotate the channels within every head, and the consumers' columns back, in place.

    Args:
        module: a copy: the caller's own.
        pair: of kind "heads".
        rotation: orthogonal, (head_dim, head_dim): a head's values x, as a row, become x R.
    """
    if pair.head_dim is None:
        raise ValueError(f"{pair.weight}: a {pair.kind} pair has no heads to mix")
    parameters, matrix = parameters_of(module), rotation.to(torch.float64)
    for parameter in _producer(parameters, pair):
        part = parameter[slice(*pair.rows)]
        heads = part.to(torch.float64).reshape(-1, pair.head_dim, part.numel() // part.shape[0])
        part.copy_((matrix.T @ heads).reshape(part.shape))
    for name in pair.consumers:
        weight = parameters[name]
        heads = weight.to(torch.float64).reshape(weight.shape[0], -1, pair.head_dim)
        weight.copy_((heads @ matrix).reshape(weight.shape))


@torch.no_grad()
def fuse_norm(module: torch.nn.Module, pair: Pair) -> None:
    """Move a normalisation's weight and bias into its consumers, in place: `W (g u + b) = (W g) u + W b`.

    Afterwards it multiplies by 1 and adds 0. A consumer without a bias gets one if there is one to take over.

    Args:
        module: a copy: the caller's own.
        pair: of kind "norm".
    """
    parameters = parameters_of(module)
    norm = parameters[pair.weight]
    gain = norm.to(torch.float64) + pair.offset
    bias = None if pair.bias is None else parameters[pair.bias]
    for name in pair.consumers:
        weight = parameters[name].to(torch.float64)
        if bias is not None and bool(bias.any()):
            layer = name.removesuffix(".weight")
            own = parameters.get(f"{layer}.bias")
            added = weight @ bias.to(torch.float64) + (0 if own is None else own)
            module.get_submodule(layer).bias = torch.nn.Parameter(added.to(norm.dtype), norm.requires_grad)
        parameters[name].copy_(weight * gain)
    norm.fill_(1 - pair.offset)
    if bias is not None:
        bias.zero_()
