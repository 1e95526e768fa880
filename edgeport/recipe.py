"""What to do: a recipe names the compression steps, the precision, and the budgets of the gate.

A recipe is a TOML file. The ones that come with edgeport are in `edgeport/recipes/`; `--recipe` takes
one of their names or the path of a file of the user's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from edgeport.budgets import Budgets
from edgeport.distilling import Distill
from edgeport.errors import BadInputError
from edgeport.formats import LAYER_KINDS, ActivationFormat, CacheFormat, LayerKind, WeightFormat
from edgeport.resources import PACKAGE
from edgeport.restructuring import ORDER, PruneVocabulary, Restructure, Sparsify, needs_data, place
from edgeport.schema import Strict, named_toml, read_toml, toml_names
from edgeport.sourcing import DataSource, recognise

RECIPES = PACKAGE / "recipes"

RangeMethod = Literal["minmax", "percentile", "mse", "entropy"]


class Quantize(Strict):
    """What every method that quantizes weights is told.

    Each layer kind names one weight format, or several in order of preference: the first that the
    target takes is used. When it takes none of them the export is refused.
    """

    linear: tuple[str, ...] = ("float",)
    embedding: tuple[str, ...] = ("float",)
    conv: tuple[str, ...] = ("float",)
    depthwise_conv: tuple[str, ...] = ("float",)
    activations: tuple[ActivationFormat, ...] = Field(
        default=("float",), description="preferred activation formats of quantized layers, best first"
    )
    ranges: RangeMethod = Field(
        default="mse", description="how static_int8 chooses a grid from the values seen over the calibration data"
    )
    activation_budget: float = Field(
        default=0.005,
        ge=0,
        description="what static_int8 may cost the model: divergence in nats a sample, or half the squared relative "
        "error of outputs that are no logits; the tensors that cost most are left out until the rest fits",
    )
    correct_bias: bool = Field(
        default=False,
        description="subtract from each bias what rounding the weights adds to the layer's mean output; needs "
        "calibration data, and helps convolutions most",
    )
    exclude: tuple[str, ...] = Field(default=(), description="glob patterns of weight names to leave alone")
    bits_per_weight: float | None = Field(
        default=None,
        ge=1,
        le=32,
        description="mixed precision: every format named above is a choice for each layer, and they are given out so "
        "that the model loses least with this many bits a weight on average, scales included; weights that have "
        "only one format, or none as small as this, are not counted",
    )

    @field_validator("linear", "embedding", "conv", "depthwise_conv", "activations", mode="before")
    @classmethod
    def _one_or_several(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value

    @field_validator("linear", "embedding", "conv", "depthwise_conv")
    @classmethod
    def _formats_parse(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            try:
                WeightFormat.parse(name)
            except BadInputError as error:
                raise ValueError(f"{error.what} It takes {error.allowed}") from error
        return value

    @field_validator("ranges", "activation_budget")
    @classmethod
    def _is_about_static_activations(cls, value: object, info: ValidationInfo) -> object:
        # Recipes that were stored in full name the defaults, too.
        default = cls.model_fields[info.field_name or ""].default
        if value != default and "static_int8" not in info.data.get("activations", ()):
            raise ValueError('it changes nothing without "static_int8" in `activations`')
        return value

    @field_validator("bits_per_weight")
    @classmethod
    def _has_a_choice(cls, value: float | None, info: ValidationInfo) -> float | None:
        if value is not None and all(len(info.data.get(kind, ())) < 2 for kind in LAYER_KINDS):
            raise ValueError("it chooses among the formats of a layer kind: name two or more for one of them")
        return value

    def formats(self, kind: LayerKind) -> tuple[str, ...]:
        """The weight formats asked for a layer kind, best first."""
        value: tuple[str, ...] = getattr(self, kind)
        return value


class RoundToNearest(Quantize):
    """`method = "rtn"`: every weight to its nearest code. No data is needed."""

    method: Literal["rtn"]
    scale_search: bool = Field(
        default=True, description="pick each scale for the least squared error instead of the largest weight"
    )


class Gptq(Quantize):
    """`method = "gptq"`: round a column, let the columns that follow make up for it. Needs calibration data."""

    method: Literal["gptq"]
    act_order: bool = Field(
        default=True, description="columns with the largest inputs first; the groups stay as they are"
    )
    damping: float = Field(default=0.01, gt=0, le=1, description="added to the diagonal, relative to its mean")
    refine: int = Field(
        default=2, ge=0, le=20, description="rounds of coordinate descent over scales and codes afterwards"
    )


class Hqq(Quantize):
    """`method = "hqq"`: a grid that keeps most weights close and lets a few be far off. No data is needed."""

    method: Literal["hqq"]


class Awq(Strict):
    """`method = "awq"`: before quantizing, scale up the channels with large inputs and the layer before down.

    The function stays the same. Needs calibration data.
    """

    method: Literal["awq"]


class Smooth(Strict):
    """`method = "smooth"` (SmoothQuant): move the range of activations into the weights, which changes nothing else."""

    method: Literal["smooth"]
    alpha: float = Field(default=0.5, ge=0, le=1, description="how much of it to move")


class Rotate(Strict):
    """`method = "rotate"` (QuaRot, offline part): spread outliers over all channels. The function stays the same."""

    method: Literal["rotate"]
    seed: int = 0


class Qat(Strict):
    """`method = "qat"`: after quantizing, train codes and scales so that the model's outputs stay close to the float
    model's. Needs calibration data, a fifth of which only judges; the more of it the better."""

    method: Literal["qat"]
    steps: int = Field(default=200, ge=1, le=100_000, description="updates of the weights")
    batch: int = Field(default=4, ge=1, le=1024, description="inputs that each update looks at")
    learning_rate: float = Field(
        default=0.002,
        gt=0,
        le=10,
        description="how far an update moves a weight at most, in steps of its grid; scales, norms and biases "
        "move by as much relative to their size",
    )
    train: Literal["scales", "weights"] = Field(
        default="weights", description="only scales, norms and biases, or the codes of the weights as well"
    )
    seed: int = 0


class Brecq(Strict):
    """`method = "brecq"`: tune rounding and scales of one block after the other, so that each gives what it gave in the
    float model. Works on what the quantizing step chose. Needs calibration data, a fifth of which only judges."""

    method: Literal["brecq"]
    steps: int = Field(default=100, ge=1, le=100_000, description="updates of each block")
    batch: int = Field(default=4, ge=1, le=1024, description="inputs that each update looks at")
    learning_rate: float = Field(
        default=0.006, gt=0, le=10, description="how far an update moves a weight at most, in steps of its grid"
    )
    seed: int = 0


class Qera(Strict):
    """`method = "qera"`: beside every quantized Linear layer two thin ones in 8 bits, which give back the largest part
    of what its output lost. They cost bytes and time: more bits for the weights are mostly the better buy. Needs
    calibration data."""

    method: Literal["qera"]
    rank: int = Field(default=8, ge=1, le=4096, description="columns of the thin matrices")


Prepare = Awq | Smooth | Rotate
Step = Annotated[
    Restructure | RoundToNearest | Gptq | Hqq | Prepare | Brecq | Qera | Qat, Field(discriminator="method")
]


class Calibration(DataSource):
    """The inputs that methods tune on; they never overlap with those that evidence is measured on.

    Attributes:
        samples: how many inputs at most.
        source: "data" for the card or the files that are named, or else the data card of the model's modality;
            "generated" for texts that the float model writes itself (causal language models;
            `edgeport.data.generated`).
    """

    samples: int = Field(default=64, ge=1)
    source: Literal["data", "generated"] = "data"

    @model_validator(mode="after")
    def _generates_or_reads(self) -> Calibration:
        if self.source == "generated" and self.named:
            raise ValueError(f'either source = "generated" or {self.named[0]}')
        if self.sequence is not None and not self.texts:
            raise ValueError("sequence is about texts")
        return self


class Lowering(Strict):
    """How the compressed model becomes a file.

    `precision` is what the uncompressed weights and the arithmetic use; `target` means what the
    target itself prefers. `kv_cache` is what a language model keeps keys and values of earlier tokens as.
    """

    precision: Literal["fp32", "fp16", "target"] = "target"
    kv_cache: CacheFormat = "float"


class Recipe(Strict):
    """A whole recipe file."""

    schema_version: Literal[1] = 1
    name: str
    summary: str
    compress: tuple[Step, ...] = ()
    calibration: Calibration = Calibration()
    lower: Lowering = Lowering()
    gate: Budgets

    @property
    def compresses(self) -> bool:
        """At least one step may change weights."""
        return bool(self.compress)

    @property
    def restructure(self) -> tuple[Restructure, ...]:
        """The steps that make the model smaller before its weights are quantized, in order."""
        return tuple(step for step in self.compress if isinstance(step, Restructure))

    @property
    def vocabulary(self) -> PruneVocabulary | None:
        """The step that leaves tokens out, if there is one."""
        return next((step for step in self.compress if isinstance(step, PruneVocabulary)), None)

    @property
    def distill(self) -> tuple[Distill, ...]:
        """The trainings before its weights are quantized, in order."""
        return tuple(step for step in self.compress if isinstance(step, Distill))

    @property
    def quantize(self) -> Quantize | None:
        """The step that quantizes, if there is one."""
        return next((step for step in self.compress if isinstance(step, Quantize)), None)

    @property
    def prepare(self) -> tuple[Prepare, ...]:
        """The steps before it, which keep the function."""
        return tuple(step for step in self.compress if isinstance(step, Prepare))

    @property
    def reconstruct(self) -> Brecq | None:
        """The tuning of one block after the other, if there is one."""
        return next((step for step in self.compress if isinstance(step, Brecq)), None)

    @property
    def correct(self) -> Qera | None:
        """The low-rank correction, if there is one."""
        return next((step for step in self.compress if isinstance(step, Qera)), None)

    @property
    def tune(self) -> Qat | None:
        """The training after it, if there is one."""
        return next((step for step in self.compress if isinstance(step, Qat)), None)

    @property
    def calibrates(self) -> bool:
        """A step needs real inputs."""
        step = self.quantize
        needed = step is not None and (
            step.bits_per_weight is not None or step.correct_bias or "static_int8" in step.activations
        )
        tuned = any(isinstance(step, Gptq | Awq | Smooth | Brecq | Qera | Qat) for step in self.compress)
        return needed or tuned or any(needs_data(step) for step in self.restructure)

    @field_validator("compress")
    @classmethod
    def _quantizes_once(cls, value: tuple[Step, ...]) -> tuple[Step, ...]:
        first = [step for step in value if isinstance(step, Restructure)]
        if first != list(value[: len(first)]):
            raise ValueError(
                "what prunes, factorizes, makes sparse or distils comes before what prepares and quantizes"
            )
        found = [place(step) for step in first if not isinstance(step, Distill)]
        if (
            any(isinstance(step, PruneVocabulary) for step in first[1:])
            or found != sorted(found)
            or any(found.count(one) > 1 for one in range(len(ORDER)) if one != 1)
        ):
            raise ValueError(
                "prune_vocabulary comes first, then prune_depth, _width and _channels, then lowrank, then what makes "
                "weights sparse; all but the second once each, and distill behind any of them"
            )
        if len(value) == len(first):
            return value
        quantizing = next((step for step in value if isinstance(step, Quantize)), None)
        if any(isinstance(step, Sparsify) for step in first) and quantizing and quantizing.linear != ("float",):
            raise ValueError("Linear weights are stored either sparse or quantized: leave `linear` out, or the zeros")
        value, whole = value[len(first) :], value
        if sum(isinstance(step, Quantize) for step in value) > 1:
            raise ValueError("a recipe quantizes once; merge the steps")
        places: tuple[Any, ...] = (Prepare, Quantize, Brecq, Qera, Qat)
        order = [next(place for place, kind in enumerate(places) if isinstance(step, kind)) for step in value]
        if value and (1 not in order or order.index(1) < order.count(0)):
            raise ValueError("what prepares for quantizing comes before the step that quantizes")
        if order != sorted(order) or any(order.count(place) > 1 for place in (2, 3, 4)):
            raise ValueError("brecq, qera and qat come once each, in this order after the step that quantizes")
        return whole


def recipe_names() -> list[str]:
    """The recipes that come with edgeport, sorted."""
    return toml_names(RECIPES)


def recipe_path(reference: str) -> Path:
    """The file of a recipe given by name, or by the path of a TOML file (which may not exist).

    Raises:
        BadInputError: there is no such recipe.
    """
    return named_toml(
        "recipe", reference, RECIPES, where="--recipe", next_step="`edgeport recipes` shows what each does."
    )


def load_recipe(reference: str) -> Recipe:
    """Read a recipe by name, or by the path of a TOML file.

    Raises:
        BadInputError: there is no such recipe, the file is wrong, or its [calibration] would change nothing.
    """
    path = recipe_path(reference)
    recipe = read_toml(Recipe, path)
    if recipe.calibration != Calibration():
        _check_looks_at_data(recipe, str(path))
    return recipe


def calibrated_on(recipe: Recipe, sources: Sequence[str]) -> Recipe:
    """The recipe with other calibration data: a card, files of texts, or pictures.

    Raises:
        BadInputError: they are no single source, or the recipe looks at no data.
    """
    if not sources:
        return recipe
    where = "--calibration"
    _check_looks_at_data(recipe, where)
    found = Calibration.model_validate({"samples": recipe.calibration.samples, **recognise(sources, where)})
    return recipe.model_copy(update={"calibration": found})


def _check_looks_at_data(recipe: Recipe, where: str) -> None:
    """Raise BadInputError where calibration data would change nothing."""
    if not recipe.calibrates and recipe.lower.kv_cache == "float":
        raise BadInputError(
            f"Calibration data changes nothing: no step of the recipe {recipe.name!r} looks at it.",
            where=where,
            next_step="Leave it out, or choose a method that is tuned on data, such as gptq.",
        )


__all__ = [
    "LAYER_KINDS",
    "Awq",
    "Brecq",
    "Budgets",
    "Calibration",
    "Distill",
    "Gptq",
    "Hqq",
    "Lowering",
    "Prepare",
    "Qat",
    "Quantize",
    "Recipe",
    "Rotate",
    "RoundToNearest",
    "Smooth",
    "calibrated_on",
    "load_recipe",
    "recipe_names",
    "recipe_path",
]
