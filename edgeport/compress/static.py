"""Static int8 activations: observe what layers read and give, fix grids, and leave out those that cost too much."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from edgeport.activations import ActivationGrid, LayerRange, least_weight_scale
from edgeport.compress.assign import Assignment, fallback_activation
from edgeport.compress.flow import read_flow
from edgeport.compress.ranges import choose_grid
from edgeport.compress.sites import Inputs, Site, measure_costs, observe
from edgeport.errors import BadInputError
from edgeport.formats import WeightFormat
from edgeport.model.types import Model
from edgeport.quantized import QuantizedTensor, dequantize, quantize_with_scale
from edgeport.recipe import Quantize
from edgeport.target import Target

SAMPLES = 32
"""Samples that costs are measured on: each runs forwards and, twice, backwards."""


def _users(site: Site, kept: Sequence[str], source: Mapping[str, str]) -> list[str]:
    """The layers that are static and touch a site."""
    return [name for name in kept if name == site.layer or (site.output and source.get(name) == site.layer)]


def leave_out(
    costs: Mapping[Site, float], candidates: Sequence[str], source: Mapping[str, str], budget: float
) -> dict[str, float]:
    """The layers to keep from static activations, with the cost of the site that each goes for.

    The costliest sites go first, each with the layers that touch it, until what is left costs no more than the
    budget.
    """
    kept = list(candidates)
    left: dict[str, float] = {}
    # Ties in order of the model.
    for site in sorted(costs, key=lambda site: -costs[site]):
        if sum(cost for other, cost in costs.items() if _users(other, kept, source)) <= budget:
            break
        for name in _users(site, kept, source):
            kept.remove(name)
            left[name] = costs[site]
    return left


@dataclass(frozen=True)
class Fixed:
    """What became of the layers that were to be static.

    Attributes:
        ranges: grids of those that are, by the name of their weight.
        reasons: why the others are not.
        costs: of every site.
    """

    ranges: Mapping[str, LayerRange]
    reasons: Mapping[str, str]
    costs: Mapping[Site, float]


def fix_ranges(
    model: Model, assignments: Sequence[Assignment], step: Quantize, target: Target, inputs: Inputs
) -> Fixed:
    """Grids for every layer that is to have static activations, as far as the budget allows.

    Args:
        model: with its weights as they will be.
        inputs: calibration samples, as the module takes them.

    Raises:
        BadInputError: there are none, or they make values that are not finite.
    """
    if not inputs:
        raise BadInputError(
            "There is no calibration data to choose the ranges of activations from.", where="[calibration]"
        )
    wanted = {item.name: item for item in assignments if item.activation == "static_int8"}
    layers = {name: model.module.get_submodule(name.rpartition(".")[0]) for name in wanted}
    flow = read_flow(model.module, layers, inputs[0])
    reasons = dict.fromkeys((name for name in wanted if name not in flow.reached), "no calibration input reaches it")
    outputs = {name for name, item in wanted.items() if item.kinds[0] in target.activations.static_outputs}
    source = {name: other for name, other in flow.source.items() if other in outputs}
    sites = [Site(name, True) for name in flow.reached if name in outputs]
    sites += [Site(name, False) for name in flow.reached if name not in source]
    order = {name: index for index, name in enumerate(wanted)}
    sites.sort(key=lambda site: (order[site.layer], site.output))
    histograms = observe(model.module, layers, sites, flow, inputs, counting=step.ranges != "minmax")
    grids = {site: choose_grid(histograms[site], step.ranges) for site in sites}

    def read_by(name: str) -> ActivationGrid:
        return grids[Site(source[name], True) if name in source else Site(name, False)]

    names = tuple(spec.name for spec in model.outputs)
    costs = measure_costs(model.module, layers, grids, flow, inputs[:SAMPLES], names)
    candidates = [name for name in wanted if name not in reasons]
    for name, cost in leave_out(costs, candidates, source, step.activation_budget).items():
        reasons[name] = f"static int8 activations would cost {cost:.2g} here, of {step.activation_budget:g} in all"
    ranges = {name: LayerRange(read_by(name), grids.get(Site(name, True))) for name in wanted if name not in reasons}
    return Fixed(ranges, reasons, costs)


def hold_biases(model: Model, ranges: Mapping[str, LayerRange]) -> dict[str, QuantizedTensor]:
    """The weights with some channel's scale raised until the layer's bias, as an integer, fits beside it.

    What is lost is at most half a scale a weight, which next to such a bias is nothing.
    """
    changed = {}
    for name, found in ranges.items():
        bias, tensor = model.module.get_submodule(name.rpartition(".")[0]).bias, model.quantized[name]
        if not isinstance(bias, torch.Tensor):
            continue
        least = least_weight_scale(bias.detach(), found.input).reshape(tensor.scale.shape)
        if bool((tensor.scale < least).any()):
            scale = torch.maximum(tensor.scale, least)
            rows = (tensor.scale < least).reshape(-1)
            again = quantize_with_scale(
                dequantize(tensor), scale, bits=8, group_size=tensor.group_size, scale_dtype=tensor.scale_dtype
            )
            codes = tensor.codes.clone()
            codes[rows] = again.codes[rows]
            changed[name] = replace(again, codes=codes)
    return changed


def round_biases(module: torch.nn.Module, quantized: Mapping[str, QuantizedTensor], fixed: Fixed) -> None:
    """Give layers whose kernels add the bias as an integer the bias that this integer stands for, in place."""
    with torch.no_grad():
        for name, found in fixed.ranges.items():
            bias = module.get_submodule(name.rpartition(".")[0]).bias
            if found.output is not None and isinstance(bias, torch.Tensor):
                step = quantized[name].scale.reshape(-1) * found.input.scale
                bias.copy_(torch.round(bias.double() / step) * step)


def with_static_activations(
    model: Model,
    before: Model,
    assignments: tuple[Assignment, ...],
    step: Quantize,
    target: Target,
    inputs: Inputs,
) -> tuple[Model, tuple[Assignment, ...]]:
    """The model with fixed grids for its activations, and what each weight has become.

    A layer that is left out takes the recipe's next activation format; where the target has none for its kind,
    it stays float.

    Args:
        before: with its weights as they were before they were quantized.
    """
    assignments = tuple(
        fallback_activation(item, step, target, item.reason) if _impossible(item) else item for item in assignments
    )
    if not any(item.activation == "static_int8" for item in assignments):
        return model, assignments
    fixed = fix_ranges(model, assignments, step, target, inputs)
    assignments = tuple(
        fallback_activation(item, step, target, fixed.reasons[item.name]) if item.name in fixed.reasons else item
        for item in assignments
    )
    formats = {item.name: item for item in assignments}
    raised = hold_biases(model, fixed.ranges)
    floats = {name for name in model.quantized if not formats[name].format.quantized}
    module = copy.deepcopy(model.module)
    with torch.no_grad():
        for name in floats:
            # With its bias, which may have been corrected for the rounded weight.
            own, original = (m.get_submodule(name.rpartition(".")[0]) for m in (module, before.module))
            own.load_state_dict(original.state_dict())
        for name, tensor in raised.items():
            module.get_parameter(name).copy_(dequantize(tensor))
    quantized = {name: tensor for name, tensor in {**model.quantized, **raised}.items() if name not in floats}
    round_biases(module, quantized, fixed)
    activations = {name: formats[name].activation for name in quantized}
    made = replace(model, module=module, quantized=quantized, activations=activations, ranges=dict(fixed.ranges))
    return made, assignments


def _impossible(item: Assignment) -> bool:
    """Mixed precision gave the layer a format that has no static kernels."""
    return item.activation == "static_int8" and item.format != WeightFormat.parse("int8")
