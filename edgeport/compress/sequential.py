"""Quantize a model layer by layer, each on the inputs that the layers already quantized before it give.

A block at a time: its layers' second moments are collected with its inputs as the quantized prefix makes them,
its weights are quantized, it runs once more, and its outputs are the next block's inputs. So every sample runs
through every block twice, whatever the depth, and what is kept is one hidden state a sample and the moments of
one block. Layers outside of any chain of blocks take their moments from one forward of the model before.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from edgeport.compress.assign import Assignment
from edgeport.compress.chain import call, find_chains, hidden_states
from edgeport.compress.statistics import Moments, observed
from edgeport.quantized import QuantizedTensor, dequantize

Inputs = Sequence[Mapping[str, torch.Tensor]]
Method = Callable[[Assignment, torch.Tensor, Moments | None], QuantizedTensor]
"""(what it becomes, the weight, what its inputs are; None without such vectors) -> the weight."""


@dataclass(frozen=True)
class _Call:
    """The arguments of a block for one sample; the first one is replaced from block to block."""

    arguments: tuple[Any, ...]
    named: dict[str, Any]


class _Captured(Exception):
    """The first block was reached; what follows need not run."""


def _capture(module: torch.nn.Module, block: torch.nn.Module, inputs: Inputs) -> list[_Call]:
    """What a block is called with, for each input."""
    calls: list[_Call] = []

    def note(_block: torch.nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        calls.append(_Call(arguments, dict(named)))
        raise _Captured

    handle = block.register_forward_pre_hook(note, with_kwargs=True)
    try:
        for sample in inputs:
            try:
                call(module, sample)
            except _Captured:
                continue
    finally:
        handle.remove()
    return calls


class _Run:
    """One pass over a copy of the module, whose weights become quantized on the way."""

    def __init__(self, module: torch.nn.Module, assignments: Sequence[Assignment], method: Method) -> None:
        self.module = copy.deepcopy(module).eval()
        self.layers = dict(self.module.named_modules(remove_duplicate=False))
        self.method = method
        self.open = {item.name: item for item in assignments if item.format.quantized}
        self.done: dict[str, QuantizedTensor] = {}

    def owners(self, prefix: str = "") -> dict[str, torch.nn.Module]:
        """The layers below a prefix whose weights are still to be quantized, by the weights' names.

        A tied weight is observed where it multiplies vectors (the head), not where it is looked up.
        """
        found = {}
        for name, item in self.open.items():
            if not name.startswith(prefix):
                continue
            layers = [self.layers[alias.rpartition(".")[0]] for alias in item.tied or (name,)]
            found[name] = next((layer for layer in layers if not isinstance(layer, torch.nn.Embedding)), layers[0])
        return found

    def quantize(self, names: Sequence[str], moments: Mapping[str, Moments]) -> None:
        """Quantize weights, and put what they stand for in their place."""
        for name in names:
            item = self.open.pop(name)
            weight = self.layers[name.rpartition(".")[0]].get_parameter(name.rpartition(".")[2])
            self.done[name] = self.method(item, weight.detach(), moments.get(name))
            with torch.no_grad():
                weight.copy_(dequantize(self.done[name]))


def quantize_in_sequence(
    module: torch.nn.Module,
    assignments: Sequence[Assignment],
    inputs: Inputs,
    method: Method,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, QuantizedTensor]:
    """Every weight that the assignments quantize, by name.

    Args:
        module: the float module; it is not changed.
        inputs: calibration samples, as the module takes them, batch 1.
        progress: called with (weights done, weights in all).

    Raises:
        BadInputError: an activation is not finite.
    """
    run = _Run(module, assignments, method)
    total = len(run.open)

    def report() -> None:
        if progress is not None:
            progress(len(run.done), total)

    with torch.no_grad():
        chains = find_chains(run.module, inputs[0])
        blocks = tuple(f"{block}." for chain in chains for block in chain)
        outside = {name: layer for name, layer in run.owners().items() if not name.startswith(blocks)}
        with observed(outside) as moments:
            for sample in inputs if outside else ():
                call(run.module, sample)
        # Tables that are looked up come before every chain; the rest would change what the chains see too early.
        first = [name for name, layer in outside.items() if "embedding" in run.open[name].kinds]
        run.quantize(first, moments)
        report()
        for chain in chains:
            calls = _capture(run.module, run.layers[chain[0]], inputs)
            for name in chain:
                block, owners = run.layers[name], run.owners(f"{name}.")
                with observed(owners) as inside:
                    for one in calls:
                        block(*one.arguments, **one.named)
                run.quantize(list(owners), inside)
                report()
                calls = [
                    _Call((hidden_states(block(*one.arguments, **one.named)), *one.arguments[1:]), one.named)
                    for one in calls
                ]
        run.quantize([name for name in outside if name in run.open], moments)
        report()
    return run.done
