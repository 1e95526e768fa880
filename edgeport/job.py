"""A job: a user's request with everything decided and nothing long done.

The keys of all stages follow from it. They form a chain (the key of a lowering holds the key of the
compression before it), so each is known before anything is computed, which is what a plan shows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from edgeport.storage import hash_value

if TYPE_CHECKING:
    from edgeport.compress import Assignment
    from edgeport.compress.stored import Stored
    from edgeport.export.artifact import LoweringSettings
    from edgeport.model.types import Axis, Model
    from edgeport.recipe import Recipe
    from edgeport.target import Target

StageName = Literal["load", "reference", "restructure", "compress", "scales", "lower", "baseline", "validate", "bundle"]


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


def model_key(model: Model, state: str | None = None, *, limits: bool = True) -> str:
    """Hash of a loaded model: its files, weights and interface.

    Args:
        state: `state_digest` of its module, where it is already known.
        limits: the largest sizes of its axes as well, which targets lower.
    """
    from edgeport.model.digest import state_digest

    inputs = [asdict(spec) for spec in model.inputs]
    if not limits:
        inputs = [{**asdict(spec), "shape": [_as_shown(size) for size in spec.shape]} for spec in model.inputs]
    return hash_value(
        {
            "files": dict(model.source.files),
            "state": state or state_digest(model.module),
            "architecture": type(model.module).__qualname__,
            "task": model.task,
            "inputs": inputs,
            "outputs": [spec.name for spec in model.outputs],
        }
    )


def _as_shown(size: int | Axis) -> tuple[str, int] | int:
    """A dimension of calibration inputs: they come one at a time, as long as their example at most."""
    return size if isinstance(size, int) else 1 if size.name == "batch" else (size.name, size.example)


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

    @cached_property
    def tuned_key(self) -> str:
        """Hash of the model without a cache as methods see it: on the same inputs, whatever a target's largest are. So
        what took an hour of training for one target serves the others."""
        return self._model_key(self.uncached, limits=False)

    def _model_key(self, model: Model, *, limits: bool = True) -> str:
        return model_key(model, None if model is self.whole else self.state, limits=limits)

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
        tuned = self._tuned() if any(needs_data(step) for step in steps) else None
        values = {"model": self.tuned_key, "calibration": tuned, "lessons": self._lessons()}
        return stage_key("restructure", {**values, "steps": [step.model_dump(mode="json") for step in steps]})

    def _tuned(self) -> dict[str, Any]:
        """What the recipe's methods tune on, with the hashes of its files."""
        from edgeport.data.corpus import hash_files
        from edgeport.sourcing import source_files

        asked = self.request.recipe.calibration
        return {**asked.model_dump(), "files": hash_files(source_files(asked))}

    def _lessons(self) -> list[dict[str, Any]]:
        """What the recipe's distillation reads beside the model: hashes of teachers and files."""
        from edgeport.data.corpus import hash_files
        from edgeport.model.digest import state_digest
        from edgeport.sourcing import source_files

        teachers = {name: state_digest(model.module) for name, model in self.teachers.items()}
        return [
            {
                "teacher": teachers.get(step.teacher or ""),
                "files": hash_files([*source_files(step.data), *step.data.prompts]),
            }
            for step in self.request.recipe.distill
        ]

    @cached_property
    def compress_key(self) -> str:
        """Key of the quantized weights."""
        from edgeport.stages import stage_key

        rows = [asdict(item) for item in self.assignments]
        steps = [step.model_dump(mode="json") for step in self.request.recipe.compress]
        tuned = self._tuned() if self.request.recipe.calibrates else None
        values: dict[str, Any] = {"model": self.tuned_key, "assignments": rows, "steps": steps, "calibration": tuned}
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
        tuned = self._tuned()
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
        return lowered_like(self.model, plain)

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


def lowered_like(model: Model, plain: Model) -> Model:
    """A restructured model with the cache, or the inputs and axes, of the one that it was made of."""
    from edgeport.model.decoder import for_generation

    if model.decoder is not None:
        made = for_generation(plain, model.decoder.context)
        assert made.decoder is not None
        return replace(made, decoder=replace(made.decoder, cache=model.decoder.cache))
    return replace(plain, inputs=model.inputs, outputs=model.outputs, example=model.example)
