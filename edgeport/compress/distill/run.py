"""Distil: train a model, which is not changed, towards a teacher, and record what that did."""

from __future__ import annotations

import copy
import fnmatch
import hashlib
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from edgeport.compress.distill.batch import SIDE, Sample, collate
from edgeport.compress.distill.checks import check_step, check_teacher
from edgeport.compress.distill.objective import Objective, to_device
from edgeport.compress.distill.sampling import prompt_length
from edgeport.compress.distill.train import Progress, Schedule, train
from edgeport.compress.quantize.held import in_turns, split
from edgeport.data.samples import SampleRecord, Samples
from edgeport.distilling import Distill
from edgeport.errors import BadInputError
from edgeport.model.digest import state_digest
from edgeport.model.types import Model
from edgeport.storage import hash_value


@dataclass(frozen=True)
class TrainingRecord:
    """What a distillation did; a function of its inputs.

    Attributes:
        teacher: what taught: a MODEL as the recipe names it, or "the model before the cuts".
        teacher_sha256: over the teacher's weights.
        data: what was learned from.
        data_sha256: over the inputs themselves.
        loss_before, loss_after: on the held-out inputs, at the start and of the result.
        held_out: (update, that loss) at every check; the best is kept.
        training: (update, mean training loss since the check before) at every check.
        best: update of the result; 0 where nothing was better than the start.
        steps: updates made.
        ended: "all steps", "no better" or "diverged".
        inputs, inputs_held_out: how many were learned from, and how many judged.
        tokens: of the inputs of all updates together, repeats and padding included; None for other inputs than text.
        parameters: values that were trained.
    """

    teacher: str
    teacher_sha256: str
    data: SampleRecord
    data_sha256: str
    loss_before: float
    loss_after: float
    held_out: tuple[tuple[int, float], ...]
    training: tuple[tuple[int, float], ...]
    best: int
    steps: int
    ended: str
    inputs: int
    inputs_held_out: int
    tokens: int | None
    parameters: int


HEALING = "the model before the cuts"


class _Distillation:
    """The student in training."""

    def __init__(
        self, student: Model, teacher: Model, step: Distill, inputs: Sequence[Sample], held: Sequence[int]
    ) -> None:
        self.step, self.inputs, self.held = step, inputs, held
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.module = student.module.requires_grad_(True)
        if self.device.type != "cpu":
            teacher = replace(teacher, module=copy.deepcopy(teacher.module))
        self.mixed = step.precision == "mixed" or (step.precision == "auto" and self.device.type == "cuda")
        self.writes = step.policy_gradient or step.on_policy > 0
        frozen = {
            parameter
            for name, parameter in self.module.named_parameters(remove_duplicate=False)
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in step.freeze)
        }
        for parameter in frozen:
            parameter.requires_grad_(False)
        self.objective = Objective(student, teacher, step)
        for part in (self.module, self.objective.matrices, teacher.module) if self.device.type != "cpu" else ():
            part.to(self.device)
        # Zeros that pruning made stay zeros.
        self.zeros = {
            name: self.module.get_parameter(name).detach() == 0
            for name in student.sparse
            if self.module.get_parameter(name) not in frozen
        }

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        return [parameter for parameter in self.module.parameters() if parameter.requires_grad]

    def groups(self) -> list[dict[str, Any]]:
        """All weights at one rate; biases and norms don't decay."""
        rate = self.step.learning_rate
        matrices = [one for one in self.parameters if one.ndim >= 2]
        others = [one for one in self.parameters if one.ndim < 2]
        beside = list(self.objective.matrices.parameters())
        groups = [{"params": [*matrices, *beside], "lr": rate}, {"params": others, "lr": rate, "weight_decay": 0.0}]
        return [group for group in groups if group["params"]]

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.mixed)

    def _parts(self, indices: Sequence[int]) -> list[dict[str, torch.Tensor]]:
        """The inputs in one batch; each by itself where they can't be put together, or are to be continued from
        different places."""
        samples = [self.inputs[index] for index in indices]
        starts = {prompt_length(sample, self.step.prompt_tokens) for sample in samples} if self.writes else {0}
        batch = collate(samples) if len(starts) == 1 else None
        return [to_device(part, self.device) for part in ([batch] if batch is not None else samples)]

    def loss(self, indices: Sequence[int], generator: torch.Generator) -> torch.Tensor:
        """Mean loss of some inputs."""
        step, objective = self.step, self.objective
        with self._autocast():
            if step.policy_gradient:
                losses = [objective.policy_gradient(part, generator) for part in self._parts(indices)]
            elif step.on_policy and float(torch.rand((), generator=generator)) < step.on_policy:
                losses = [objective.on_policy(part, generator) for part in self._parts(indices)]
            else:
                losses = [objective(part) for part in self._parts(indices)]
        return torch.stack(losses).mean()

    def judge(self) -> float:
        """Mean loss on the held-out inputs, as they are."""
        size, total = self.step.batch, 0.0
        for start in range(0, len(self.held), size):
            part = self.held[start : start + size]
            with torch.no_grad(), self._autocast():
                losses = [float(self.objective(one)) for one in self._parts(part)]
            total += sum(losses) / len(losses) * len(part)
        return total / len(self.held)

    def before_update(self) -> None:
        """Nothing to do."""

    def after_update(self) -> None:
        """Put the zeros back."""
        with torch.no_grad():
            for name, zeros in self.zeros.items():
                self.module.get_parameter(name).masked_fill_(zeros, 0.0)


def _held(count: int, step: Distill) -> tuple[list[int], list[int]]:
    """Indices of the inputs that judge, at most `held_out`, and of those that are learned from."""
    judges, used = split(count, step.seed)
    held = judges[: step.held_out]
    return held, sorted([*used, *judges[step.held_out :]])


def training_tensors(model: Model, data: Samples) -> list[dict[str, torch.Tensor]]:
    """Samples as the module takes them, and what they have beside that; true classes where the data has them."""
    dtypes = {spec.name: getattr(torch, spec.dtype) for spec in model.inputs} | dict.fromkeys(SIDE, torch.int64)
    made = [
        {name: torch.from_numpy(value).to(dtypes[name]) for name, value in sample.items()} for sample in data.inputs
    ]
    for sample, label in zip(made, data.labels, strict=False):
        sample["labels"] = torch.tensor([label])
    return made


def digest_inputs(inputs: Sequence[Sample]) -> str:
    """sha256 over names, shapes and bytes of inputs."""
    digest = hashlib.sha256()
    for sample in inputs:
        for name, value in sample.items():
            digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
            digest.update(value.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _tokens(inputs: Sequence[Sample], used: Sequence[int], schedule: Schedule, steps: int) -> int | None:
    """Tokens of the inputs that so many updates drew."""
    if "input_ids" not in inputs[0]:
        return None
    following = in_turns(used, schedule.seed)
    return sum(inputs[following()]["input_ids"].numel() for _ in range(steps * schedule.accumulate * schedule.batch))


def distil(
    model: Model,
    teacher: Model,
    step: Distill,
    data: Samples,
    *,
    checkpoint: Path | None = None,
    progress: Progress | None = None,
) -> tuple[Model, TrainingRecord]:
    """A trained copy of a model, and what was done.

    Args:
        teacher: `model` before it was cut, or another one with the same vocabulary.
        data: inputs as `edgeport.data` gives them.
        checkpoint: a file to go on from and to write to; gone when the training is at its end.

    Raises:
        BadInputError: the teacher or the step does not fit the model, the data is too small or makes outputs that are
            not finite, or the checkpoint is of another run.
        KeyboardInterrupt: the user interrupted; the checkpoint is written.
    """
    check_teacher(model, teacher, step)
    check_step(model, step)
    inputs = training_tensors(model, data)
    held, used = _held(len(inputs), step)
    student = replace(model, module=copy.deepcopy(model.module))
    trained = _Distillation(student, teacher, step, inputs, held)
    teacher_hash, data_hash = state_digest(teacher.module), digest_inputs(inputs)
    count = sum(parameter.numel() for parameter in trained.parameters)
    schedule = Schedule(
        steps=step.steps,
        batch=step.batch,
        accumulate=step.accumulate,
        weight_decay=step.weight_decay,
        warm_up=step.warm_up,
        checks=step.checks,
        patience=step.patience,
        seed=step.seed,
    )
    facts = {"step": step.model_dump(mode="json", exclude={"data"}), "start": state_digest(model.module)}
    curve = train(
        trained,
        used,
        schedule,
        checkpoint=checkpoint,
        identity=hash_value({**facts, "teacher": teacher_hash, "data": data_hash, "device": trained.device.type}),
        progress=progress,
    )
    if not math.isfinite(curve.before):
        raise BadInputError(
            "The models' outputs on the training data are not finite.",
            where="distill",
            next_step="Check the checkpoints and their preprocessing.",
        )
    module = student.module.cpu().requires_grad_(False)
    record = TrainingRecord(
        teacher=HEALING if step.teacher is None else step.teacher,
        teacher_sha256=teacher_hash,
        data=data.record,
        data_sha256=data_hash,
        loss_before=curve.before,
        loss_after=curve.after,
        held_out=curve.held_out,
        training=curve.training,
        best=curve.best,
        steps=curve.steps,
        ended=curve.ended,
        inputs=len(used),
        inputs_held_out=len(held),
        tokens=_tokens(inputs, used, schedule, curve.steps),
        parameters=count,
    )
    return replace(student, module=module), record
