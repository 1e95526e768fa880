"""How much a changed weight costs: the divergence from the float model that each layer's error makes, by second order.

For a model with logits the mean KL divergence of a changed model from the float one is, to second order,
1/2 E[(g . e)^2] with g the gradient of log p(label) for labels drawn from the model itself (the Fisher
information) and e the change of a layer's output. Channels and positions of the gradient are taken as uncorrelated,
and a position's share in the gradient as the same for every channel; then it is

    1/2 sum over channels n of E[g_n^2] * d_n H d_n^T

for a change D of the weight, where H is the mean of x x^T over the positions, each weighted by its gradient's
energy: one forward and one backward a sample serve every layer and every format. The weights matter (compare the
factors of Martens and Grosse 2015, https://arxiv.org/abs/1503.05671, which take x and g as independent): language
models have positions with activations hundreds of times larger than all others (Sun et al. 2024,
https://arxiv.org/abs/2402.17762), and those are the ones that the outputs hardly depend on. Where there are no
logits the gradients are those of a random direction in the outputs, scaled by their norm, and the cost is half the
expected squared relative error.

Second order holds for small changes alone. A sample that stands where a massive activation is about to appear or to
vanish can have hundreds of times the others' gradients, and its divergence saturates long before it is what they
promise; so no sample counts more than `CAP` times the median one. Costs of layers add up as long as they are small.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from edgeport.compress.chain import call
from edgeport.compress.statistics import check_input, input_vectors
from edgeport.model.inputs import select_outputs
from edgeport.quantized import as_matrix

CAP = 4.0
"""A sample's energy counts up to so many times the median of the samples'."""


@dataclass
class Sensitivity:
    """What an error of one layer costs.

    Attributes:
        energy: mean over samples of the sum over positions of g^2: (N,) by channel of the output, (K,) for
            an embedding, whose rows are its outputs.
        second: (K, K) mean of x x^T over the layer's input vectors, weighted by the energy of their positions'
            gradients within a sample; None for an embedding or a grouped convolution.
        looked_up: the weight is a table; each position reads one row.
    """

    energy: torch.Tensor
    second: torch.Tensor | None
    looked_up: bool

    def cost(self, change: torch.Tensor) -> float:
        """What a changed weight adds to the divergence, nats a sample (see the module).

        Args:
            change: (N, K), the new weight minus the float one.
        """
        if self.looked_up:
            # Every row counts the same: which tokens a few samples hold says nothing about the others.
            return 0.5 * float((change.square().mean(0) * self.energy).sum())
        if self.second is None:
            return 0.5 * float((change.square().sum(1) * self.energy).sum())
        return 0.5 * float(((change @ self.second).mul_(change).sum(1) * self.energy).sum())


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


def _typical(energies: Sequence[torch.Tensor], samples: int) -> torch.Tensor:
    """The mean over samples, none of which counts more than `CAP` times the median one."""
    found = torch.stack([energy for energy in energies if energy.any()] or list(energies[:1]))
    totals = found.sum(1)
    return (found * (CAP * totals.median() / totals).nan_to_num(1).clamp_max(1)[:, None]).sum(0) / samples


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
        module: in eval mode. Its parameters' `requires_grad` is put back.
        inputs: samples as the module takes them.
        outputs: names of the outputs that count, in the module's order.
        seed: of the labels drawn.

    Raises:
        BadInputError: an activation is not finite; the message names the layer.
    """
    generator = torch.Generator().manual_seed(seed)
    energies: dict[str, list[torch.Tensor]] = {name: [] for name in layers}
    second: dict[str, torch.Tensor] = {}

    def hook(name: str) -> Any:
        def watch(layer: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
            result = output if output.requires_grad else output.detach().requires_grad_()
            value = inputs[0].detach()
            check_input(name, value)

            def note(gradient: torch.Tensor) -> None:
                channels = 1 if isinstance(layer, torch.nn.Conv1d | torch.nn.Conv2d) else gradient.dim() - 1
                squares = gradient.square().movedim(channels, -1).flatten(0, -2)
                energies[name].append(squares.sum(0))
                vectors, total = input_vectors(layer, value), float(squares.sum())
                if vectors is not None and total > 0:
                    shares = squares.sum(1, keepdim=True) / total
                    found = (vectors * shares).T @ vectors
                    second[name] = second[name] + found if name in second else found

            result.register_hook(note)  # type: ignore[no-untyped-call]
            return result

        return watch

    needed = [parameter.requires_grad for parameter in module.parameters()]
    module.requires_grad_(False)
    handles = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    try:
        with torch.enable_grad():
            for sample in inputs:
                drawn = objective(call(module, sample), outputs, generator)
                if drawn.requires_grad:  # otherwise no layer of these has a say in the outputs
                    drawn.backward()  # type: ignore[no-untyped-call]
    finally:
        for handle in handles:
            handle.remove()
        for parameter, value in zip(module.parameters(), needed, strict=True):
            parameter.requires_grad_(value)
    found = {}
    for name, layer in layers.items():
        looked_up = isinstance(layer, torch.nn.Embedding)
        if energies[name]:
            energy = _typical(energies[name], len(inputs))
        else:
            energy = torch.zeros(as_matrix(layer.get_parameter("weight")).shape[1 if looked_up else 0])
        mean = second[name] / len(energies[name]) if name in second else None
        found[name] = Sensitivity(energy, mean, looked_up)
    return found
