"""Run suites on the original and on the artifact."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING

from edgeport.errors import BadInputError
from edgeport.packages import Progress
from edgeport.recipe import Recipe
from edgeport.validate.evidence import TaskScore
from edgeport.validate.suites.definition import NEEDS, Suite, load_suite, suite_names
from edgeport.validate.suites.kinds import Asked, Scores, Watch
from edgeport.validate.suites.remembered import Asker, Remembered
from edgeport.validate.suites.rows import load_rows
from edgeport.validate.suites.subject import Subject
from edgeport.validate.suites.traits import Traits
from edgeport.validate.tasks import score_task

if TYPE_CHECKING:
    import numpy as np

    from edgeport.data.sources import Recorded


def fits(suite: Suite, traits: Traits) -> bool:
    """Whether the suite can be asked of the model."""
    reads = traits.tokenizer is not None
    if suite.kind == "text_classification":
        return reads and (traits.embeds or traits.classifies_texts)
    answers = {
        "language_modelling": reads and traits.predicts_tokens,
        "next_word": reads and traits.predicts_tokens,
        "multiple_choice": reads and traits.predicts_tokens,
        "similarity": reads and traits.embeds,
        "retrieval": reads and traits.embeds,
        "image_classification": traits.classifies_pictures,
        "speech_recognition": traits.transcript is not None,
        "voice_activity": traits.hears_speech,
        "text_recognition": traits.reads_pictures,
        "custom": reads,
    }
    return answers[suite.kind]


def fitting_suites(traits: Traits) -> list[str]:
    """The suites that come with edgeport and can be asked of the model, sorted."""
    return [name for name in suite_names() if fits(load_suite(name)[0], traits)]


def most_tokens(suite: Suite, original: Asker, artifact: Asker) -> int:
    """The most tokens of a text that both models take."""
    return min(subject.most_tokens(suite.most_tokens) for subject in (original, artifact))


def remember(original: Subject, most: int, ask: Callable[[Asker, Asker], object]) -> dict[str, np.ndarray]:
    """What the original answers to a suite.

    Args:
        most: `most_tokens` of the two models.
        ask: runs the suite on two models.
    """
    asked = Remembered(original, most, {})
    ask(asked, asked)
    return asked.answers


def evaluate(
    reference: str,
    original: Asker,
    artifact: Asker,
    *,
    quick: bool = False,
    calibration: Collection[str] = (),
    watch: Watch = lambda done, total: None,
    progress: Progress | None = None,
) -> TaskScore:
    """Run one suite.

    Args:
        reference: its name, or the path of a TOML file.
        quick: a first look at few rows.
        calibration: texts that the artifact was calibrated on, which no suite may hold.
        watch: told (rows done, rows in all).

    Raises:
        BadInputError: the suite is wrong, can't be read, or can't be asked of this model.
    """
    suite, folder = load_suite(reference)
    check_fits(suite, original.traits)
    rows = load_rows(suite, folder, quick=quick, calibration=calibration, progress=progress)
    kind = importlib.import_module(f"edgeport.validate.suites.kinds.{suite.kind}")
    found: Scores = kind.score(Asked(suite, rows, original, artifact, watch))
    return score_task(
        suite=suite.name,
        metric=found.metric,
        unit=found.unit,
        original=found.original,
        artifact=found.artifact,
        data=rows.record,
        higher_is_better=found.higher_is_better,
        chance=found.chance,
        weights=found.weights,
        answers=found.answers,
        artifact_answers=found.artifact_answers,
        confidence=found.confidence,
        rows=found.rows,
    )


def learned_from(recipe: Recipe, modality: str, calibration: Recorded | None) -> frozenset[str]:
    """What an artifact was tuned and trained on; see `edgeport.data.sources.rows_of`.

    Args:
        recipe: that it was made with.
        calibration: the record of its calibration inputs, where there is one.
    """
    from edgeport.data.corpus import read_lines
    from edgeport.data.sources import rows_of, rows_of_record

    found: frozenset[str] = frozenset() if calibration is None else rows_of_record(calibration)
    if calibration is not None and recipe.calibration.named:
        found |= rows_of(recipe.calibration, modality)
    for step in recipe.distill:
        data = step.data
        files = [Path(file) for file in data.prompts if Path(file).is_file()]
        found |= {text for file in files for text in read_lines(file, data.key)}
        if not data.prompts and data.generate is None:
            found |= rows_of(data, modality)
    return found


def check_fits(suite: Suite, traits: Traits) -> None:
    """Refuse a suite that can't be asked of the model.

    Raises:
        BadInputError: naming the suites that can.
    """
    if not fits(suite, traits):
        raise BadInputError(
            f"The suite {suite.name!r} is for {NEEDS[suite.kind]}; the model's task is {traits.task}.",
            where="--suite",
            allowed=[*fitting_suites(traits), "or a suite of your own"],
        )
