"""What a distillation step learns from, as the step says."""

from __future__ import annotations

from collections.abc import Callable

from edgeport.data.cards import load_card
from edgeport.data.corpus import corpus_samples
from edgeport.data.generated import generated_samples
from edgeport.data.samples import Samples, samples
from edgeport.distilling import Distill
from edgeport.model.types import Model

Report = Callable[[int, int, str], None]


def training_samples(student: Model, teacher: Model, step: Distill, *, progress: Report | None = None) -> Samples:
    """Inputs of the student. The same models, files and step give the same.

    Args:
        progress: called with (texts written, texts in all, what they are) while the teacher writes.

    Raises:
        BadInputError: the data can't be had, or is of another kind than the student's inputs.
    """
    asked = step.data
    if asked.generate is not None:
        return generated_samples(teacher, count=asked.generate, seed=step.seed, progress=progress)
    if asked.texts:
        return corpus_samples(
            student, asked.texts, count=asked.samples, key=asked.key, sequence=asked.sequence, seed=step.seed
        )
    card = None if asked.card is None else load_card(asked.card)
    return samples(student, count=asked.samples, split="calibration", seed=step.seed, card=card)
