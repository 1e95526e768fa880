"""How much each position of a layer's input matters to what the model says.

GPTQ makes the squared error of a layer's output small, over all positions alike. What the model says depends on some
of them far more than on others, and the positions of massive activations, which weigh most in x x^T, are those that it
hardly depends on. So each position counts by the squared gradient of the layer's output there (Kim et al. 2025,
GuidedQuant, https://arxiv.org/abs/2505.07004, which also tells groups of output channels apart).

Weights that differ leave fewer positions to learn from: as many as (sum w)^2 / sum w^2 of equal weight (Kish 1965). A
second moment of K columns needs some K of them or more, so where data is short the weights are drawn together until
that many are left, down to no difference at all. Positions of one sample are alike, too, so few samples say too little
about others, however long they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from edgeport.compress.backward import visit_gradients
from edgeport.quantized import as_matrix

SAMPLES = 32
"""With fewer of them all positions count alike."""
STRENGTH = 0.7
"""The largest share of a position's weight that its gradient decides: it is the gradient of one drawn label."""
POSITIONS = 2
"""Positions of equal weight that are left, for each column of a layer's weight."""


@dataclass(frozen=True)
class Guidance:
    """Weights of positions.

    Attributes:
        energies: by layer, for each sample that it ran once in, the squared gradients (T,) over their mean, float32.
        strength: by layer, how much they count, 0 to `STRENGTH`.
    """

    energies: Mapping[str, Mapping[int, torch.Tensor]]
    strength: Mapping[str, float]

    def of(self, layer: str, sample: int, positions: int) -> torch.Tensor | None:
        """The weights of a layer's positions in a sample, with a mean of 1; None where all count alike.

        Args:
            positions: how many there are. Where they are not those that were measured, all count alike.
        """
        found, strength = self.energies.get(layer, {}).get(sample), self.strength.get(layer, 0.0)
        return None if found is None or len(found) != positions or strength == 0 else found * strength + (1 - strength)


def strength_for(energies: Sequence[torch.Tensor], columns: int) -> float:
    """The most that squared gradients may count.

    A weight is 1 - s + s u, with u the squared gradient over its mean, and the mean of its square 1 + s^2 (E[u^2] - 1).

    Args:
        energies: u, of every sample.
        columns: K.
    """
    u = torch.cat(list(energies))
    spread = float(u.square().mean()) - 1
    allowed = len(u) / (POSITIONS * columns) - 1
    return 0.0 if allowed <= 0 else STRENGTH if spread <= 0 else min(STRENGTH, (allowed / spread) ** 0.5)


def measure_guidance(
    module: torch.nn.Module,
    layers: Mapping[str, torch.nn.Module],
    inputs: Sequence[Mapping[str, torch.Tensor]],
    outputs: Sequence[str],
    *,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Guidance:
    """Of every layer, by the names given.

    Args:
        layers: Linear layers and convolutions.
        inputs: samples as the module takes them, batch 1. Below `SAMPLES` nothing is run and nothing weighted.
        outputs: names of the outputs that count, in the module's order.
        seed: of the labels drawn.
        progress: called with the number of samples done.

    Raises:
        BadInputError: an activation is not finite; the message names the layer.
    """
    if len(inputs) < SAMPLES:
        return Guidance({}, {})
    energies: dict[str, dict[int, torch.Tensor]] = {name: {} for name in layers}
    found: dict[str, torch.Tensor | None] = {}

    def note(name: str, _sample: int, _value: torch.Tensor, gradient: torch.Tensor) -> None:
        channels = 1 if isinstance(layers[name], torch.nn.Conv1d | torch.nn.Conv2d) else gradient.dim() - 1
        energy = gradient.square().sum(channels).flatten()
        mean = float(energy.mean())
        # Of a layer that runs twice, which of its runs comes first is not the same in another pass.
        found[name] = energy / mean if mean > 0 and name not in found else None

    def keep(done: int) -> None:
        kept = {name: energy for name, energy in found.items() if energy is not None}
        if kept:
            # In one piece: small tensors that stay between large ones that come and go hold the memory of those.
            whole = torch.cat(list(kept.values()))
            for name, piece in zip(kept, torch.split(whole, [len(one) for one in kept.values()]), strict=True):
                energies[name][done - 1] = piece
        found.clear()
        if progress is not None:
            progress(done)

    visit_gradients(module, layers, inputs, outputs, note, seed=seed, progress=keep)
    columns = {name: as_matrix(layer.get_parameter("weight")).shape[1] for name, layer in layers.items()}
    strength = {name: strength_for(list(of.values()), columns[name]) for name, of in energies.items() if of}
    return Guidance(energies, strength)
