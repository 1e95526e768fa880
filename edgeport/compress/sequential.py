"""Quantize a model layer by layer, each on the inputs that the layers already quantized before it give.

A block at a time: its layers' second moments are collected with its inputs as the quantized prefix makes them,
its weights are quantized, it runs once more, and its outputs are the next block's inputs. So every sample runs
through every block twice, whatever the depth, and what is kept is one hidden state a sample and the moments of
one block. Layers outside of any chain of blocks take their moments from one forward of the model before.

A block whose weights are quantized may be tuned as a whole before it runs once more. Then the float model's hidden
states are kept beside the others, and say what the block should give.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from edgeport.compress.assign import Assignment
from edgeport.compress.chain import call, find_chains, hidden_states
from edgeport.compress.guidance import Guidance
from edgeport.compress.journal import Journal, Made, Progressed
from edgeport.compress.lines import block_line, weight_line
from edgeport.compress.statistics import Moments, observed
from edgeport.errors import BadInputError
from edgeport.quantized import dequantize

Inputs = Sequence[Mapping[str, torch.Tensor]]
Method = Callable[[Assignment, torch.Tensor, Moments | None], Made]
"""(what it becomes, the weight, what its inputs are; None without such vectors) -> the weight and a note about it."""
Report = Callable[[int, int, str], None]
"""(weights done, weights in all, the one just done and its error)."""


@dataclass(frozen=True)
class QuantizedBlock:
    """A block whose weights were just quantized, and what it should give.

    Attributes:
        forward: (sample, the block's weights by full name) -> its output on that sample's inputs, as the blocks
            before it make them; differentiable by the weights.
        wanted: for each sample, what the float block gives in the float model.
        made: its quantized weights, by name.
        weights: what these were in float.
    """

    forward: Callable[[int, Mapping[str, torch.Tensor]], torch.Tensor]
    wanted: list[torch.Tensor]
    made: dict[str, Made]
    weights: dict[str, torch.Tensor]


Tune = Callable[[QuantizedBlock], dict[str, Made]]
"""A block's weights after tuning, by name."""


@dataclass(frozen=True)
class _Call:
    """The arguments of a block for one sample; the first one is replaced from block to block."""

    arguments: tuple[Any, ...]
    named: dict[str, Any]

    def on(self, state: torch.Tensor) -> _Call:
        """The same call on other hidden states."""
        return _Call((state, *self.arguments[1:]), self.named)


class _Captured(Exception):
    """The first block was reached; what follows need not run."""


def capture(module: torch.nn.Module, block: torch.nn.Module, inputs: Inputs) -> list[_Call]:
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

    def __init__(
        self, module: torch.nn.Module, assignments: Sequence[Assignment], method: Method, report: Report | None
    ) -> None:
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        self.layers = dict(self.module.named_modules(remove_duplicate=False))
        self.method = method
        self.report = report
        self.open = {item.name: item for item in assignments if item.format.quantized}
        self.done: dict[str, Made] = {}

    def owners(self, prefix: str = "") -> dict[str, str]:
        """The layers below a prefix whose weights are still to be quantized: the weight's name -> the layer's.

        A tied weight is observed where it multiplies vectors (the head), not where it is looked up.
        """
        found = {}
        for name, item in self.open.items():
            if name.startswith(prefix):
                layers = [alias.rpartition(".")[0] for alias in item.tied or (name,)]
                multiplying = [layer for layer in layers if not isinstance(self.layers[layer], torch.nn.Embedding)]
                found[name] = (multiplying or layers)[0]
        return found

    def quantize(self, names: Sequence[str], moments: Mapping[str, Moments]) -> None:
        """Quantize weights, and put what they stand for in their place."""
        for name in names:
            weight = self.module.get_parameter(name).detach()
            self.put(name, self.method(self.open[name], weight, moments.get(name)))
            if self.report is not None:
                done = len(self.done)
                self.report(done, done + len(self.open), weight_line(name, self.done[name][1]))

    def put(self, name: str, made: Made) -> None:
        """Take a finished weight into the module, also in the place of an earlier one."""
        self.open.pop(name, None)
        self.done[name] = made
        with torch.no_grad():
            self.module.get_parameter(name).copy_(dequantize(made[0]))

    def block(
        self, name: str, original: torch.nn.Module, weights: Sequence[str], calls: list[_Call], taught: list[_Call]
    ) -> QuantizedBlock:
        """What tuning is given of a block.

        Args:
            original: the float module.
            weights: the block's quantized ones, by name.
            calls: the block's, a sample each.
            taught: the next block's in the float model.
        """
        layer, prefix = self.layers[name], f"{name}."

        def forward(index: int, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
            inside = {weight.removeprefix(prefix): value for weight, value in values.items()}
            one = calls[index]
            output: torch.Tensor = hidden_states(torch.func.functional_call(layer, inside, one.arguments, one.named))
            return output

        return QuantizedBlock(
            forward=forward,
            wanted=[one.arguments[0] for one in taught],
            made={weight: self.done[weight] for weight in weights},
            weights={weight: original.get_parameter(weight).detach() for weight in weights},
        )


def hand_on(block: torch.nn.Module, calls: list[_Call]) -> None:
    """Turn the calls of a block into those of the block that follows, in place: no second list of hidden states."""
    for place, one in enumerate(calls):
        calls[place] = one.on(hidden_states(block(*one.arguments, **one.named)))


@dataclass
class _Weigh:
    """What `observed` asks about the sample that is running.

    Attributes:
        owners: the name of a weight -> its layer's.
        sample: its index.
    """

    guidance: Guidance | None
    owners: Mapping[str, str]
    sample: int = 0

    def __call__(self, name: str, count: int) -> torch.Tensor | None:
        return None if self.guidance is None else self.guidance.of(self.owners[name], self.sample, count)


def _first_open(before: Progressed, chain: int) -> int:
    """The first block of a chain that an earlier run did not finish."""
    if before.position is None or before.position[0] < chain:
        return 0
    return sys.maxsize if before.position[0] > chain else before.position[1] + 1


def quantize_in_sequence(
    module: torch.nn.Module,
    assignments: Sequence[Assignment],
    inputs: Inputs,
    method: Method,
    *,
    guidance: Guidance | None = None,
    tune: Tune | None = None,
    journal: Journal | None = None,
    progress: Report | None = None,
    log: Callable[[str], None] | None = None,
) -> dict[str, Made]:
    """Every weight that the assignments quantize, by name, with what the method noted about it.

    Args:
        module: the float module; it is not changed.
        inputs: calibration samples, as the module takes them, batch 1.
        guidance: how much each position of a layer's input counts; None for all alike.
        tune: what to do with a block whose weights are quantized, before it runs once more.
        journal: where finished blocks are noted, and taken from when a run was cut short.
        progress: called after every weight.
        log: called with one line after every block, and where an earlier run is taken up.

    Raises:
        BadInputError: an activation is not finite, or a model that has no blocks is to be tuned by blocks.
    """
    run = _Run(module, assignments, method, progress)
    total = len(run.open)
    say = log or (lambda _line: None)

    with torch.no_grad():
        chains = find_chains(run.module, inputs[0])
        if tune is not None and not chains:
            raise BadInputError(
                "The model is no chain of blocks, and so can't be tuned block by block.",
                where="brecq",
                allowed="models with a list of layers that run one after the other",
                next_step="Leave brecq out of the recipe, or take qat.",
            )
        blocks = tuple(f"{block}." for chain in chains for block in chain)
        outside = {weight: layer for weight, layer in run.owners().items() if not weight.startswith(blocks)}
        before = Progressed() if journal is None else journal.read()
        for name, made in before.made.items():
            run.put(name, made)
        if before.made:
            say(f"{len(before.made)} of {total} weights were finished by a run before this one.")
        # Their inputs are those of the float model.
        left = {weight: module.get_submodule(layer) for weight, layer in outside.items() if weight in run.open}
        weigh = _Weigh(guidance, outside)
        with observed(left, weigh) as moments:
            for weigh.sample, sample in enumerate(inputs if left else ()):
                call(module, sample)
        # Tables that are looked up come before every chain; the rest would change what the chains see too early.
        first = [name for name in left if "embedding" in run.open[name].kinds]
        run.quantize(first, moments)
        for number, chain in enumerate(chains):
            start = _first_open(before, number)
            if start >= len(chain):
                continue
            calls = capture(run.module, run.layers[chain[0]], inputs)
            taught = [] if tune is None else capture(module, module.get_submodule(chain[0]), inputs)
            if start > 0:
                calls = [one.on(state) for one, state in zip(calls, before.hidden, strict=True)]
                taught = [one.on(state) for one, state in zip(taught, before.float_hidden, strict=True)]
            for index, name in enumerate(chain[start:], start):
                block, owners = run.layers[name], run.owners(f"{name}.")
                weigh = _Weigh(guidance, owners)
                with observed({weight: run.layers[layer] for weight, layer in owners.items()}, weigh) as inside:
                    for weigh.sample, one in enumerate(calls):
                        block(*one.arguments, **one.named)
                run.quantize(list(owners), inside)
                if owners:
                    say(block_line(name, {weight: run.done[weight][1] for weight in owners}))
                if tune is not None:
                    hand_on(module.get_submodule(name), taught)
                    for weight, made in tune(run.block(name, module, list(owners), calls, taught)).items():
                        run.put(weight, made)
                hand_on(block, calls)
                if journal is not None:
                    hidden, wanted = ([one.arguments[0] for one in some] for some in (calls, taught))
                    journal.write((number, index), run.done, hidden, wanted)
        run.quantize([name for name in outside if name in run.open], moments)
    return {item.name: run.done[item.name] for item in assignments if item.name in run.done}
