"""Which channels of a conv net can only go together, found by watching it run, whatever its layers are called.

A layer that mixes channels (a convolution, a Linear layer) writes channels that others read; depthwise convolutions and
batch norms pass them through. Channels that are added or multiplied on the way are coupled: with one goes the other.
To see who reads what, a writer's channels are set to NaN, half of them at a time: those whose number has bit b set,
then the others. Every other mixing layer gives what it gives in the clean run, so NaN stays in the channels that carry
it, and the passes in which a reader's channel is NaN spell the number of the channel that it reads. A channel that is
NaN in both halves of a bit reads several: what writes it is left whole, and so is what reaches an output.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch

from edgeport.compress.chain import call
from edgeport.model.inputs import named_outputs
from edgeport.model.types import Model

Place = tuple[str, int]
"""A layer and one of its channels."""


@dataclass(frozen=True)
class Bundle:
    """Channels that can only go together.

    Attributes:
        writers, readers, carriers: where they are rows, columns, and both.
    """

    writers: tuple[Place, ...]
    readers: tuple[Place, ...]
    carriers: tuple[Place, ...]

    @property
    def layers(self) -> tuple[str, ...]:
        """The writing layers: bundles of the same ones compete with each other."""
        return tuple(dict.fromkeys(name for name, _ in self.writers))


def is_mixing(layer: torch.nn.Module) -> bool:
    """A layer each of whose outputs reads all channels."""
    return isinstance(layer, torch.nn.Linear) or (
        isinstance(layer, torch.nn.Conv1d | torch.nn.Conv2d) and layer.groups == 1
    )


def is_carrying(layer: torch.nn.Module) -> bool:
    """A layer whose output channels each read the input channel of the same number."""
    if isinstance(layer, torch.nn.Conv1d | torch.nn.Conv2d):
        return layer.groups == layer.in_channels == layer.out_channels > 1
    return isinstance(layer, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d)


@dataclass
class _Watch:
    """Forwards of a module in which the outputs of mixing layers are replaced."""

    model: Model
    mixing: dict[str, torch.nn.Module]
    carrying: dict[str, torch.nn.Module]
    clean: dict[str, torch.Tensor] = field(default_factory=dict)
    repeated: set[str] = field(default_factory=set)

    def first(self) -> None:
        """Note what every mixing layer gives; one that runs twice is never cut."""

        def note(name: str) -> Any:
            def hook(_layer: Any, _inputs: Any, output: torch.Tensor) -> None:
                if name in self.clean:
                    self.repeated.add(name)
                # A copy: what follows may write into it (`x += residual`).
                self.clean[name] = output.clone()

            return hook

        with ExitStack() as stack:
            for name, layer in self.mixing.items():
                stack.callback(layer.register_forward_hook(note(name)).remove)
            call(self.model.module, self.model.example)

    def run(self, writer: str | None, wrong: torch.Tensor | None) -> tuple[dict[str, torch.Tensor], bool]:
        """Which channels of every layer's input are NaN when some of a writer's are (None: the model's inputs), and
        whether an output is.

        Args:
            wrong: (channels,) bool.
        """
        seen: dict[str, torch.Tensor] = {}

        def before(name: str, layer: torch.nn.Module) -> Callable[..., None]:
            def hook(_layer: Any, inputs: tuple[torch.Tensor, ...]) -> None:
                wrong = _channels_first(layer, inputs[0].isnan()).flatten(1).any(1)
                seen[name] = wrong | seen.get(name, torch.tensor(False))

            return hook

        def after(name: str, layer: torch.nn.Module) -> Callable[..., torch.Tensor]:
            def hook(_layer: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
                if name in self.repeated:
                    return torch.full_like(output, torch.nan if name == writer else 0.0)
                value = self.clean[name].clone()
                if name == writer and wrong is not None:
                    _channels_first(layer, value)[wrong] = torch.nan
                return value

            return hook

        example = self.model.example
        if writer is None:
            example = {n: torch.full_like(v, torch.nan) if v.is_floating_point() else v for n, v in example.items()}
        with ExitStack() as stack:
            for name, layer in (self.mixing | self.carrying).items():
                stack.callback(layer.register_forward_pre_hook(before(name, layer)).remove)
            for name, layer in self.mixing.items():
                stack.callback(layer.register_forward_hook(after(name, layer)).remove)
            outputs = named_outputs(call(self.model.module, example))
        return seen, any(bool(value.isnan().any()) for value in outputs.values())


def _channels_first(layer: torch.nn.Module, value: torch.Tensor) -> torch.Tensor:
    """A view (channels, ...) of a layer's input or output."""
    return value.movedim(-1, 0) if isinstance(layer, torch.nn.Linear) else value.movedim(1, 0)


def _sources(watch: _Watch, writer: str, count: int) -> dict[str, torch.Tensor] | None:
    """For every layer that reads the writer the number of the channel that each of its channels is, -1 for none; None
    where some channel reads several or an output reads any."""
    found: dict[str, torch.Tensor] = {}
    numbers = torch.arange(count)
    for bit in range(max((count - 1).bit_length(), 1)):
        chosen = (numbers >> bit & 1).bool()
        (ones, out), (zeros, also) = (watch.run(writer, half) for half in (chosen, ~chosen))
        if out or also:
            return None
        for name in ones:
            if bool((ones[name] & zeros[name]).any()):
                return None
            reads = ones[name] | zeros[name]
            value = found.setdefault(name, torch.where(reads, 0, -1))
            if bool(((value >= 0) != reads).any()):
                return None
            value += torch.where(ones[name], 1 << bit, 0)
    return found


@torch.no_grad()
def find_bundles(model: Model, exclude: Sequence[str] = ()) -> list[Bundle]:
    """Every set of channels that can go, in the order of the layers that write them.

    Args:
        exclude: layers whose outputs stay whole.
    """
    layers = dict(model.module.named_modules())
    watch = _Watch(
        model,
        {name: layer for name, layer in layers.items() if is_mixing(layer)},
        {name: layer for name, layer in layers.items() if is_carrying(layer)},
    )
    watch.first()
    from_inputs, _ = watch.run(None, None)
    parents: dict[Place, Place] = {}
    reads: dict[Place, Place] = {}  # a layer's input channel: a writer's channel that it reads
    locked: set[Place] = set()
    blocked: set[Place] = set()  # input channels that a writer reaches which is left whole, in ways unknown

    def root(place: Place) -> Place:
        while parents[place] != place:
            parents[place] = place = parents[parents[place]]
        return place

    for writer, value in watch.clean.items():
        count = len(_channels_first(layers[writer], value))
        places = [(writer, channel) for channel in range(count)]
        parents |= {place: place for place in places}
        sources = None if writer in watch.repeated else _sources(watch, writer, count)
        if sources is None or writer in exclude or not any(bool((one >= 0).any()) for one in sources.values()):
            locked |= set(places)
        if sources is None:
            reached, _ = watch.run(writer, torch.ones(count, dtype=torch.bool))
            blocked |= {(name, one) for name, wrong in reached.items() for one in wrong.nonzero().flatten().tolist()}
        for name, numbers in (sources or {}).items():
            for channel in (numbers >= 0).nonzero().flatten().tolist():
                place = places[int(numbers[channel])]
                other = reads.setdefault((name, channel), place)
                parents[root(place)] = root(other)
                if bool(from_inputs[name][channel]) or name in watch.repeated:
                    locked.add(place)
    locked |= {place for reader, place in reads.items() if reader in blocked}
    bound = {root(place) for place in locked}
    members: dict[Place, list[Place]] = {}
    for place in parents:
        if root(place) not in bound:
            members.setdefault(root(place), []).append(place)
    readers: dict[Place, list[Place]] = {}
    for reader, place in reads.items():
        readers.setdefault(root(place), []).append(reader)
    return [
        Bundle(
            writers=tuple(places),
            readers=tuple(one for one in readers.get(key, ()) if one[0] in watch.mixing),
            carriers=tuple(one for one in readers.get(key, ()) if one[0] in watch.carrying),
        )
        for key, places in members.items()
    ]


@torch.no_grad()
def bundle_scores(model: Model, bundles: Sequence[Bundle], inputs: Sequence[Mapping[str, torch.Tensor]]) -> list[float]:
    """What each bundle gives to the layers that read it: the sum over its readers of E[x_j^2] ||W_j||^2, where W_j are
    the weights that multiply channel j."""
    layers = dict(model.module.named_modules())
    names = dict.fromkeys(name for bundle in bundles for name, _ in bundle.readers)
    energy: dict[str, torch.Tensor] = {}

    def hook(name: str) -> Any:
        def note(layer: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            squares = _channels_first(layer, arguments[0]).flatten(1).double().square().mean(1)
            energy[name] = energy.get(name, torch.zeros(())) + squares

        return note

    with ExitStack() as stack:
        for name in names:
            stack.callback(layers[name].register_forward_pre_hook(hook(name)).remove)
        for sample in inputs:
            call(model.module, sample)
    for name in names:
        weight = layers[name].get_parameter("weight").double()
        energy[name] = energy[name] / len(inputs) * weight.square().movedim(1, 0).flatten(1).sum(1)
    return [sum(float(energy[name][channel]) for name, channel in bundle.readers) for bundle in bundles]
