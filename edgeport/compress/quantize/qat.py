"""Quantization-aware training: fine-tune codes and scales so that the whole model stays close to the float one.

In the manner of LLM-QAT (Liu et al. 2023, https://arxiv.org/abs/2305.17888): the float model teaches, real inputs
without labels are enough. Where a quantizing step looks at one layer at a time, this lowers the distance between
the models' outputs (`compress/distill.py`). Every weight is computed through its rounding (`straight.py`) on the
grid that the quantizing step chose; the result differs from what came in in codes, scales, norms and biases, and
in nothing that a backend must know about. Palettes stay as they are; so do other float weights. Activations are
float in training: a backend that rounds them on the fly adds its error to what is trained here.

A held-out fifth of the inputs decides. The state that is best on them is kept, and nothing is changed when none
is better than the start, so the result is never worse on them. The loop is `compress/distill/train.py`.

Memory: the float model and its quantized copy; for each trained weight the master, two moments, its gradient and
its present value; the activations of one sample; the teacher's outputs where they are smaller than its weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from edgeport.compress.chain import call
from edgeport.compress.distill.distance import Sample, Teacher, distance
from edgeport.compress.distill.train import Progress, Schedule, train
from edgeport.compress.quantize.held import split
from edgeport.compress.quantize.straight import TrainedWeight
from edgeport.errors import BadInputError
from edgeport.model.inputs import select_outputs
from edgeport.model.types import Model
from edgeport.quantized import QuantizedTensor, digest
from edgeport.recipe import Qat
from edgeport.storage import hash_value

FINER = 1.0
"""Learning rate of scales, norms and biases, each relative to its size, to that of weights in steps of the grid.

On MiniLM in 4 bits after GPTQ, 30 updates at 0.002: training loss 0.0323; with 0.1 here it was 0.0347.
"""

LEAST_SIZE = 1e-3
"""The size that biases are taken to have at least: they may begin as zeros."""

WARM_UP = 0.05
"""Share of the steps in which the learning rate rises."""

CHECKS = 10
"""How many times in a run the held-out loss is measured."""

CLIP = 1.0
"""Largest norm of all gradients together."""


@dataclass(frozen=True)
class Tuned:
    """What training made.

    Attributes:
        quantized: every compressed weight, by name.
        floats: norms and biases with their new values, by name; empty when the start was best.
        loss_before, loss_after: mean loss on the held-out inputs, at the start and of this result.
    """

    quantized: dict[str, QuantizedTensor]
    floats: dict[str, torch.Tensor]
    loss_before: float
    loss_after: float


class _Student(torch.nn.Module):
    """The quantized model with its trained parameters in place of its own. The module given is not changed."""

    def __init__(self, model: Model, *, masters: bool, seed: int) -> None:
        super().__init__()
        self.inner = model.module
        self.config = getattr(model.module, "config", None)
        parameters = dict(model.module.named_parameters())
        generator = torch.Generator().manual_seed(seed)
        self.trained = {
            name: TrainedWeight(tensor, generator) for name, tensor in model.quantized.items() if tensor.palette is None
        }
        self.floats = {
            name: torch.nn.Parameter(value.detach().clone())
            for name, value in parameters.items()
            if value.ndim == 1 and value.is_floating_point() and name not in model.quantized
        }
        self.masters = [weight.master for weight in self.trained.values()] if masters else []
        fixed = {name: value.detach() for name, value in parameters.items() if name not in self.trained}
        self.values: dict[str, torch.Tensor] = fixed | self.floats

    def refresh(self) -> None:
        """Compute the weights anew from what is trained."""
        with torch.no_grad():
            self.values |= {name: weight.value().requires_grad_() for name, weight in self.trained.items()}

    def forward(self, **inputs: torch.Tensor) -> object:
        return torch.func.functional_call(self.inner, self.values, kwargs=inputs)

    def pass_on(self) -> None:
        """Hand the weights' gradients on to masters and scales, one weight at a time to bound the memory."""
        for name, weight in self.trained.items():
            gradient, self.values[name].grad = self.values[name].grad, None
            if gradient is not None:  # a weight that this task's outputs do not use
                weight.value().backward(gradient)  # type: ignore[no-untyped-call]

    def groups(self, rate: float) -> list[dict[str, Any]]:
        """Parameters with their learning rates."""
        scales = [weight.log_ratio for weight in self.trained.values()]
        groups: list[dict[str, Any]] = [{"params": scales, "lr": rate * FINER}]
        if self.masters:
            groups.append({"params": self.masters, "lr": rate})
        for value in self.floats.values():
            size = float(value.detach().square().mean().sqrt())
            groups.append({"params": [value], "lr": rate * FINER * max(size, LEAST_SIZE)})
        return groups


@dataclass(frozen=True)
class _Tuning:
    """What the loop trains (edgeport.compress.distill.train.Trainee)."""

    student: _Student
    settings: Qat
    inputs: Sequence[Sample]
    taught: Teacher
    held: Sequence[int]

    def groups(self) -> list[dict[str, Any]]:
        """Parameters with their learning rates."""
        return self.student.groups(self.settings.learning_rate)

    def _loss(self, index: int) -> torch.Tensor:
        found = select_outputs(call(self.student, self.inputs[index]), self.taught.outputs)
        return distance(found, self.taught(index), self.inputs[index])

    def loss(self, indices: Sequence[int], generator: torch.Generator) -> torch.Tensor:
        """Mean loss of some inputs."""
        return torch.stack([self._loss(index) for index in indices]).mean()

    def judge(self) -> float:
        """Mean loss on the held-out inputs."""
        with torch.no_grad():
            return sum(float(self._loss(index)) for index in self.held) / len(self.held)

    def before_update(self) -> None:
        """Hand the weights' gradients on."""
        self.student.pass_on()

    def after_update(self) -> None:
        """Stay on the grid, and compute the weights anew."""
        for weight in self.student.trained.values():
            weight.stay_on_grid()
        self.student.refresh()


def fine_tune(
    model: Model,
    teacher: Model,
    inputs: Sequence[Sample],
    settings: Qat,
    *,
    checkpoint: Path | None = None,
    progress: Progress | None = None,
) -> Tuned:
    """Train a quantized model towards the float one.

    Args:
        model: with quantized weights; the module is not changed.
        teacher: the float model it was made of.
        inputs: samples as the module takes them, batch 1.
        checkpoint: a file to go on from and to write to (edgeport.compress.distill.train).

    Raises:
        BadInputError: there are fewer than two inputs, the models' outputs are not finite on them, or the checkpoint
            is of another run.
    """
    held, used = split(len(inputs), settings.seed)
    outputs = tuple(spec.name for spec in model.outputs)
    weights_bytes = sum(value.numel() * value.element_size() for value in teacher.module.parameters())
    taught = Teacher(teacher.module, inputs, outputs, budget=weights_bytes)
    student = _Student(model, masters=settings.train == "weights", seed=settings.seed)
    trainee = _Tuning(student, settings, inputs, taught, held)
    student.refresh()
    schedule = Schedule(
        steps=settings.steps, accumulate=settings.batch, warm_up=WARM_UP, checks=CHECKS, clip=CLIP, seed=settings.seed
    )
    start = {name: digest(tensor) for name, tensor in sorted(model.quantized.items())}
    identity = hash_value({"settings": settings.model_dump(mode="json"), "start": start, "inputs": len(inputs)})
    curve = train(trainee, used, schedule, checkpoint=checkpoint, identity=identity, progress=progress)
    if not math.isfinite(curve.before):
        raise BadInputError(
            "The calibration data makes outputs that are not finite.",
            where="[calibration]",
            next_step="Check the checkpoint and its preprocessing.",
        )
    if curve.best == 0:
        return Tuned(dict(model.quantized), {}, curve.before, curve.after)
    quantized = dict(model.quantized) | {name: weight.tensor() for name, weight in student.trained.items()}
    floats = {name: value.detach().clone() for name, value in student.floats.items()}
    return Tuned(quantized, floats, curve.before, curve.after)
