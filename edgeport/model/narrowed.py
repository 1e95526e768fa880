"""Layers of a conv net with fewer channels than the code that makes it gives them: their sizes, and making them so."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from edgeport.errors import BadInputError

Sizes = tuple[int, int, int]
"""Channels that a layer gives, channels that it takes, and groups."""


def layer_sizes(layer: torch.nn.Module) -> Sizes | None:
    """The sizes of a convolution, a Linear layer or a batch norm; None for others."""
    if isinstance(layer, torch.nn.Conv1d | torch.nn.Conv2d):
        return layer.out_channels, layer.in_channels, layer.groups
    if isinstance(layer, torch.nn.Linear):
        return layer.out_features, layer.in_features, 1
    if isinstance(layer, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d):
        return layer.num_features, layer.num_features, layer.num_features
    return None


def narrowed_layers(module: torch.nn.Module, whole: torch.nn.Module) -> dict[str, Sizes]:
    """The sizes of every layer that has others than the layer of its name in `whole`."""
    before = {name: layer_sizes(layer) for name, layer in whole.named_modules()}
    after = {name: layer_sizes(layer) for name, layer in module.named_modules()}
    return {name: size for name, size in after.items() if size is not None and before.get(name) not in (None, size)}


def narrow(module: torch.nn.Module, sizes: Mapping[str, Sizes]) -> None:
    """Give layers other sizes, in place; their values are then no one's.

    Raises:
        BadInputError: the module has no such layer, or it can't have these sizes.
    """
    for name, (rows, columns, groups) in sizes.items():
        layer: Any = dict(module.named_modules()).get(name)
        if layer is None or layer_sizes(layer) is None:
            raise BadInputError(f"{type(module).__name__} has no layer {name!r} to narrow.", where="edgeport.json")
        if min(rows, columns, groups) < 1 or columns % groups or rows % groups:
            raise BadInputError(
                f"{name} can't have {rows} of {columns} channels in {groups} groups.", where="edgeport.json"
            )
        if isinstance(layer, torch.nn.Linear):
            layer.out_features, layer.in_features = rows, columns
            shape: tuple[int, ...] = (rows, columns)
        elif isinstance(layer, torch.nn.Conv1d | torch.nn.Conv2d):
            layer.out_channels, layer.in_channels, layer.groups = rows, columns, groups
            shape = (rows, columns // groups, *layer.kernel_size)
        else:
            layer.num_features = rows
            shape = (rows,)
        for leaf, value in layer.named_parameters(recurse=False):
            empty = torch.zeros(shape if leaf == "weight" else (rows,), dtype=value.dtype)
            setattr(layer, leaf, torch.nn.Parameter(empty, requires_grad=False))
        for leaf, value in layer.named_buffers(recurse=False):
            if value.ndim == 1:
                setattr(layer, leaf, torch.zeros(rows, dtype=value.dtype))
