"""Suites of an export and of a bundle: which ones, on which two models, and what of it is already known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeport.errors import BadInputError
from edgeport.job import Job, model_key
from edgeport.progress import Progress
from edgeport.storage import canonical_json, hash_file, hash_value, read_json

if TYPE_CHECKING:
    from edgeport.budgets import Budgets
    from edgeport.bundle.read import Bundle
    from edgeport.data.samples import SampleRecord
    from edgeport.export.artifact import Artifact
    from edgeport.model.types import Model
    from edgeport.validate.evidence import TaskScore
    from edgeport.validate.suites.subject import Subject


def wanted(asked: Sequence[str], budgets: Budgets) -> tuple[str, ...]:
    """The suites to run: those asked for, and those that a budget is on. Each once, in this order."""
    from edgeport.budgets import EVERY_SUITE

    return tuple(dict.fromkeys([*asked, *(name for name in budgets.accuracy if name != EVERY_SUITE)]))


def check(job: Job) -> None:
    """Refuse suites that can't be asked of the model, before anything long starts.

    Raises:
        BadInputError: there is no such suite, it is for other models, or the original is not here.
    """
    from edgeport.validate.suites.definition import load_suite
    from edgeport.validate.suites.evaluate import check_fits
    from edgeport.validate.suites.traits import traits_of

    names = wanted(job.request.suites, job.request.recipe.gate)
    for name in names:
        check_fits(load_suite(name)[0], traits_of(job.uncached))
    if names and job.compressed is not None:
        raise BadInputError(
            "A suite compares with the original, which is not in a compressed folder.",
            where="--suite",
            next_step="Export without suites, then run `edgeport validate BUNDLE --suite NAME --original MODEL`.",
        )


def ask(job: Job, artifact: Artifact, calibration: SampleRecord | None, progress: Progress) -> tuple[TaskScore, ...]:
    """Run the suites of an export. Each is a stage of its own, so that an interrupted run goes on with the next.

    Args:
        calibration: what the artifact was calibrated on.

    Raises:
        BadInputError: a suite's rows can't be fetched, are wrong, or are calibration data.
    """
    from edgeport.stages import run_stage, stage_key
    from edgeport.validate.evidence import TaskScore
    from edgeport.validate.suites.evaluate import learned_from
    from edgeport.validate.suites.subject import of_artifact, of_model

    names = wanted(job.request.suites, job.request.recipe.gate)
    if not names or job.request.target.execution.here == "none":
        return ()
    known = learned_from(job.request.recipe, job.model.modality, calibration)

    @cache
    def subjects() -> tuple[Subject, Subject]:
        """The two models, loaded when a suite is not in the stage cache."""
        original = of_model(job.uncached)
        return original, of_artifact(artifact, original.traits, lengths=job.sequences)

    found = []
    for name in names:
        inputs = {
            **_inputs(name, job.uncached_key, quick=job.request.quick, progress=progress),
            "artifact": job.lower_key,
            "calibration": hash_value(sorted(known)),
        }

        def make(out: Path, name: str = name) -> None:
            score = _score(name, *subjects(), job.uncached_key, job.request.quick, known, progress)
            (out / "score.json").write_text(canonical_json(score.model_dump(mode="json")))

        stored = run_stage("suite", stage_key("suite", inputs), make, report=progress.message)
        found.append(TaskScore(**read_json(stored / "score.json")))
    return tuple(found)


def _inputs(name: str, original: str, *, quick: bool, progress: Progress) -> dict[str, Any]:
    """What decides what the original answers to a suite, with its files fetched.

    Args:
        original: `edgeport.job.model_key` of the original.
    """
    from edgeport.validate.suites.definition import load_suite
    from edgeport.validate.suites.rows import suite_files

    suite, folder = load_suite(name)
    progress.stage("validate", f"suite {suite.name}: {suite.title}")
    files = suite_files(suite, folder, progress.message)
    return {
        "suite": suite.model_dump(mode="json"),
        "data": [hash_file(path) for path in files if path.is_file()],
        "original": original,
        "quick": quick,
    }


def _score(
    name: str,
    original: Subject,
    shipped: Subject,
    key: str,
    quick: bool,
    calibration: frozenset[str],
    progress: Progress,
) -> TaskScore:
    """One suite. The original's answers are a stage of their own, so that it is asked once, whatever is made of it.

    Args:
        key: `edgeport.job.model_key` of the original.
    """
    from edgeport.stages import run_stage, stage_key
    from edgeport.validate.suites.definition import load_suite
    from edgeport.validate.suites.evaluate import evaluate, most_tokens, remember
    from edgeport.validate.suites.remembered import ANSWERS, Asker, Remembered, read_answers, write_answers

    suite, _ = load_suite(name)
    how = partial(evaluate, quick=quick, calibration=calibration, watch=progress.update, progress=progress.message)
    asked: Asker = original
    if suite.kind != "custom":  # whose function is given whole outputs, too large to be kept
        most = most_tokens(suite, original, shipped)
        inputs = {**_inputs(name, key, quick=quick, progress=progress), "most_tokens": most}

        def make(out: Path) -> None:
            write_answers(remember(original, most, partial(how, name)), out / ANSWERS)

        stored = run_stage("suite-original", stage_key("suite-original", inputs), make, report=progress.message)
        asked = Remembered(original, most, read_answers(stored / ANSWERS))
    return how(name, asked, shipped)


def ask_bundle(
    bundle: Bundle, names: Sequence[str], original: str | None, *, quick: bool, progress: Progress
) -> tuple[TaskScore, ...]:
    """Run suites on a bundle and on the model that it was made of.

    Args:
        names: suites beside those that the recipe has budgets on.
        original: the model as `edgeport export` was given it; None takes what the manifest names, if it is the zoo's.

    Raises:
        BadInputError: the original is not there, or is not the one that the bundle was made of.
    """
    manifest = bundle.manifest
    names = wanted(names, manifest.recipe.gate)
    if not names or manifest.target.execution.here == "none":
        return ()
    why = f"The suites {', '.join(names)} compare with the original, which is not in the bundle."
    model = original_of(bundle, original, why, progress)
    return score_suites(bundle, model, names, quick=quick, progress=progress)


def original_of(bundle: Bundle, original: str | None, why: str, progress: Progress) -> Model:
    """The model that a bundle was made of, without a cache.

    Args:
        original: as `edgeport export` was given it; None takes what the manifest names, if it is the zoo's.
        why: it is needed, a sentence.

    Raises:
        BadInputError: it is not there, or is not the one that the bundle was made of.
    """
    from edgeport.model.load import load_model

    manifest = bundle.manifest
    if original is None and manifest.source.kind == "zoo":
        original = manifest.source.reference
    if original is None:
        raise BadInputError(
            why,
            where="--original",
            next_step=f"Give the model that the bundle was made of ({manifest.source.reference}) as --original MODEL.",
        )
    progress.stage("load", original)
    model = load_model(original, task=manifest.task.removesuffix("-with-past"), progress=progress.message)
    if dict(model.source.files) != manifest.source.files:
        changed = sorted(set(model.source.files.items()) ^ set(manifest.source.files.items()))
        raise BadInputError(
            f"The model is not the one that the bundle was made of: {changed[0][0]} differs.",
            where=original,
            allowed=f"the files of {manifest.source.reference} with the sha256 that the manifest names",
        )
    return model


def score_suites(
    bundle: Bundle, model: Model, names: Sequence[str], *, quick: bool, progress: Progress
) -> tuple[TaskScore, ...]:
    """Run these suites on a bundle and on the model that it was made of.

    Raises:
        BadInputError: a suite is wrong, can't be read, or can't be asked of this model.
    """
    from edgeport.validate.suites.evaluate import learned_from
    from edgeport.validate.suites.subject import of_artifact, of_model

    manifest = bundle.manifest
    before = of_model(model)
    tokenizer = bundle.root / manifest.assets / "tokenizer.json"
    traits = replace(before.traits, tokenizer=tokenizer if tokenizer.is_file() else None)
    after = of_artifact(bundle.artifact, traits, lengths=manifest.settings.enumerated)
    known = learned_from(manifest.recipe, manifest.modality, manifest.calibration)
    key = model_key(model)
    return tuple(_score(name, before, after, key, quick, known, progress) for name in names)
