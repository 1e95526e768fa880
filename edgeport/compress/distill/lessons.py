"""A recipe's distillation step: who teaches, on what, and where an interrupted training is kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from edgeport.compress.distill.data import training_samples
from edgeport.compress.distill.run import TrainingRecord, distil
from edgeport.compress.distill.train import Progress
from edgeport.data.samples import Samples
from edgeport.distilling import Distill
from edgeport.model.types import Model


@dataclass(frozen=True)
class Lessons:
    """What distillation needs beside the model.

    Attributes:
        teachers: by the MODEL that the step names.
        samples: gives the data of a step, for a student and its teacher.
        checkpoints: a folder for the state of trainings that were interrupted; None keeps none.
        progress: called with (updates done, updates in all, loss).
    """

    teachers: Mapping[str, Model] = field(default_factory=dict)
    samples: Callable[[Model, Model, Distill], Samples] = training_samples
    checkpoints: Path | None = None
    progress: Progress | None = None


def teach(model: Model, original: Model, step: Distill, lessons: Lessons, index: int) -> tuple[Model, TrainingRecord]:
    """The model after training.

    Args:
        original: the model before the recipe's cuts.
        index: of the step in the recipe.

    Raises:
        BadInputError, KeyboardInterrupt: see `distil`, and what gives the data.
    """
    teacher = original if step.teacher is None else lessons.teachers[step.teacher]
    data = lessons.samples(model, teacher, step)
    folder = lessons.checkpoints
    checkpoint = None if folder is None else folder / f"step-{index}.safetensors"
    return distil(model, teacher, step, data, checkpoint=checkpoint, progress=lessons.progress)
