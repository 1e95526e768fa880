"""Bias correction: take back what rounding the weights adds to the mean of a layer's output.

A channel's weights rounded by D change its output by D x on average over inputs x, mostly by the mean of x, which
behind a ReLU is not zero. That mean is known from calibration data and is subtracted from the bias (Nagel et al.
2019, https://arxiv.org/abs/1906.04721, section 4.2). It matters most for depthwise convolutions, whose channels sum
few weights. The inputs are those of the model with rounded weights; every layer is corrected in one pass.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from edgeport.compress.chain import call
from edgeport.model.types import Model

LAYERS = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d)


def mean_outputs(
    module: torch.nn.Module, weights: Mapping[str, torch.Tensor], inputs: Sequence[Mapping[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """What each layer would give on average with another weight and no bias: (N,) float64, over all positions.

    Args:
        module: it runs on its own weights; only what the layers read counts.
        weights: those other weights, by parameter name.
        inputs: samples as the module takes them.
    """
    sums: dict[str, torch.Tensor] = {}
    counts: dict[str, int] = {}
    twins = {}
    for name, weight in weights.items():
        twin = copy.copy(module.get_submodule(name.rpartition(".")[0]))
        twin._parameters = {"weight": torch.nn.Parameter(weight, requires_grad=False), "bias": None}
        twins[name] = twin

    def hook(name: str) -> Any:
        def add(layer: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
            given = twins[name].forward(*arguments)
            channels = -1 if isinstance(layer, torch.nn.Linear) else 1
            rows = given.movedim(channels, 0).flatten(1)
            total = rows.sum(1, dtype=torch.float64)
            sums[name] = sums[name] + total if name in sums else total
            counts[name] = counts.get(name, 0) + rows.shape[1]

        return add

    handles = [module.get_submodule(name.rpartition(".")[0]).register_forward_pre_hook(hook(name)) for name in weights]
    try:
        with torch.no_grad():
            for sample in inputs:
                call(module, sample)
    finally:
        for handle in handles:
            handle.remove()
    return {name: total / counts[name] for name, total in sums.items()}


def correct_biases(model: Model, before: Model, inputs: Sequence[Mapping[str, torch.Tensor]]) -> Model:
    """The model with corrected biases of its quantized Linear and convolution layers; neither model is changed.

    A layer without a bias stays without one.

    Args:
        before: the same model with its weights as they were before they were quantized.
    """
    changes = {}
    for name in model.quantized:
        layer = model.module.get_submodule(name.rpartition(".")[0])
        if isinstance(layer, LAYERS) and layer.bias is not None:
            changes[name] = layer.weight.detach() - before.module.get_parameter(name).detach()
    if not changes:
        return model
    moved = mean_outputs(model.module, changes, inputs)
    module = copy.deepcopy(model.module)
    with torch.no_grad():
        for name, shift in moved.items():
            bias = module.get_parameter(f"{name.rpartition('.')[0]}.bias")
            bias.copy_(bias.double() - shift)
    return replace(model, module=module)
