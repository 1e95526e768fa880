"""The inputs that methods tune on."""

from __future__ import annotations

import torch

from edgeport.data.generated import generated_samples
from edgeport.data.samples import Samples
from edgeport.data.sources import source_samples
from edgeport.errors import BadInputError
from edgeport.model.types import Model
from edgeport.packages import Progress
from edgeport.recipe import Recipe

LEAST_VECTORS = 256
"""Fewer input vectors than this say little about any layer; methods would fit them alone."""


def calibration_samples(model: Model, recipe: Recipe, *, progress: Progress | None = None) -> Samples:
    """The inputs that a recipe asks for: real ones, from the slice that evidence is never measured on, or texts that
    the model writes.

    Raises:
        BadInputError: the data can't be had, or is too short to say anything.
    """
    asked = recipe.calibration
    if asked.source == "generated":
        found = generated_samples(model, count=asked.samples)
    else:
        found = source_samples(model, asked, count=asked.samples, progress=progress)
    check_enough(found)
    return found


def check_enough(found: Samples) -> None:
    """Refuse inputs that are too short to say anything about a layer.

    Raises:
        BadInputError: there are fewer than `LEAST_VECTORS` values.
    """
    vectors = sum(int(next(iter(sample.values())).size) for sample in found.inputs)
    if vectors < LEAST_VECTORS:
        raise BadInputError(
            f"The calibration data is too short: {len(found.inputs)} inputs with {vectors} values together.",
            where="[calibration]",
            allowed=f"at least {LEAST_VECTORS} tokens, pixels or samples of sound",
            next_step="Ask for more `samples` in the recipe's [calibration] table, or give more data.",
        )


def as_tensors(model: Model, found: Samples) -> list[dict[str, torch.Tensor]]:
    """Samples as the module takes them, in the dtypes of its inputs."""
    dtypes = {spec.name: getattr(torch, spec.dtype) for spec in model.inputs}
    return [
        {name: torch.from_numpy(value).to(dtypes[name]) for name, value in sample.items()} for sample in found.inputs
    ]
