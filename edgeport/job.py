"""A job: a user's request with everything decided and nothing long done.

The keys of all stages follow from it. They form a chain (the key of a lowering holds the key of the
compression before it), so each is known before anything is computed, which is what a plan shows.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from edgeport.errors import BadInputError
from edgeport.storage import cache_root, hash_value

if TYPE_CHECKING:
    from edgeport.compress import Assignment
    from edgeport.compress.stored import Stored
    from edgeport.export.artifact import LoweringSettings
    from edgeport.model.types import Model
    from edgeport.plan import Plan
    from edgeport.recipe import Recipe
    from edgeport.restructuring import PruneVocabulary
    from edgeport.target import Target

StageName = Literal["load", "reference", "restructure", "compress", "scales", "lower", "baseline", "validate", "bundle"]


class Progress(Protocol):
    """Who watches a run: the command line draws it, tests ignore it."""

    def stage(self, name: str, detail: str = "") -> None:
        """A new stage begins."""

    def update(self, done: int, total: int, detail: str = "") -> None:
        """The stage got this far."""

    def message(self, text: str) -> None:
        """One line worth keeping."""


class Silent:
    """A Progress that shows nothing."""

    def stage(self, name: str, detail: str = "") -> None:
        """Ignored."""

    def update(self, done: int, total: int, detail: str = "") -> None:
        """Ignored."""

    def message(self, text: str) -> None:
        """Ignored."""


@dataclass(frozen=True)
class ExportRequest:
    """What the user asked for.

    Attributes:
        model: a reference as `edgeport.model.load.load_model` takes it.
        output: the bundle's folder.
        shapes: None takes the target's default.
        sequence: length of the sequence axis, fixed or traced with; it moves the limit that the target sets.
        context: tokens that a decoder's cache holds; None takes the model's own, at most 2048.
        enumerated: lengths of the sequence axis to enumerate (Core ML).
        samples: real inputs to compare on; a model with large outputs uses fewer.
        reference_bytes: most bytes of reference outputs; at least four samples are kept whatever they take.
        quick: a short latency run, flagged not valid; full: one that is valid by MLPerf's measure, which a recipe with
            a latency budget asks for anyway.
        suites: to run beside those that the recipe has budgets on.
    """

    model: str
    target: Target
    recipe: Recipe
    output: Path
    force: bool = False
    name: str | None = None
    task: str | None = None
    example_inputs: Path | None = None
    allow_pickle: bool = False
    shapes: Literal["fixed", "dynamic"] | None = None
    sequence: int | None = None
    context: int | None = None
    enumerated: tuple[int, ...] = ()
    image_input: bool = False
    ort_format: bool | None = None
    samples: int = 64
    quick: bool = False
    full: bool = False
    suites: tuple[str, ...] = ()
    reference_bytes: int = 400_000_000


def lowering_settings(request: ExportRequest) -> LoweringSettings:
    """The settings of a request with the target's defaults filled in."""
    from edgeport.export.artifact import LoweringSettings

    target = request.target
    asked = request.recipe.lower.precision
    shapes = request.shapes or ("fixed" if request.sequence else target.shapes[0])
    options = target.onnxruntime
    return LoweringSettings(
        precision=target.precisions[0] if asked == "target" else asked,
        shapes=shapes,
        enumerated=request.enumerated,
        image_input=request.image_input,
        ort_format=bool(options and options.ort_format) if request.ort_format is None else request.ort_format,
        kv_cache=request.recipe.lower.kv_cache,
    )


@dataclass(frozen=True)
class Job:
    """A request with everything decided and nothing long done: the model is loaded, each weight has its format.

    The keys of all stages follow from it.

    Attributes:
        compressed: what `edgeport compress` made, where the model is such a folder; `model` is then compressed.
        plain: the model as compression sees it: a decoder without its cache. So the same compression serves both.
        shaped: the model in the shapes that the recipe's pruning leads to, as it is lowered; its values are no one's.
            None where the recipe does not restructure.
        whole: the model with all of its tokens, as it is lowered, where the recipe leaves some out: the baseline.
        teachers: the models that the recipe's distillation names, by that name.
    """

    request: ExportRequest
    model: Model
    assignments: tuple[Assignment, ...]
    settings: LoweringSettings
    compressed: Stored | None = None
    plain: Model | None = None
    shaped: Model | None = None
    whole: Model | None = None
    teachers: Mapping[str, Model] = field(default_factory=dict)

    @cached_property
    def model_key(self) -> str:
        """Hash of the model: source files, weights, inputs."""
        return self._model_key(self.model)

    @property
    def uncached(self) -> Model:
        """The model without a cache."""
        return self.plain or self.model

    @cached_property
    def uncached_key(self) -> str:
        """Hash of the model without a cache."""
        return self._model_key(self.uncached)

    @cached_property
    def state(self) -> str:
        """Hash of the model's weights."""
        from edgeport.model.digest import state_digest

        return state_digest(self.model.module)

    def _model_key(self, model: Model) -> str:
        from edgeport.model.digest import state_digest

        return hash_value(
            {
                "files": dict(model.source.files),
                "state": self.state if model is not self.whole else state_digest(model.module),
                "architecture": type(model.module).__qualname__,
                "task": model.task,
                "inputs": [asdict(spec) for spec in model.inputs],
                "outputs": [spec.name for spec in model.outputs],
            }
        )

    @cached_property
    def sample_count(self) -> int:
        """Samples compared, so few that the reference outputs stay below the request's limit."""
        per_sample = 0
        for spec in self.model.outputs:
            count = 1
            for size in spec.fixed_shape():
                count *= size
            per_sample += count * 4
        return max(4, min(self.request.samples, self.request.reference_bytes // max(per_sample, 1)))

    @cached_property
    def sequences(self) -> tuple[int, ...]:
        """Lengths that samples are padded to; empty for natural lengths."""
        if self.settings.enumerated:
            return self.settings.enumerated
        if self.settings.shapes == "fixed":
            from edgeport.model.shapes import axes

            axis = axes(self.model.inputs).get("sequence")
            return () if axis is None else (axis.example,)
        return ()

    @cached_property
    def reference_key(self) -> str:
        """Key of the float outputs on real inputs."""
        from edgeport.stages import stage_key

        return stage_key(
            "reference", {"model": self.model_key, "samples": self.sample_count, "sequences": self.sequences}
        )

    @cached_property
    def restructure_key(self) -> str:
        """Key of the model after pruning, factorizing and the like."""
        from edgeport.restructuring import needs_data
        from edgeport.stages import stage_key

        recipe = self.request.recipe
        steps = recipe.restructure
        tuned = recipe.calibration.model_dump() if any(needs_data(step) for step in steps) else None
        values = {"model": self.uncached_key, "calibration": tuned, "lessons": self._lessons()}
        return stage_key("restructure", {**values, "steps": [step.model_dump(mode="json") for step in steps]})

    def _lessons(self) -> list[dict[str, Any]]:
        """What the recipe's distillation reads beside the model: hashes of teachers and files."""
        from edgeport.data.corpus import hash_files
        from edgeport.model.digest import state_digest

        teachers = {name: state_digest(model.module) for name, model in self.teachers.items()}
        return [
            {"teacher": teachers.get(step.teacher or ""), "texts": hash_files(step.data.texts)}
            for step in self.request.recipe.distill
        ]

    @cached_property
    def compress_key(self) -> str:
        """Key of the quantized weights."""
        from edgeport.stages import stage_key

        rows = [asdict(item) for item in self.assignments]
        steps = [step.model_dump(mode="json") for step in self.request.recipe.compress]
        tuned = self.request.recipe.calibration.model_dump() if self.request.recipe.calibrates else None
        values: dict[str, Any] = {"model": self.uncached_key, "assignments": rows, "steps": steps, "calibration": tuned}
        if self.request.recipe.distill:
            values["lessons"] = self._lessons()
        if any(item.activation == "static_int8" for item in self.assignments):
            # What a layer becomes that is left out, and whether layers give integers, is the target's to say.
            values["activations"] = self.request.target.activations.model_dump()
        return stage_key("compress", values)

    @cached_property
    def lower_key(self) -> str:
        """Key of the artifact."""
        return self._lower_key(self.compress_key if self.compresses else None, self.settings, scales=self.scales_key)

    @cached_property
    def baseline_key(self) -> str:
        """Key of the uncompressed fp32 artifact of the same target."""
        key = self.model_key if self.whole is None else self._model_key(self.whole)
        return self._lower_key(None, self.baseline_settings, model=key)

    @cached_property
    def validate_key(self) -> str:
        """Key of the measurements, which belong to one machine."""
        from edgeport.stages import stage_key
        from edgeport.validate.machine import this_machine

        inputs = {
            "artifact": self.lower_key,
            "baseline": self.baseline_key,
            "reference": self.reference_key,
            "gate": self.request.recipe.gate.model_dump(),
            "machine": this_machine().model_dump(),
            "quick": self.request.quick,
            "full": self.request.full,
        }
        return stage_key("validate", inputs)

    @cached_property
    def scales_key(self) -> str | None:
        """Key of the steps to which the runtime rounds keys and values; None where it takes none that are fixed."""
        from edgeport.stages import stage_key

        form = self.settings.kv_cache
        if form == "float" or self.request.target.runtime != "onnxruntime":
            return None
        made = self.compress_key if self.compresses else self.uncached_key
        context = None if self.model.decoder is None else self.model.decoder.context
        tuned = self.request.recipe.calibration.model_dump()
        return stage_key("scales", {"model": made, "cache": form, "context": context, "calibration": tuned})

    @property
    def compresses(self) -> bool:
        """At least one weight is quantized, or the model restructured."""
        return self.shaped is not None or any(item.format.quantized for item in self.assignments)

    @property
    def shape(self) -> Model:
        """The model in the shapes in which it is lowered."""
        return self.shaped or self.model

    def as_lowered(self, plain: Model) -> Model:
        """A restructured model with the cache and the axes that the original is lowered with.

        Args:
            plain: made of `uncached`.
        """
        return _like(self.model, plain)

    @property
    def baseline_model(self) -> Model:
        """The model as the baseline is lowered: without its compressed forms, if it came with any."""
        whole = self.whole or self.model
        decoder = None if whole.decoder is None else replace(whole.decoder, cache="float", scales=())
        return replace(whole, quantized={}, activations={}, ranges={}, sparse={}, decoder=decoder)

    @property
    def baseline_settings(self) -> LoweringSettings:
        """The artifact's settings in full precision: what the recipe fp32 makes, so that one lowering serves both."""
        return replace(self.settings, precision="fp32", kv_cache="float")

    def _lower_key(
        self, compressed: str | None, settings: LoweringSettings, *, scales: str | None = None, model: str | None = None
    ) -> str:
        from edgeport.stages import stage_key

        target = self.request.target.model_dump(mode="json", exclude={"title", "sources", "device", "execution"})
        return stage_key(
            "lower",
            {
                "model": model or self.model_key,
                "name": self.model.name,
                "compressed": compressed,
                "target": target,
                "settings": asdict(settings),
                "scales": scales,
            },
        )


def prepare(request: ExportRequest, progress: Progress, *, cache: bool = True) -> Job:
    """Load the model and decide everything; refuse what can't be done.

    Args:
        cache: give decoders a cache, where the target keeps one.

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
    progress.stage("load", request.model)
    model = load_model(
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
            shaped = _like(model, outline(plain, request.recipe))
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
    from edgeport.compress.distill.run import check_teacher
    from edgeport.model.load import load_model

    made: dict[str, Model] = {}
    for step in request.recipe.distill:
        if step.teacher is not None and step.teacher not in made:
            progress.stage("load", f"{step.teacher}, which teaches")
            made[step.teacher] = load_model(step.teacher, task=student.task, allow_pickle=request.allow_pickle)
            check_teacher(student, made[step.teacher])
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


def _like(model: Model, plain: Model) -> Model:
    """A restructured model with the cache, or the inputs and axes, of the one that it was made of."""
    from edgeport.model.decoder import for_generation

    if model.decoder is not None:
        made = for_generation(plain, model.decoder.context)
        assert made.decoder is not None
        return replace(made, decoder=replace(made.decoder, cache=model.decoder.cache))
    return replace(plain, inputs=model.inputs, outputs=model.outputs, example=model.example)


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


def make_plan(job: Job) -> Plan:
    """The plan of a prepared job.

    Raises:
        TargetRefusesError: the target's device has too little memory.
    """
    import psutil

    from edgeport import plan as planning
    from edgeport.compress.mixed import weight_budgets
    from edgeport.device_memory import check_fits, plan_memory
    from edgeport.model.types import Axis
    from edgeport.stages import is_stored

    request, model, settings = job.request, job.model, job.settings
    target, recipe = request.target, request.recipe
    parameters = sum(p.numel() for p in model.module.parameters())
    budgets = {} if model.quantized else weight_budgets(job.assignments, recipe, target)
    predicted = planning.predict_size(job.shape, job.assignments, settings.precision, target.runtime, budgets)
    largest = planning.largest_weight(job.shape, job.assignments)
    widened = planning.widened_bytes(job.shape, job.assignments, settings.precision, target.runtime)
    device = plan_memory(job.shape, target, weights=predicted, repacked=largest + widened)
    check_fits(device, target)
    baseline = planning.predict_size(model, (), "fp32", target.runtime)
    memory = planning.LIBRARIES_BYTES[target.runtime] + int(planning.WEIGHT_COPIES[target.runtime] * parameters * 4)
    disk = 2 * predicted + baseline + planning.reference_bytes(model, job.sample_count)
    before = job.compressed is not None
    stages = [
        ("reference", "stored with the compressed model", None)
        if before
        else ("reference", f"{job.sample_count} inputs through the torch model", job.reference_key),
        *(() if job.shaped is None else (("restructure", _restructuring(job), job.restructure_key),)),
        ("compress", f"recipe {recipe.name}" + (", done before" if before else ""), None)
        if before or not job.compresses
        else ("compress", f"recipe {recipe.name}", job.compress_key),
        *([("scales", f"keys and values in {settings.kv_cache}", job.scales_key)] if job.scales_key else []),
        ("lower", f"{target.runtime}, {settings.precision}, {settings.shapes} shapes", job.lower_key),
        ("baseline", f"the {'dequantised' if before else 'same'} model in fp32, to compare with", job.baseline_key),
        ("validate", target.execution.statement, job.validate_key),
    ]
    available = psutil.virtual_memory().available
    cache = cache_root()
    while not cache.exists():
        cache = cache.parent
    free = shutil.disk_usage(cache).free
    warnings = []
    if memory > available:
        warnings.append(f"Lowering may need {memory / 1e9:.1f} GB of memory; {available / 1e9:.1f} GB are available.")
    if disk > free:
        warnings.append(f"The run may write {disk / 1e9:.1f} GB; {free / 1e9:.1f} GB are free.")
    if model.source.note:
        warnings.append(model.source.note)
    return planning.Plan(
        model=model.name,
        task=model.task,
        parameters=parameters,
        fp32_bytes=parameters * 4,
        target=target.name,
        runtime=target.runtime,
        recipe=recipe.name,
        precision=settings.precision,
        shapes=settings.shapes,
        inputs={
            spec.name: tuple(size.name if isinstance(size, Axis) else size for size in spec.shape)
            for spec in model.inputs
        },
        stages=tuple(
            planning.PlannedStage(
                name=name, detail=detail, cached=key is not None and is_stored(stage_folder(name), key)
            )
            for name, detail, key in stages
        ),
        layers=planning.planned_layers(job.assignments),
        predicted_bytes=predicted,
        predicted_peak_memory_bytes=memory,
        available_memory_bytes=available,
        predicted_disk_bytes=disk,
        memory=device,
        available_disk_bytes=free,
        checks=planning.planned_checks(recipe, target, any(item.format.quantized for item in job.assignments)),
        warnings=tuple(warnings),
    )


def _restructuring(job: Job) -> str:
    """What the recipe makes of the model, in words."""
    steps = ", ".join(step.method for step in job.request.recipe.restructure)
    count = sum(parameter.numel() for parameter in job.shape.module.parameters())
    return f"{steps}: {count / 1e6:.1f} M parameters stay"


def stage_folder(name: str) -> str:
    """The store's folder for a stage: the baseline is a lowering like any other."""
    return "lower" if name == "baseline" else name


def check_resources(planned: Plan) -> None:
    """Refuse a run that the disk can't hold. Memory is an estimate, so it only warns.

    Raises:
        BadInputError: too little disk is free.
    """
    if planned.predicted_disk_bytes > planned.available_disk_bytes:
        raise BadInputError(
            f"The run needs about {planned.predicted_disk_bytes / 1e9:.2f} GB of disk; "
            f"{planned.available_disk_bytes / 1e9:.2f} GB are free.",
            where=cache_root(),
            next_step="Free some space, or set EDGEPORT_CACHE to a folder on another disk.",
        )
