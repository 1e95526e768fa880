"""Which layer's output a layer's input is computed from, seen by running the module once.

The autograd graph of one run is walked back from each layer's input to the nearest outputs of other layers. So
it does not matter how a model's author named or nested them, nor which functions stand in between.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.func import functional_call

Node = torch.autograd.graph.Node


@dataclass(frozen=True)
class Norm:
    """A normalisation over the last dimension, found by what it computes.

    Attributes:
        weight, bias: parameter names; the bias is None where it has none.
        offset: what it adds to its weight before it multiplies: 1 for Gemma, otherwise 0.
        centred: it takes the mean away (LayerNorm); otherwise it only divides (RMSNorm).
    """

    weight: str
    bias: str | None
    offset: float
    centred: bool


@dataclass(frozen=True)
class Call:
    """One call of a layer: its input and output, both part of the run's autograd graph."""

    input: torch.Tensor
    output: torch.Tensor


@dataclass(frozen=True)
class Trace:
    """What one run showed. Layers are known by their module name.

    Attributes:
        calls: of each layer that was called.
        sources: the nearest layers, and parameters that belong to none (by parameter name), that a layer's input
            is computed from; sorted.
        norms: the layers that are normalisations.
    """

    calls: Mapping[str, tuple[Call, ...]]
    sources: Mapping[str, tuple[str, ...]]
    norms: Mapping[str, Norm]


def _is_layer(module: nn.Module) -> bool:
    """A module with a weight and no children."""
    return not list(module.children()) and isinstance(getattr(module, "weight", None), nn.Parameter)


def _norm(name: str, layer: nn.Module, call: Call) -> Norm | None:
    """Recognise a normalisation: `unit * (weight + offset) + bias` along the last dimension."""
    weight, bias = layer.weight, getattr(layer, "bias", None)
    if not isinstance(weight, torch.Tensor) or weight.shape != call.output.shape[-1:]:
        return None
    if call.input.shape != call.output.shape:
        return None

    def at(value: float, inputs: torch.Tensor) -> torch.Tensor:
        changed = {"weight": torch.full_like(weight, value)}
        if bias is not None:
            changed["bias"] = torch.zeros_like(bias)
        result: torch.Tensor = functional_call(layer, changed, (inputs,))
        return result

    with torch.no_grad():
        inputs = call.input.detach()
        without, whole = at(0.0, inputs), at(1.0, inputs)
        unit = whole - without
        centred = torch.allclose(at(1.0, inputs + inputs.abs().mean()), whole, atol=1e-4)
    for offset in (0.0, 1.0):
        if bool(unit.any()) and torch.allclose(without, offset * unit, atol=1e-5):
            return Norm(f"{name}.weight", None if bias is None else f"{name}.bias", offset, centred)
    return None


def _nearest(start: Node | None, ends: Mapping[Node, str], parameters: Mapping[int, str]) -> set[str]:
    """Names of the ends that the walk back from a node meets first."""
    found, seen, waiting = set(), set(), [start]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in ends:
            found.add(ends[node])
        elif hasattr(node, "variable"):  # a leaf of the graph
            found.add(parameters[id(node.variable)])
        else:
            waiting.extend(following for following, _ in node.next_functions)
    return found


def trace(module: nn.Module, example: Mapping[str, torch.Tensor]) -> Trace:
    """Run the module once and see what feeds what.

    Args:
        module: in eval mode, its parameters requiring gradients.
        example: one value for each input.
    """
    layers = {child: name for name, child in module.named_modules() if _is_layer(child)}
    calls: dict[str, list[Call]] = {}

    def record(layer: nn.Module, inputs: tuple[object, ...], output: object) -> None:
        if inputs and isinstance(inputs[0], torch.Tensor) and isinstance(output, torch.Tensor):
            calls.setdefault(layers[layer], []).append(Call(inputs[0], output))

    hooks = [layer.register_forward_hook(record) for layer in layers]
    try:
        with torch.enable_grad():
            module(**example)
    finally:
        for hook in hooks:
            hook.remove()
    ends = {call.output.grad_fn: name for name, of_layer in calls.items() for call in of_layer}
    parameters = {id(parameter): name for name, parameter in module.named_parameters()}
    known = {node: name for node, name in ends.items() if node is not None}
    sources = {
        name: tuple(sorted(set().union(*(_nearest(call.input.grad_fn, known, parameters) for call in of_layer))))
        for name, of_layer in calls.items()
    }
    by_name = {name: layer for layer, name in layers.items()}
    norms = {name: norm for name in calls if (norm := _norm(name, by_name[name], calls[name][0])) is not None}
    return Trace({name: tuple(of_layer) for name, of_layer in calls.items()}, sources, norms)
