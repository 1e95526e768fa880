"""The logical form: the original in torch with the weights that were read back from the shipped file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from edgeport.explain.document import Missing
from edgeport.explain.reference import run_original, watched
from edgeport.explain.shipped import Shipped
from edgeport.explain.watch import Place, Value, Watched, layers_of
from edgeport.quantized import QuantizedTensor, dequantize

if TYPE_CHECKING:
    import numpy as np

    from edgeport.model.types import Model

    Arrays = Mapping[str, np.ndarray]

STATEMENT = (
    "Not possible inside the shipped graph here: {why}. Instead the original in torch with the weights that were read "
    "back from the file. Activations that the file rounds stay float in it, norms and biases are the original's."
)


@contextmanager
def with_weights(model: Model, weights: Mapping[str, QuantizedTensor]) -> Iterator[None]:
    """While the block runs, the model has these weights, in place; those that it has no parameter for are left out."""
    parameters = dict(model.module.named_parameters(remove_duplicate=False))
    fitting = {
        name: weight
        for name, weight in weights.items()
        if name in parameters and parameters[name].shape == weight.codes.shape
    }
    kept = {name: parameters[name].detach().clone() for name in fitting}
    try:
        with torch.no_grad():
            for name, weight in fitting.items():
                parameters[name].copy_(dequantize(weight))
        yield
    finally:
        with torch.no_grad():
            for name, value in kept.items():
                parameters[name].copy_(value)


def logical_form(shipped: Shipped, model: Model, weights: Mapping[str, QuantizedTensor], why: str) -> Watched:
    """The logical form with its layers' values visible.

    Args:
        weights: what the file holds, by parameter.
        why: the runtime shows no values inside.
    """
    cached = shipped.artifact.context is not None
    users = layers_of(shipped)
    layers = [layer for name in users for layer in users[name]]
    parameters = {layer: name for name in users for layer in users[name]}
    order: list[str] = []
    modules = dict(model.module.named_modules())
    handles = [
        modules[layer].register_forward_pre_hook(lambda *_, layer=layer: order.append(layer))
        for layer in layers
        if layer in modules
    ]
    try:
        run_original(model, shipped.samples[0], cached=cached)
    finally:
        for handle in handles:
            handle.remove()
    places, seen = [], dict.fromkeys(layers, 0)
    for layer in order:
        call = seen[layer]
        seen[layer] += 1
        lookup = isinstance(modules[layer], torch.nn.Embedding)
        given = None if lookup else Value(_name(layer, call) + " (input)")
        places.append(Place(layer, parameters[layer], call, Value(_name(layer, call)), given, not lookup))
    missing = [Missing(layer=layer, why="the original never calls it") for layer, count in seen.items() if not count]

    def run(sample: Arrays) -> Arrays:
        with with_weights(model, weights), watched(model, layers) as calls:
            run_original(model, sample, cached=cached)
        values = {}
        for layer, found in calls.items():
            for index, call in enumerate(found):
                values[_name(layer, index)] = call.output
                if call.input is not None:
                    values[_name(layer, index) + " (input)"] = call.input
        return values

    return Watched("logical form", STATEMENT.format(why=why), tuple(places), tuple(missing), run, None)


def _name(layer: str, call: int) -> str:
    return layer if call == 0 else f"{layer} (call {call + 1})"


def weights_of(shipped: Shipped) -> dict[str, QuantizedTensor]:
    """The compressed weights that are in the file, by parameter."""
    from edgeport.export.dispatch import read_weights

    return read_weights(shipped.artifact) if shipped.artifact.weights else {}
