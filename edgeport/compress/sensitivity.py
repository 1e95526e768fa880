"""How much a changed weight costs: the divergence from the float model that each layer's error makes, by second order.

For a model with logits the mean KL divergence of a changed model from the float one is, to second order,
1/2 E[(g . e)^2] with g the gradient of log p(label) for labels drawn from the model itself (the Fisher
information) and e the change of a layer's output. With inputs x and gradients g taken as independent
(Martens and Grosse 2015, https://arxiv.org/abs/1503.05671) and the gradient's channels as uncorrelated, that is

    1/2 sum over channels n of E[g_n^2] * d_n H d_n^T

for a change D of the weight, H = E[x x^T]: one forward and one backward a sample serve every layer and every
format. Where there are no logits the gradients are those of a random direction in the outputs, scaled by their
norm, and the cost is half the expected squared relative error. Costs of layers add up as long as they are small.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from edgeport.compress.chain import call
from edgeport.compress.statistics import Moments, observed
from edgeport.model.inputs import select_outputs
from edgeport.quantized import as_matrix


@dataclass
class Sensitivity:
    """What an error of one layer costs.

    Attributes:
        energy: mean over samples of the sum over positions of g^2: (N,) by channel of the output, (K,) for
            an embedding, whose rows are its outputs.
        second: (K, K) mean of x x^T over the layer's input vectors; None for an embedding or a grouped convolution.
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
    """
    generator = torch.Generator().manual_seed(seed)
    energy: dict[str, torch.Tensor] = {}

    def hook(name: str) -> Any:
        def watch(layer: torch.nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
            result = output if output.requires_grad else output.detach().requires_grad_()

            def note(gradient: torch.Tensor) -> None:
                channels = 1 if isinstance(layer, torch.nn.Conv1d | torch.nn.Conv2d) else gradient.dim() - 1
                others = [index for index in range(gradient.dim()) if index != channels]
                found = gradient.square().sum(others)
                energy[name] = energy[name] + found if name in energy else found

            result.register_hook(note)  # type: ignore[no-untyped-call]
            return result

        return watch

    needed = [parameter.requires_grad for parameter in module.parameters()]
    module.requires_grad_(False)
    handles = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    try:
        with observed(layers) as moments, torch.enable_grad():
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
        moment: Moments | None = moments.get(name)
        weight = as_matrix(layer.get_parameter("weight").detach())
        looked_up = isinstance(layer, torch.nn.Embedding)
        silent = torch.zeros(weight.shape[1 if looked_up else 0])
        second = None if moment is None else moment.second / moment.count
        found[name] = Sensitivity(energy.get(name, silent) / len(inputs), second, looked_up)
    return found
