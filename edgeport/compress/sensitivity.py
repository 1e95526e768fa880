"""How much a changed weight costs: the divergence from the float model that each layer's error makes, by second order.

For a model with logits the mean KL divergence of a changed model from the float one is, to second order,
1/2 E[<G, D>^2] for a change D of a weight, with G the weight's gradient of log p(label) for labels drawn from the
model itself (the Fisher information). Rounding errors of different weights are as good as independent, which leaves

    1/2 sum over weights of E[G^2] * D^2

(LeCun et al. 1989, Optimal Brain Damage): one forward and one backward a sample serve every layer and every format.
G is the sum over positions of g x^T, with g the gradient of the layer's output and x its input. Taking x and g as
independent instead, as Kronecker factors do (Martens and Grosse 2015, https://arxiv.org/abs/1503.05671), misses
by two orders of magnitude in both directions: language models have positions with activations hundreds of times
larger than all others (Sun et al. 2024, https://arxiv.org/abs/2402.17762), on which the outputs hardly depend; and
what attention averages over many positions adds up over all of them.

Where there are no logits the gradients are those of a random direction in the outputs, scaled by their norm, and the
cost is half the expected squared relative error.

Second order holds for small changes alone. A sample that stands where a massive activation is about to appear or to
vanish can have hundreds of times the others' gradients, and its divergence saturates long before it is what they
promise; so no sample counts more than `CAP` times the median one. Costs of layers add up as long as they are small.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.nn.grad import conv1d_weight, conv2d_weight

from edgeport.compress.backward import visit_gradients
from edgeport.compress.statistics import padded
from edgeport.quantized import as_matrix

CAP = 4.0
"""A sample counts up to so many times the median of the samples'."""


@dataclass
class Sensitivity:
    """What an error of one layer costs.

    Attributes:
        fisher: mean over samples of the squared gradient: (N, K) of the weight as a matrix; of an embedding (K,), of
            its outputs' channels, summed over positions.
        looked_up: the weight is a table; each position reads one row.
    """

    fisher: torch.Tensor
    looked_up: bool

    @property
    def importance(self) -> torch.Tensor | None:
        """(K,) how much each column of the weight matters; None for a table, whose columns a position reads alike."""
        return None if self.looked_up else self.fisher.sum(0)

    def cost(self, change: torch.Tensor) -> float:
        """What a changed weight adds to the divergence, nats a sample (see the module).

        Args:
            change: (N, K), the new weight minus the float one.
        """
        # Every row of a table counts the same: which tokens a few samples hold says nothing about the others.
        square = change.square().mean(0) if self.looked_up else change.square()
        return 0.5 * float((square * self.fisher).sum())


def weight_gradient(layer: torch.nn.Module, value: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """The gradient of a layer's weight, as a matrix (N, K), from its input and its output's gradient.

    Args:
        layer: a Linear or a convolution, of any grouping.
    """
    if isinstance(layer, torch.nn.Linear):
        return gradient.flatten(0, -2).T @ value.flatten(0, -2)
    assert isinstance(layer, torch.nn.Conv1d | torch.nn.Conv2d)
    of_weight = conv1d_weight if isinstance(layer, torch.nn.Conv1d) else conv2d_weight
    found = of_weight(  # type: ignore[no-untyped-call]
        padded(layer, value),
        layer.weight.shape,
        gradient,
        stride=layer.stride,
        dilation=layer.dilation,
        groups=layer.groups,
    )
    return as_matrix(found)


@dataclass
class _Sum:
    """Squared gradients of samples: their shape, each sample's scaled to a sum of 1, and their size."""

    shape: torch.Tensor
    sizes: list[float]

    def mean(self, samples: int) -> torch.Tensor:
        """Over so many samples, none of which counts more than `CAP` times the median one that reaches the layer."""
        sizes = torch.tensor(self.sizes)
        return self.shape * (sizes.clamp_max(CAP * sizes.median()).mean() / samples)


def measure_sensitivity(
    module: torch.nn.Module,
    layers: Mapping[str, torch.nn.Module],
    inputs: Sequence[Mapping[str, torch.Tensor]],
    outputs: Sequence[str],
    *,
    seed: int = 0,
) -> dict[str, Sensitivity]:
    """Of every layer, by the names given; a layer that no sample reaches costs nothing.

    Args:
        module: in eval mode.
        inputs: samples as the module takes them.
        outputs: names of the outputs that count, in the module's order.
        seed: of the labels drawn.

    Raises:
        BadInputError: an activation is not finite; the message names the layer.
    """
    sums: dict[str, _Sum] = {}

    def add(name: str, _sample: int, value: torch.Tensor, gradient: torch.Tensor) -> None:
        layer = layers[name]
        if isinstance(layer, torch.nn.Embedding):
            square = gradient.square().flatten(0, -2).sum(0)
        else:
            square = weight_gradient(layer, value, gradient).square_()
        size = float(square.sum())
        if size > 0:
            found = sums.setdefault(name, _Sum(torch.zeros_like(square), []))
            found.shape.add_(square, alpha=1 / size)
            found.sizes.append(size)

    visit_gradients(module, layers, inputs, outputs, add, seed=seed)
    found = {}
    for name, layer in layers.items():
        looked_up = isinstance(layer, torch.nn.Embedding)
        if name in sums:
            fisher = sums[name].mean(len(inputs))
        else:
            shape = as_matrix(layer.get_parameter("weight")).shape
            fisher = torch.zeros(shape[1:] if looked_up else shape)
        found[name] = Sensitivity(fisher, looked_up)
    return found
