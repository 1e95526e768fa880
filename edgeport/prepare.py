"""From a request to a job: load the model and decide everything; refuse what can't be done."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from edgeport.errors import BadInputError
from edgeport.job import ExportRequest, Job, lowered_like, lowering_settings
from edgeport.progress import Progress
from edgeport.storage import hash_value

if TYPE_CHECKING:
    from edgeport.model.types import Model
    from edgeport.restructuring import PruneVocabulary


def prepare(request: ExportRequest, progress: Progress, *, cache: bool = True, at_hand: Model | None = None) -> Job:
    """Load the model and decide everything; refuse what can't be done.

    Args:
        cache: give decoders a cache, where the target keeps one.
        at_hand: the request's model, where it is loaded already: several jobs may share it.

    Raises:
        BadInputError, TargetRefusesError: see `load_model`, `assign`, `check_settings`.
    """
    from edgeport.compress import assign
    from edgeport.compress.assign import check_precision, check_sparse
    from edgeport.compress.restructure import outline
    from edgeport.compress.stored import check_stored_inputs, open_for_target
    from edgeport.data.generated import check_generates
    from edgeport.export.dispatch import check_settings
    from edgeport.model.compressed import compressed_folder
    from edgeport.model.encoder_decoder import CACHED_SUFFIX
    from edgeport.model.load import load_model
    from edgeport.model.shapes import with_axis, with_limit

    check_precision(request.recipe, request.target)
    if at_hand is None:
        progress.stage("load", request.model)
    model = at_hand or load_model(
        request.model,
        name=request.name,
        task=None if (request.task or "").endswith(CACHED_SUFFIX) else request.task,
        example_inputs=request.example_inputs,
        allow_pickle=request.allow_pickle,
    )
    loaded = model
    if request.recipe.vocabulary is not None and compressed_folder(request.model) is None:
        model = _trimmed(model, request.recipe.vocabulary, progress)
    plain = model
    cached = _with_cache(model, request, progress) if cache else None
    if cached is not None:
        model = cached
    elif request.sequence is not None:
        model = with_axis(model, "sequence", request.sequence)
    if request.target.max_batch is not None:
        model = with_limit(model, "batch", request.target.max_batch)
    if request.target.max_sequence is not None and (model.decoder is None or model.decoder.cross):
        model = with_limit(model, "sequence", max(request.target.max_sequence, request.sequence or 0))
    settings = lowering_settings(request)
    if not cache:  # compression alone: what it makes keeps nothing
        settings = replace(settings, kv_cache="float")
    check_settings(model, request.target, settings)
    if model.decoder is not None:
        model = replace(model, decoder=replace(model.decoder, cache=settings.kv_cache))
    folder = compressed_folder(request.model)
    if folder is None:
        if request.recipe.calibrates and request.recipe.calibration.source == "generated":
            check_generates(model)
        shaped = None
        if request.recipe.restructure:
            check_sparse(request.recipe, request.target)
            shaped = lowered_like(model, outline(plain, request.recipe))
        assignments = assign(shaped or model, request.recipe, request.target)
        whole = None if loaded is plain else _whole(loaded, model)
        teachers = _teachers(request, plain, progress)
        uncached = None if cached is None else plain
        return Job(request, model, assignments, settings, None, uncached, shaped, whole, teachers)
    model, assignments, before = open_for_target(model, folder, request.recipe, request.target)
    job = Job(request, model, assignments, settings, before)
    check_stored_inputs(model, before.reference, job.sequences)
    return job


def _teachers(request: ExportRequest, student: Model, progress: Progress) -> dict[str, Model]:
    """The models that the recipe's distillation names.

    Raises:
        BadInputError: one can't be loaded, or does not fit the student.
    """
    from edgeport.compress.distill.checks import check_teacher
    from edgeport.model.load import load_model

    made: dict[str, Model] = {}
    for step in request.recipe.distill:
        if step.teacher is not None and step.teacher not in made:
            progress.stage("load", f"{step.teacher}, which teaches")
            made[step.teacher] = load_model(step.teacher, task=student.task, allow_pickle=request.allow_pickle)
        if step.teacher is not None:
            check_teacher(student, made[step.teacher], step)
    return made


def _trimmed(model: Model, step: PruneVocabulary, progress: Progress) -> Model:
    """The model with the tokens that the recipe's corpus uses.

    Raises:
        BadInputError: it can't be cut to so many, or the corpus can't be read.
    """
    from edgeport.compress.prune.trim import read_corpus, read_trimmed, write_trimmed
    from edgeport.stages import run_stage, stage_key

    values = {"files": dict(model.source.files), "tokens": step.tokens, "corpus": hash_value(read_corpus(step))}
    folder = run_stage(
        "vocabulary",
        stage_key("vocabulary", values),
        lambda out: write_trimmed(out, model, step),
        report=progress.message,
    )
    return read_trimmed(folder, model)


def _whole(loaded: Model, model: Model) -> Model:
    """The model before tokens were left out, with the cache or the axes that it is lowered with after that."""
    from edgeport.model.decoder import for_generation

    if model.decoder is not None:
        return for_generation(loaded, model.decoder.context)
    outputs = tuple(
        replace(
            spec,
            shape=tuple(size if isinstance(size, int) else other.shape[place] for place, size in enumerate(spec.shape)),
        )
        for spec, other in zip(loaded.outputs, model.outputs, strict=True)
    )
    return replace(loaded, inputs=model.inputs, outputs=outputs, example=model.example)


def _with_cache(model: Model, request: ExportRequest, progress: Progress) -> Model | None:
    """The model with a cache of keys and values, where it decodes, the target keeps one, and none was declined.

    Raises:
        BadInputError: settings that a cache makes no sense of, or that make no sense without one.
    """
    from edgeport.model.decoder import for_generation, is_causal_lm
    from edgeport.model.encoder_decoder import CACHED_SUFFIX, is_encoder_decoder

    task = model.task.removesuffix(CACHED_SUFFIX)
    kept = request.target.cache
    if is_encoder_decoder(model):
        delegate = None if request.target.executorch is None else request.target.executorch.delegate
        kept = kept and request.target.runtime != "coreml" and delegate != "coreml"
    generates = is_causal_lm(model) or is_encoder_decoder(model)
    wanted = request.task == task + CACHED_SUFFIX
    if (request.task or "").endswith(CACHED_SUFFIX) and not wanted:
        raise BadInputError(
            f"The model {model.name!r} has another task.",
            where="--task",
            allowed=[task, task + CACHED_SUFFIX] if generates else task,
        )
    declined = request.task == task or not kept or not generates
    if declined:
        if request.context is not None or wanted:
            raise BadInputError(
                "There is no cache of keys and values here: "
                + (
                    f"{model.name!r} is no language model that edgeport knows how to give one."
                    if not generates
                    else f"the target {request.target.name!r} keeps none."
                    if not kept
                    else "the task declines it."
                ),
                where="--task" if request.context is None else "--context",
                next_step="Leave it out, or choose another target (`edgeport targets`).",
            )
        return None
    if request.sequence is not None or request.shapes == "fixed":
        raise BadInputError(
            "A model with a cache takes any number of tokens a call: its sequence can't be fixed.",
            where="--sequence" if request.sequence is not None else "--shapes",
            next_step=f"Give --context for the tokens that the cache holds, or --task {task} for a model without one.",
        )
    try:
        return for_generation(model, request.context)
    except BadInputError as error:
        if request.context is not None or wanted or error.where != model.name:
            raise
        progress.message(f"{error.what} It is exported without a cache: it scores whole texts.")
        return None
