"""Mixed precision: measure what each format of each layer would cost, and give the bits where they matter.

The cost is the second-order divergence of `sensitivity.py`, of the weight rounded to nearest on the format's own
grid with errors weighted by their inputs: a method that does better does so for every format alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from edgeport.compress.allocate import Choice, allocate, worthwhile
from edgeport.compress.assign import Assignment, candidates, reassigned
from edgeport.compress.quantize.palette import quantize_palette
from edgeport.compress.quantize.rtn import quantize_rtn
from edgeport.compress.sensitivity import Sensitivity, measure_sensitivity
from edgeport.formats import WeightFormat
from edgeport.model.types import Model
from edgeport.quantized import as_matrix, dequantize
from edgeport.recipe import Quantize, Recipe
from edgeport.target import Target

SAMPLES = 16
"""Samples that sensitivities are measured on: each runs forwards and backwards."""


@dataclass(frozen=True)
class Option:
    """One format of one layer, as it was measured.

    Attributes:
        bytes: with scales and zero points.
        cost: what it adds to the divergence from the float model, nats a sample.
        chosen: the allocator took it.
    """

    format: str
    bytes: int
    cost: float
    chosen: bool


Table = dict[str, tuple[Option, ...]]
"""For every weight the options that no other one beats in bytes and cost, fewest bytes first."""


def choices(assignments: Sequence[Assignment], step: Quantize, target: Target) -> dict[str, tuple[str, ...]]:
    """The formats that each weight with more than one may take, by name.

    A weight none of whose formats is as small as the budget (depthwise convolutions in 8 bits, or float where a target
    has none) takes the first of them and is not counted, as long as there are others to give bits to.
    """
    formats = {
        item.name: candidates(step, target, item.kinds, item.name, (item.shape[0], math.prod(item.shape[1:])))
        for item in assignments
        if item.format.quantized and item.corrects is None
    }
    several = {name: names for name, names in formats.items() if len(names) > 1}
    budget = math.inf if step.bits_per_weight is None else step.bits_per_weight
    fitting = {
        name: names for name, names in several.items() if min(WeightFormat.parse(f).bits for f in names) <= budget
    }
    return fitting or several


def weight_budgets(assignments: Sequence[Assignment], recipe: Recipe, target: Target) -> dict[str, int]:
    """Bytes on average of every weight whose format is still to be chosen; empty without mixed precision."""
    step = recipe.quantize
    if step is None or step.bits_per_weight is None:
        return {}
    shapes = {item.name: item.shape for item in assignments}
    return {
        name: int(math.prod(shapes[name]) * step.bits_per_weight / 8) for name in choices(assignments, step, target)
    }


def _option(item: Assignment, weight: torch.Tensor, sensitivities: Sequence[Sensitivity], float_bytes: int) -> Choice:
    """What one format of one weight stores and costs, in all the layers that use it."""
    if not item.format.quantized:
        return Choice("float", weight.numel() * float_bytes, 0.0)
    importance = next((found.importance for found in sensitivities if found.importance is not None), None)
    if item.format.scheme == "lut":
        tensor = quantize_palette(
            weight,
            bits=item.format.bits,
            group_size=item.format.group_size,
            scale_dtype=item.scale_dtype,
            importance=importance,
        )
    else:
        tensor = quantize_rtn(weight, item.grid, importance=importance)
    change = as_matrix(dequantize(tensor)) - as_matrix(weight.to(torch.float32))
    cost = sum(max(found.cost(change), 0.0) for found in sensitivities)
    return Choice(item.format.name, tensor.storage_bytes(), cost)


def float_bytes(recipe: Recipe, target: Target) -> int:
    """Bytes of a weight that stays in float, in the precision that the recipe gets on the target."""
    precision = target.precisions[0] if recipe.lower.precision == "target" else recipe.lower.precision
    return 2 if precision == "fp16" else 4


def choose_formats(
    model: Model,
    recipe: Recipe,
    target: Target,
    assignments: Sequence[Assignment],
    inputs: Sequence[Mapping[str, torch.Tensor]],
    *,
    progress: Callable[[int, int, str], None] | None = None,
) -> tuple[tuple[Assignment, ...], Table]:
    """The assignments with the formats that lose least within `bits_per_weight`, and the table behind them.

    Weights that have only one format, or that the recipe leaves in float, are not counted.

    Args:
        progress: called with (weights measured, weights in all, which one).

    Raises:
        BadInputError: the smallest formats at hand take more than the budget.
    """
    step = recipe.quantize
    assert step is not None
    assert step.bits_per_weight is not None
    formats = choices(assignments, step, target)
    open_ = [item for item in assignments if item.name in formats]
    if not open_:
        return tuple(assignments), {}
    # A tied weight costs what it does where it is looked up and what it does where it multiplies.
    users = {item.name: [name.rpartition(".")[0] for name in item.tied or (item.name,)] for item in open_}
    layers = {user: model.module.get_submodule(user) for found in users.values() for user in found}
    outputs = tuple(spec.name for spec in model.outputs)
    sensitivities = measure_sensitivity(model.module, layers, inputs[:SAMPLES], outputs)
    options: dict[str, list[Choice]] = {}
    weights = 0
    for index, item in enumerate(open_):
        weight = model.module.get_parameter(item.name).detach()
        weights += weight.numel()
        found = [sensitivities[user] for user in users[item.name]]
        options[item.name] = [
            _option(reassigned(item, name, target), weight, found, float_bytes(recipe, target))
            for name in formats[item.name]
        ]
        if progress is not None:
            progress(index + 1, len(open_), f"choosing bits, {item.name.removesuffix('.weight')}")
    chosen = allocate(options, int(weights * step.bits_per_weight / 8))
    table = {
        name: tuple(
            Option(choice.format, choice.bytes, choice.cost, choice.format == chosen[name].format)
            for choice in worthwhile(choices)
        )
        for name, choices in options.items()
    }
    reason = f"loses least within {step.bits_per_weight:g} bits a weight"
    mixed = tuple(
        replace(reassigned(item, chosen[item.name].format, target), reason=reason) if item.name in chosen else item
        for item in assignments
    )
    return mixed, table
