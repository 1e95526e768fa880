"""Floating-point operations of a forward: two for each weight that each output value is made of.

Counted by watching the example run through every Linear layer and convolution. The products that attention makes of
queries, keys and values have no weights and are left out, as are norms and activations.
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from typing import Any

import torch

from edgeport.compress.chain import call
from edgeport.model.types import Model


@torch.no_grad()
def count_flops(model: Model, **options: Any) -> dict[str, int]:
    """Operations of every layer with a weight on the model's example, by the layer's name.

    Args:
        options: further arguments of the module.
    """
    found: dict[str, int] = {}

    def hook(name: str) -> Any:
        def note(layer: torch.nn.Module, _inputs: Any, output: torch.Tensor) -> None:
            weight = layer.get_parameter("weight")
            found[name] = found.get(name, 0) + 2 * output.numel() * math.prod(weight.shape[1:])

        return note

    with ExitStack() as stack:
        for name, layer in model.module.named_modules():
            if isinstance(layer, torch.nn.Linear | torch.nn.Conv1d | torch.nn.Conv2d):
                stack.callback(layer.register_forward_hook(hook(name)).remove)
        model.module(**model.example, **options) if options else call(model.module, model.example)
    return found
