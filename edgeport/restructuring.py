"""The steps of a recipe that make a model smaller before its weights are quantized: fewer layers, narrower layers,
fewer tokens, two thin matrices for a wide one, zeros; and the training that heals it (edgeport.distilling).

What shapes come out follows from the step and the model's shapes alone, so a plan knows them; which parts stay follows
from data (edgeport.compress.restructure).
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from edgeport.distilling import Distill
from edgeport.schema import Strict


class PruneVocabulary(Strict):
    """`method = "prune_vocabulary"`: keep the tokens that a corpus uses most; the tokenizer shrinks with the table.

    Texts of these tokens get the same scores as before. Comes first.
    """

    method: Literal["prune_vocabulary"]
    tokens: int = Field(ge=2, description="most tokens that stay, special ones and single bytes or characters included")
    corpus: str | None = Field(
        default=None, description="text file whose tokens count; None takes the calibration texts"
    )


class PruneDepth(Strict):
    """`method = "prune_depth"` (ShortGPT): remove the layers that change the hidden states least. Needs data."""

    method: Literal["prune_depth"]
    layers: int | None = Field(default=None, ge=1, description="layers that stay; or `keep`")
    keep: float | None = Field(default=None, gt=0, lt=1, description="share of the layers that stays, rounded")
    iterative: bool = Field(default=True, description="measure again after each removal, instead of once")

    @model_validator(mode="after")
    def _says_how_many(self) -> PruneDepth:
        if (self.layers is None) == (self.keep is None):
            raise ValueError("give either layers or keep")
        return self


class PruneWidth(Strict):
    """`method = "prune_width"` (Minitron): remove the channels and heads with the smallest activations, equally many
    in every layer. Needs data."""

    method: Literal["prune_width"]
    ffn: float = Field(default=1.0, gt=0, le=1, description="share of the inner channels of each MLP that stays")
    heads: float = Field(
        default=1.0, gt=0, le=1, description="share of the attention heads that stays; whole groups go together"
    )
    hidden: float = Field(
        default=1.0, gt=0, le=1, description="share of the channels of the hidden state that stays, in all layers"
    )
    multiple: int = Field(default=8, ge=1, description="channel counts are rounded to a multiple of this")

    @model_validator(mode="after")
    def _prunes(self) -> PruneWidth:
        if self.ffn == self.heads == self.hidden == 1:
            raise ValueError("it removes nothing: give ffn, heads or hidden a share below 1")
        return self


class PruneChannels(Strict):
    """`method = "prune_channels"`: leave out the channels of a conv net that give least to the layers behind them, the
    same share of every set of channels that hang together. Needs data."""

    method: Literal["prune_channels"]
    keep: float = Field(gt=0, lt=1, description="share of the channels that stays")
    multiple: int = Field(default=8, ge=1, description="channel counts are rounded to a multiple of this")
    exclude: tuple[str, ...] = Field(default=(), description="glob patterns of layers whose outputs stay whole")
    repair: bool = Field(
        default=True, description="solve the weights that are left again, for the least change of what each layer gives"
    )


class LowRank(Strict):
    """`method = "lowrank"`: two thin Linear layers for one, where they hold fewer numbers. Needs data."""

    method: Literal["lowrank"]
    keep: float = Field(gt=0, lt=1, description="share of each weight's numbers that stays")
    scaling: Literal["whiten", "mean_abs"] = Field(
        default="whiten", description="what the error is measured in: SVD-LLM's whitened inputs, or ASVD's mean |x|"
    )
    alpha: float = Field(default=0.5, gt=0, le=1, description="power of mean |x|; of mean_abs only")
    multiple: int = Field(
        default=32, ge=1, description="ranks are rounded down to a multiple of this, so that groups of weights fit"
    )
    exclude: tuple[str, ...] = Field(default=(), description="glob patterns of weight names to leave alone")


class Sparsify(Strict):
    """`method = "magnitude"`, `"wanda"` or `"sparsegpt"`: zeros in the weights of Linear layers, which save bytes only
    where the target has a sparse form. The last two need data."""

    method: Literal["magnitude", "wanda", "sparsegpt"]
    sparsity: float | None = Field(default=None, gt=0, lt=1, description="share of zeros")
    pattern: str | None = Field(
        default=None, pattern=r"^[0-9]+:[0-9]+$", description='"N:M" keeps N of every M weights of a row'
    )
    damping: float = Field(default=0.01, gt=0, le=1, description="of sparsegpt, relative to the mean of the diagonal")
    exclude: tuple[str, ...] = Field(default=(), description="glob patterns of weight names to leave alone")

    @field_validator("pattern")
    @classmethod
    def _is_possible(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None:
            kept, group = (int(part) for part in value.split(":"))
            if not 0 < kept < group:
                raise ValueError("N of N:M is at least 1 and less than M")
        return value

    @model_validator(mode="after")
    def _says_how_many(self) -> Sparsify:
        if (self.sparsity is None) == (self.pattern is None):
            raise ValueError("give either sparsity or pattern")
        return self

    @property
    def kept_of(self) -> tuple[int, int] | None:
        """(N, M) of the pattern."""
        if self.pattern is None:
            return None
        kept, group = self.pattern.split(":")
        return int(kept), int(group)


Restructure = PruneVocabulary | PruneDepth | PruneWidth | PruneChannels | LowRank | Sparsify | Distill
ORDER: tuple[type[Strict] | tuple[type[Strict], ...], ...] = (
    PruneVocabulary,
    (PruneDepth, PruneWidth, PruneChannels),
    LowRank,
    Sparsify,
)
"""Places in a recipe; steps of one place come in any order. Distill may stand behind each of them."""


def place(step: Restructure) -> int:
    """Where in a recipe a step may stand."""
    return next(index for index, kinds in enumerate(ORDER) if isinstance(step, kinds))


def needs_data(step: Restructure) -> bool:
    """The step looks at calibration inputs."""
    return not isinstance(step, PruneVocabulary | Distill) and getattr(step, "method", "") != "magnitude"
