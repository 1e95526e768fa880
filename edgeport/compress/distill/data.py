"""What a distillation step learns from, as the step says."""

from __future__ import annotations

from collections.abc import Callable

from edgeport.data.answers import collect_answers
from edgeport.data.corpus import answer_samples, read_files
from edgeport.data.generated import generated_samples
from edgeport.data.samples import SampleRecord, Samples
from edgeport.data.sources import source_samples
from edgeport.distilling import Distill
from edgeport.model.types import Model

Report = Callable[[int, int, str], None]


def training_samples(student: Model, teacher: Model, step: Distill, *, progress: Report | None = None) -> Samples:
    """Inputs of the student. The same models, files and step give the same.

    Args:
        progress: called with (texts there, texts in all, what they are) while the teacher writes or answers.

    Raises:
        BadInputError: the data can't be had, or is of another kind than the student's inputs.
    """
    asked = step.data
    if asked.generate is not None:
        return generated_samples(teacher, count=asked.generate, seed=step.seed, progress=progress)
    if asked.prompts:
        assert asked.teacher is not None
        prompts, hashes = read_files(asked.prompts, asked.key)
        prompts = prompts[: asked.samples]
        answers = collect_answers(asked.teacher, prompts, progress=progress)
        who = asked.teacher.command or f"{asked.teacher.model} at {asked.teacher.endpoint}"
        words = f"answers of {who} to {len(prompts)} prompts"
        record = SampleRecord(", ".join(hashes), True, hashes, words, None, len(prompts))
        return answer_samples(student, prompts, answers, record, sequence=asked.sequence, chat=asked.chat)
    return source_samples(student, asked, count=asked.samples, seed=step.seed)
