"""Static int8 activations: observe what layers read and give, fix grids, and leave out those that cost too much.

The places that are rounded are called sites: the input of a layer, or the output of one whose backend wants integers
there too. Layers that follow each other directly share the site between them (`flow.py`), so that a chain of
convolutions stays in integers. A site's cost is the divergence from the model with float activations that its
rounding error e makes, by second order: 1/2 E[(g . e)^2], with the gradient g of `sensitivity.py`. Errors of
different sites are taken as independent, so costs add up.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from edgeport.activations import ActivationGrid, LayerRange, fake_quantize, least_weight_scale
from edgeport.compress.assign import Assignment, fallback_activation
from edgeport.compress.chain import call
from edgeport.compress.flow import Flow, read_flow
from edgeport.compress.ranges import Histogram, choose_grid
from edgeport.compress.sensitivity import objective
from edgeport.errors import BadInputError
from edgeport.formats import WeightFormat
from edgeport.model.types import Model
from edgeport.quantized import QuantizedTensor, dequantize, quantize_with_scale
from edgeport.recipe import Quantize
from edgeport.target import Target

Inputs = Sequence[Mapping[str, torch.Tensor]]

SAMPLES = 32
"""Samples that costs are measured on: each runs forwards and, twice, backwards."""

DRAWS = 2
"""Gradients drawn for each of them."""


@dataclass(frozen=True)
class Site:
    """One rounded tensor: what the layer reads, or (`output`) what it gives, behind the clamp that follows."""

    layer: str
    output: bool


Layers = Mapping[str, torch.nn.Module]
Visit = Callable[[Site, torch.Tensor], torch.Tensor | None]


@contextmanager
def _visiting(layers: Layers, sites: Sequence[Site], visit: Visit) -> Iterator[None]:
    """Inside the block `visit` sees the tensor of every site, and may put another one in its place."""

    def before(site: Site) -> Any:
        def hook(_layer: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
            changed = visit(site, inputs[0])
            return None if changed is None else (changed, *inputs[1:])

        return hook

    def after(site: Site) -> Any:
        return lambda _layer, _inputs, output: visit(site, output)

    handles = [
        layers[site.layer].register_forward_hook(after(site))
        if site.output
        else layers[site.layer].register_forward_pre_hook(before(site))
        for site in sites
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _clamped(site: Site, value: torch.Tensor, flow: Flow) -> torch.Tensor:
    """A site's tensor as it is after the clamp that follows it."""
    bounds = flow.bounds.get(site.layer) if site.output else None
    return value if bounds is None else value.clamp(*bounds)


def observe(
    module: torch.nn.Module, layers: Layers, sites: Sequence[Site], flow: Flow, inputs: Inputs, *, counting: bool = True
) -> dict[Site, Histogram]:
    """Histograms of what every site holds over the calibration data; two forwards a sample.

    Args:
        counting: count the values; otherwise one forward a sample finds the ends alone.

    Raises:
        BadInputError: an activation is not finite; the message names the layer.
    """
    ends: dict[Site, tuple[float, float]] = {}

    def measure(site: Site, value: torch.Tensor) -> None:
        low, high = (float(end) for end in _clamped(site, value, flow).aminmax())
        if not (abs(low) < float("inf") and abs(high) < float("inf")):
            raise BadInputError(
                "The calibration data makes values that are not finite.",
                where=f"{'output' if site.output else 'input'} of layer {site.layer}",
                next_step="Check the checkpoint and its preprocessing; the uncompressed model overflows as well.",
            )
        before = ends.get(site, (low, high))
        ends[site] = min(low, before[0]), max(high, before[1])

    def count(site: Site, value: torch.Tensor) -> None:
        histograms[site].add(_clamped(site, value, flow))

    with torch.no_grad():
        with _visiting(layers, sites, measure):
            for sample in inputs:
                call(module, sample)
        histograms = {site: Histogram(*found) for site, found in ends.items()}
        with _visiting(layers, sites, count):
            for sample in inputs if counting else ():
                call(module, sample)
    return histograms


def measure_costs(
    module: torch.nn.Module,
    layers: Layers,
    grids: Mapping[Site, ActivationGrid],
    flow: Flow,
    inputs: Inputs,
    outputs: Sequence[str],
    *,
    seed: int = 0,
) -> dict[Site, float]:
    """What rounding each site alone adds to the divergence, in the units of `sensitivity.py`.

    Args:
        module: in eval mode. Its parameters' `requires_grad` is put back.
        inputs: samples as the module takes them.
        outputs: names of the outputs that count.
        seed: of the gradients drawn.
    """
    generator = torch.Generator().manual_seed(seed)
    costs = dict.fromkeys(grids, 0.0)

    def visit(site: Site, value: torch.Tensor) -> torch.Tensor:
        clamped = _clamped(site, value.detach(), flow)
        error = fake_quantize(clamped, grids[site]) - clamped
        # A tensor of its own: its gradient comes through this layer alone.
        own = value.view_as(value) if value.requires_grad else value.detach().requires_grad_()

        def note(gradient: torch.Tensor) -> None:
            costs[site] += 0.5 * float((gradient * error).sum(dtype=torch.float64)) ** 2

        own.register_hook(note)  # type: ignore[no-untyped-call]
        return own

    needed = [parameter.requires_grad for parameter in module.parameters()]
    module.requires_grad_(False)
    try:
        with _visiting(layers, list(grids), visit), torch.enable_grad():
            for sample in inputs:
                result = call(module, sample)
                for draw in range(DRAWS):
                    drawn = objective(result, outputs, generator)
                    drawn.backward(retain_graph=draw + 1 < DRAWS)  # type: ignore[no-untyped-call]
    finally:
        for parameter, value in zip(module.parameters(), needed, strict=True):
            parameter.requires_grad_(value)
    return {site: cost / (len(inputs) * DRAWS) for site, cost in costs.items()}


def _users(site: Site, kept: Mapping[str, str], source: Mapping[str, str]) -> list[str]:
    """The layers that are static and touch a site."""
    return [name for name in kept if name == site.layer or (site.output and source.get(name) == site.layer)]


def leave_out(
    costs: Mapping[Site, float], candidates: Sequence[str], source: Mapping[str, str], budget: float
) -> dict[str, float]:
    """The layers to keep from static activations, with the cost of the site that each goes for.

    The costliest sites go first, each with the layers that touch it, until what is left costs no more than the
    budget.
    """
    kept = dict.fromkeys(candidates, "")
    left: dict[str, float] = {}
    # Ties in order of the model.
    for site in sorted(costs, key=lambda site: -costs[site]):
        if sum(cost for other, cost in costs.items() if _users(other, kept, source)) <= budget:
            break
        for name in _users(site, kept, source):
            del kept[name]
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
    its weight stays float.

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
            module.get_parameter(name).copy_(before.module.get_parameter(name))
        for name, tensor in raised.items():
            module.get_parameter(name).copy_(dequantize(tensor))
    quantized = {name: tensor for name, tensor in {**model.quantized, **raised}.items() if name not in floats}
    activations = {name: formats[name].activation for name in quantized}
    made = replace(model, module=module, quantized=quantized, activations=activations, ranges=dict(fixed.ranges))
    return made, assignments


def _impossible(item: Assignment) -> bool:
    """Mixed precision gave the layer a format that has no static kernels."""
    return item.activation == "static_int8" and item.format != WeightFormat.parse("int8")
