"""How much each position of a layer's input matters to what the model says.

GPTQ makes the squared error of a layer's output small, over all positions alike. What the model says depends on some
of them far more than on others, and the positions of massive activations, which weigh most in x x^T, are those that it
hardly depends on. So each position counts by the squared gradient of the layer's output there (Kim et al. 2025,
GuidedQuant, https://arxiv.org/abs/2505.07004, which also tells groups of output channels apart).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from edgeport.compress.backward import visit_gradients

FLOOR = 0.3
"""The share of a position's weight that it has whatever its gradient: the gradients are those of one drawn label."""


@dataclass(frozen=True)
class Guidance:
    """Weights of positions.

    Attributes:
        weights: by layer, for each sample that it ran once in, (T,) float32 with a mean of 1.
    """

    weights: Mapping[str, Mapping[int, torch.Tensor]]

    def of(self, layer: str, sample: int, positions: int) -> torch.Tensor | None:
        """The weights of a layer's positions in a sample; None where they are not known, so that all count alike."""
        found = self.weights.get(layer, {}).get(sample)
        return found if found is not None and len(found) == positions else None


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
        inputs: samples as the module takes them, batch 1.
        outputs: names of the outputs that count, in the module's order.
        seed: of the labels drawn.
        progress: called with the number of samples done.

    Raises:
        BadInputError: an activation is not finite; the message names the layer.
    """
    weights: dict[str, dict[int, torch.Tensor]] = {name: {} for name in layers}
    found: dict[str, torch.Tensor | None] = {}

    def note(name: str, _sample: int, _value: torch.Tensor, gradient: torch.Tensor) -> None:
        channels = 1 if isinstance(layers[name], torch.nn.Conv1d | torch.nn.Conv2d) else gradient.dim() - 1
        energy = gradient.square().sum(channels).flatten()
        mean = float(energy.mean())
        # Of a layer that runs twice, which of its runs comes first is not the same in another pass.
        known = mean > 0 and name not in found
        found[name] = energy.mul_((1 - FLOOR) / mean).add_(FLOOR) if known else None

    def keep(done: int) -> None:
        kept = {name: energy for name, energy in found.items() if energy is not None}
        if kept:
            # In one piece: small tensors that stay between large ones that come and go hold the memory of those.
            pieces = torch.cat(list(kept.values())).split([len(energy) for energy in kept.values()])
            for name, piece in zip(kept, pieces, strict=True):
                weights[name][done - 1] = piece
        found.clear()
        if progress is not None:
            progress(done)

    visit_gradients(module, layers, inputs, outputs, note, seed=seed, progress=keep)
    return Guidance(weights)
