"""Solve the weights of a narrowed conv net again, so that what its layers give is what they gave before.

He, Zhang & Sun 2017, "Channel Pruning for Accelerating Very Deep Neural Networks" (https://arxiv.org/abs/1707.06168),
section 3.1: with x the inputs of a layer in the narrowed net and y its outputs in the whole one, the weights that are
left change by D to make ||y - (W + D) x||^2 + r ||D||^2 least, which is D = (y - W x) x^T (x x^T + r I)^-1. Layers go
in the order in which they run, each on what the solved ones before it give. No gradient, no step size: one solution.
A layer that the inputs show fewer vectors than it has weights for one output (a classifier behind a pooling, on a few
pictures) would learn them by heart, and stays as it is.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import Any

import torch
from torch.nn import functional

from edgeport.compress.chain import call
from edgeport.model.types import Model

RIDGE = 0.1
"""r, relative to the mean of the diagonal of x x^T: directions that few inputs have keep their weights."""

WIDEST = 8192
"""Weights of one output beyond which a layer is left as it is: x x^T would take more than half a gigabyte."""

Layer = torch.nn.Linear | torch.nn.Conv1d | torch.nn.Conv2d
Inputs = Sequence[Mapping[str, torch.Tensor]]


def _columns(layer: Layer, value: torch.Tensor) -> torch.Tensor:
    """What each group of a layer multiplies, float64 (groups, K, positions)."""
    if isinstance(layer, torch.nn.Linear):
        return value.reshape(-1, value.shape[-1]).T[None].double()
    kernel, stride, padding, dilation = (
        tuple(each) if len(each) == 2 else (1 if name != "padding" else 0, *each)
        for name, each in (
            ("kernel", layer.kernel_size),
            ("stride", layer.stride),
            ("padding", layer.padding),
            ("dilation", layer.dilation),
        )
    )
    pictures = value if value.ndim == 4 else value[:, :, None]
    found = functional.unfold(pictures, kernel, dilation, padding, stride)  # type: ignore[arg-type]
    batch, rows, positions = found.shape
    grouped = found.reshape(batch, layer.groups, rows // layer.groups, positions)
    return grouped.permute(1, 2, 0, 3).reshape(layer.groups, rows // layer.groups, -1).double()


def _rows(layer: Layer, value: torch.Tensor) -> torch.Tensor:
    """What each group of a layer gives, float64 (groups, channels, positions)."""
    if isinstance(layer, torch.nn.Linear):
        return value.reshape(-1, value.shape[-1]).T[None].double()
    flat = value.flatten(2).movedim(1, 0).flatten(1)
    return flat.reshape(layer.groups, -1, flat.shape[1]).double()


def _solvable(layer: Any) -> bool:
    if not isinstance(layer, torch.nn.Linear | torch.nn.Conv1d | torch.nn.Conv2d) or layer.weight[0].numel() > WIDEST:
        return False
    if isinstance(layer, torch.nn.Linear):
        return True
    return layer.padding_mode == "zeros" and not isinstance(layer.padding, str)


def _order(model: Model) -> list[str]:
    """Layers that can be solved, as they run; one that runs twice is left out."""
    seen: list[str] = []
    with ExitStack() as stack:
        for name, layer in model.module.named_modules():
            if _solvable(layer):
                hook = layer.register_forward_pre_hook(lambda _layer, _inputs, name=name: seen.append(name))
                stack.callback(hook.remove)
        call(model.module, model.example)
    return [name for name in dict.fromkeys(seen) if seen.count(name) == 1]


class _Stop(Exception):
    """What was to be seen was seen."""


def _watched(
    module: torch.nn.Module, name: str, sample: Mapping[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Input and output of one layer; what comes behind it does not run."""
    found: list[tuple[torch.Tensor, torch.Tensor]] = []

    def hook(_layer: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        found.append((inputs[0], output))
        raise _Stop

    handle = module.get_submodule(name).register_forward_hook(hook)
    try:
        with suppress(_Stop):
            call(module, sample)
    finally:
        handle.remove()
    return found[0]


@torch.no_grad()
def repair_channels(model: Model, whole: Model, kept: Mapping[str, Sequence[int]], inputs: Inputs) -> Model:
    """A narrowed model with its weights solved again. The given ones are not changed.

    Args:
        model: what `cut_channels` made of `whole` with `kept`.
        inputs: samples as the module takes them.
    """
    module = copy.deepcopy(model.module)
    for name in _order(model):
        layer: Any = module.get_submodule(name)
        rows = kept.get(f"out.{name}", kept.get(f"through.{name}"))
        square: torch.Tensor | float = 0.0
        cross: torch.Tensor | float = 0.0
        seen = 0
        for sample in inputs:
            given, made = _watched(module, name, sample)
            _, wanted = _watched(whole.module, name, sample)
            if rows is not None:
                axis = -1 if isinstance(layer, torch.nn.Linear) else 1
                wanted = wanted.index_select(axis, torch.tensor(rows))
            columns = _columns(layer, given)
            if layer.bias is not None:
                columns = torch.cat([columns, torch.ones_like(columns[:, :1])], 1)
            seen += columns.shape[2]
            square = square + columns @ columns.mT
            cross = cross + _rows(layer, wanted - made) @ columns.mT
        assert isinstance(square, torch.Tensor)
        assert isinstance(cross, torch.Tensor)
        if seen < square.shape[1]:
            continue
        ridge = RIDGE * square.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-30)
        damped = square + ridge[:, None, None] * torch.eye(square.shape[1], dtype=torch.float64)
        change = torch.linalg.solve(damped, cross, left=False)
        if layer.bias is not None:
            layer.bias += change[..., -1].reshape(-1).float()
            change = change[..., :-1]
        layer.weight += change.reshape(layer.weight.shape).float()
    return replace(model, module=module)
