"""Gradients of what a model says by the outputs of its layers: the Fisher information, a sample at a time.

The mean KL divergence of a changed model from the float one is to second order a quadratic form of the change, whose
matrix is the expected outer product of the gradients of log p(label), for labels drawn from the model itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from edgeport.compress.chain import call
from edgeport.compress.statistics import check_input
from edgeport.model.inputs import select_outputs

Visit = Callable[[str, int, torch.Tensor, torch.Tensor], None]
"""(a layer's name, the sample's index, the layer's input, the gradient of its output)."""


def objective(result: Any, outputs: Sequence[str], generator: torch.Generator) -> torch.Tensor:
    """A scalar whose squared gradient is the Fisher information of the outputs."""
    total = torch.zeros(())
    for name, value in select_outputs(result, outputs).items():
        if name == "logits":
            logs = value.reshape(-1, value.shape[-1]).log_softmax(-1)
            drawn = torch.multinomial(logs.detach().exp(), 1, generator=generator)
            total = total + logs.gather(1, drawn).sum() / logs.shape[0] ** 0.5
        elif value.is_floating_point():
            direction = torch.randn(value.shape, generator=generator)
            total = total + (value * direction).sum() / value.detach().norm().clamp_min(1e-12)
    return total


def visit_gradients(
    module: torch.nn.Module,
    layers: Mapping[str, torch.nn.Module],
    inputs: Sequence[Mapping[str, torch.Tensor]],
    outputs: Sequence[str],
    visit: Visit,
    *,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Run every sample forwards and backwards, and show each layer's input and its output's gradient.

    Layers that a sample does not reach, or that have no say in the outputs, are not shown; one that runs several times
    is shown as often, last run first.

    Args:
        module: in eval mode. Its parameters' `requires_grad` is put back.
        inputs: samples as the module takes them.
        outputs: names of the outputs that count, in the module's order.
        seed: of the labels drawn.
        progress: called with the number of samples done.

    Raises:
        BadInputError: an activation is not finite; the message names the layer.
    """
    generator = torch.Generator().manual_seed(seed)
    current = 0

    def hook(name: str) -> Any:
        def watch(_layer: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
            result = output if output.requires_grad else output.detach().requires_grad_()
            value = inputs[0].detach()
            check_input(name, value)
            result.register_hook(lambda gradient: visit(name, current, value, gradient))  # type: ignore[no-untyped-call]
            return result

        return watch

    needed = [parameter.requires_grad for parameter in module.parameters()]
    module.requires_grad_(False)
    handles = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    try:
        with torch.enable_grad():
            for current, sample in enumerate(inputs):
                drawn = objective(call(module, sample), outputs, generator)
                if drawn.requires_grad:  # otherwise no layer of these has a say in the outputs
                    drawn.backward()  # type: ignore[no-untyped-call]
                if progress is not None:
                    progress(current + 1)
    finally:
        for handle in handles:
            handle.remove()
        for parameter, value in zip(module.parameters(), needed, strict=True):
            parameter.requires_grad_(value)
