"""What to do: a recipe names the compression steps, the precision, and the budgets of the gate.

A recipe is a TOML file. The ones that come with edgeport are in `edgeport/recipes/`; `--recipe` takes
one of their names or the path of a file of the user's own.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from edgeport.errors import BadInputError
from edgeport.formats import LAYER_KINDS, ActivationFormat, LayerKind, WeightFormat
from edgeport.resources import PACKAGE
from edgeport.schema import Strict, read_toml

RECIPES = PACKAGE / "recipes"


class RoundToNearest(Strict):
    """`method = "rtn"`: every weight to its nearest code.

    Each layer kind names one weight format, or several in order of preference: the first that the
    target takes is used. When it takes none of them the export is refused.
    """

    method: Literal["rtn"]
    linear: tuple[str, ...] = ("float",)
    embedding: tuple[str, ...] = ("float",)
    conv: tuple[str, ...] = ("float",)
    depthwise_conv: tuple[str, ...] = ("float",)
    activations: tuple[ActivationFormat, ...] = Field(
        default=("float",), description="preferred activation formats of quantized layers, best first"
    )
    scale_search: bool = Field(
        default=True, description="pick each scale for the least squared error instead of the largest weight"
    )
    exclude: tuple[str, ...] = Field(default=(), description="glob patterns of weight names to leave alone")

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

    def formats(self, kind: LayerKind) -> tuple[str, ...]:
        """The weight formats asked for a layer kind, best first."""
        value: tuple[str, ...] = getattr(self, kind)
        return value


class Lowering(Strict):
    """How the compressed model becomes a file.

    `precision` is what the uncompressed weights and the arithmetic use; `target` means what the
    target itself prefers.
    """

    precision: Literal["fp32", "fp16", "target"] = "target"


class Budgets(Strict):
    """What the gate demands. A budget left out is not checked; the metric is still measured.

    Attributes:
        cosine_min: least mean cosine similarity between the artifact's and the original's outputs, 0 to 1.
        relative_l2_max: largest ||artifact - original|| / ||original|| over all samples.
        top1_agreement_min: least share of samples with the same most likely class or token, 0 to 1.
        kl_max: largest mean KL(original || artifact), nats, for classifiers and language models.
        size_ratio_max: largest file size relative to the fp32 artifact of the same runtime.
        latency_ratio_max: largest p50 relative to the fp32 artifact of the same runtime.
        peak_memory_ratio_max: largest peak resident memory relative to the fp32 artifact.
    """

    cosine_min: float | None = Field(default=None, ge=0, le=1)
    relative_l2_max: float | None = Field(default=None, gt=0)
    top1_agreement_min: float | None = Field(default=None, ge=0, le=1)
    kl_max: float | None = Field(default=None, gt=0)
    size_ratio_max: float | None = Field(default=None, gt=0, le=2)
    latency_ratio_max: float | None = Field(default=None, gt=0)
    peak_memory_ratio_max: float | None = Field(default=None, gt=0)


class Recipe(Strict):
    """A whole recipe file."""

    schema_version: Literal[1] = 1
    name: str
    summary: str
    compress: tuple[RoundToNearest, ...] = ()
    lower: Lowering = Lowering()
    gate: Budgets

    @property
    def compresses(self) -> bool:
        """At least one step may change weights."""
        return bool(self.compress)


def recipe_names() -> list[str]:
    """The recipes that come with edgeport, sorted."""
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


def recipe_path(reference: str) -> Path:
    """The file of a recipe given by name, or by the path of a TOML file (which may not exist).

    Raises:
        BadInputError: there is no such recipe.
    """
    path = Path(reference)
    if path.suffix != ".toml":
        path = RECIPES / f"{reference}.toml"
        if "/" in reference or not path.is_file():
            close = difflib.get_close_matches(reference, recipe_names(), n=1)
            raise BadInputError(
                f"There is no recipe {reference!r}." + (f" Did you mean {close[0]!r}?" if close else ""),
                where="--recipe",
                allowed=[*recipe_names(), "or the path of a .toml file"],
                next_step="`edgeport recipes` shows what each does.",
            )
    return path


def load_recipe(reference: str) -> Recipe:
    """Read a recipe by name, or by the path of a TOML file.

    Raises:
        BadInputError: there is no such recipe, or the file is wrong.
    """
    return read_toml(Recipe, recipe_path(reference))


__all__ = [
    "LAYER_KINDS",
    "Budgets",
    "Lowering",
    "Recipe",
    "RoundToNearest",
    "load_recipe",
    "recipe_names",
    "recipe_path",
]
