"""How far a changed model is from the float one, as a loss: what quantization-aware training lowers.

For logits it is the KL divergence of the float model's distribution, mean over positions, nats (Hinton et al. 2015,
https://arxiv.org/abs/1503.02531, at temperature 1; LLM-QAT, https://arxiv.org/abs/2305.17888, section 2.2). For any
other output it is the squared error relative to the float output's squared norm. Padding does not count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from edgeport.compress.chain import call
from edgeport.model.inputs import select_outputs

Sample = Mapping[str, torch.Tensor]


def distance(student: Mapping[str, torch.Tensor], teacher: Mapping[str, torch.Tensor], sample: Sample) -> torch.Tensor:
    """The loss of one sample, a scalar: summed over the outputs.

    Args:
        student, teacher: outputs of the two models on `sample`, by name, equal shapes.
        sample: positions whose `attention_mask` is 0 are left out of outputs of shape (batch, sequence, ...).
    """
    mask = sample.get("attention_mask")
    total = torch.zeros(())
    for name, wanted in teacher.items():
        if not wanted.is_floating_point():
            continue
        value = student[name]
        if mask is not None and wanted.ndim > 2 and wanted.shape[:2] == mask.shape:
            value, wanted = value[mask.bool()], wanted[mask.bool()]
        if name == "logits":
            classes = wanted.shape[-1]
            logs, target = value.reshape(-1, classes).log_softmax(-1), wanted.reshape(-1, classes).log_softmax(-1)
            term = torch.nn.functional.kl_div(logs, target, reduction="batchmean", log_target=True)
        else:
            term = (value - wanted).square().sum() / wanted.square().sum().clamp_min(1e-12)
        total = total + term
    return total


class Teacher:
    """The float model's outputs, by the sample's index: kept while all of them take no more bytes than `budget`."""

    def __init__(
        self, module: torch.nn.Module, inputs: Sequence[Sample], outputs: Sequence[str], *, budget: int
    ) -> None:
        self.module, self.inputs, self.outputs = module, inputs, outputs
        self.left = budget
        self.kept: dict[int, dict[str, torch.Tensor]] = {}

    def __call__(self, index: int) -> dict[str, torch.Tensor]:
        """Outputs of one sample, without gradients."""
        if index in self.kept:
            return self.kept[index]
        with torch.no_grad():
            found = select_outputs(call(self.module, self.inputs[index]), self.outputs)
        size = sum(value.numel() * value.element_size() for value in found.values())
        if size <= self.left:
            self.left -= size
            self.kept[index] = found
        return found
