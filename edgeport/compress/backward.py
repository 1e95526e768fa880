"""Gradients of what a model says by the outputs of its layers: the Fisher information, a sample at a time.

The mean KL divergence of a changed model from the float one is to second order a quadratic form of the change, whose
matrix is the expected outer product of the gradients of log p(label), for labels drawn from the model itself.

The blocks of a chain run twice, once for what comes after them and once more on the way back (Chen et al. 2016,
https://arxiv.org/abs/1604.06174): what is held is a hidden state a block and the activations of one block, so that
memory hardly grows with depth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from edgeport.compress.chain import call, find_chains
from edgeport.compress.statistics import check_input
from edgeport.model.inputs import select_outputs

Note = Callable[[torch.Tensor, torch.Tensor], None]
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


class _Watch(torch.autograd.Function):
    """The identity on a layer's output, which shows the layer's input and the output's gradient on the way back.

    The input is saved as autograd saves tensors, so that a block that runs twice does not hold it in between.
    """

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, value: torch.Tensor, note: Note) -> torch.Tensor:
        ctx.save_for_backward(value)
        ctx.note = note
        return output.clone()  # not a view: the model may change it in place

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (value,) = ctx.saved_tensors
        ctx.note(value, gradient)
        return gradient, None, None


@contextmanager
def _running_twice(module: torch.nn.Module, example: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Inside, the blocks of the module's chains keep no activations for the way back."""
    with torch.no_grad():
        names = [name for chain in find_chains(module, example) for name in chain]
    blocks = [module.get_submodule(name) for name in names]
    own = [block.__dict__.get("forward") for block in blocks]
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    try:
        yield
    finally:
        for block, before in zip(blocks, own, strict=True):
            del block.forward
            if before is not None:
                block.forward = before


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
            return _Watch.apply(result, value, partial(visit, name, current))  # type: ignore[no-untyped-call,no-any-return]

        return watch

    needed = [parameter.requires_grad for parameter in module.parameters()]
    module.requires_grad_(False)
    handles = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    try:
        with _running_twice(module, inputs[0]), torch.enable_grad():
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
