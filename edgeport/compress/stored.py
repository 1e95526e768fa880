"""Open a model that was compressed before, for a target: its weights stay as they are, or the target refuses them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from edgeport.compress.apply import LayerRecord
from edgeport.compress.assign import Assignment, check_sparse
from edgeport.compress.assign_compressed import assign_compressed
from edgeport.compress.folder import calibration_record, layer_records, step_records
from edgeport.compress.restructure import StepRecord
from edgeport.data.samples import SampleRecord
from edgeport.errors import BadInputError
from edgeport.model.compressed import REFERENCE, read_record
from edgeport.model.types import Axis, Model, TensorSpec
from edgeport.recipe import Recipe
from edgeport.target import Target
from edgeport.vectors import load_vectors


@dataclass(frozen=True)
class Stored:
    """What comes with a compressed model.

    Attributes:
        reference: the folder with inputs and the uncompressed model's outputs on them.
        layers, calibration, steps: the records of the compression.
    """

    reference: Path
    layers: tuple[LayerRecord, ...]
    calibration: SampleRecord | None
    steps: tuple[StepRecord, ...] = ()


def open_for_target(
    model: Model, folder: Path, recipe: Recipe, target: Target
) -> tuple[Model, tuple[Assignment, ...], Stored]:
    """The model as the target takes it, what each weight is there, and what was stored with it.

    Args:
        model: as loaded from `folder`.

    Raises:
        BadInputError: the recipe is not the one that the folder was made by.
        TargetRefusesError: the target can't take a weight as it is.
    """
    record = read_record(folder)
    if recipe != record.recipe:
        raise BadInputError(
            f"The model is already compressed, by a recipe {record.recipe.name!r} that differs from the one given.",
            where="--recipe",
            allowed="the recorded recipe: leave --recipe out",
            next_step="Give the original model to use another recipe.",
        )
    assignments = assign_compressed(model, record.formats(), recipe, target)
    check_sparse(record.recipe, target)
    restated, layers = restate(model, layer_records(record), assignments)
    return restated, assignments, Stored(folder / REFERENCE, layers, calibration_record(record), step_records(record))


def restate(
    model: Model, layers: tuple[LayerRecord, ...], assignments: tuple[Assignment, ...]
) -> tuple[Model, tuple[LayerRecord, ...]]:
    """A model that was compressed before, as `assign_compressed` found that the target takes it.

    Codes and values stay; what changes is the float type that holds the scales, and the activation formats.
    """
    found: Mapping[str, Assignment] = {item.name: item for item in assignments if item.name in model.quantized}
    quantized = {name: replace(tensor, scale_dtype=found[name].scale_dtype) for name, tensor in model.quantized.items()}
    records = tuple(
        replace(
            layer,
            activation=found[layer.name].activation,
            bytes_after=quantized[layer.name].storage_bytes(),
        )
        if layer.name in quantized
        else layer
        for layer in layers
    )
    activations = {name: item.activation for name, item in found.items()}
    ranges = {name: known for name, known in model.ranges.items() if activations.get(name) == "static_int8"}
    return replace(model, quantized=quantized, activations=activations, ranges=ranges), records


def check_stored_inputs(model: Model, reference: Path, sequences: Collection[int]) -> None:
    """See that the inputs stored with a compressed model are such as the artifact will take.

    Args:
        sequences: the only lengths of the sequence axis that it takes; empty for all in the model's range.

    Raises:
        BadInputError: the shapes asked for are others than those that were stored.
    """
    for call in load_vectors(reference / "inputs.safetensors"):
        for spec in model.inputs:
            shape = call[spec.name].shape if spec.name in call else ()
            if not _fits(shape, spec, sequences):
                wanted = " or ".join(str(length) for length in sequences)
                raise BadInputError(
                    f"The inputs stored with the compressed model are {' x '.join(map(str, shape)) or 'without'} "
                    f"{spec.name}, which does not fit the shapes asked for.",
                    where=reference,
                    allowed=f"a sequence of {wanted}" if wanted else None,
                    next_step="Export with --shapes dynamic where the target has them, or compress again for this "
                    "target, with --sequence if need be: the reference outputs are made for those shapes.",
                )


def _fits(shape: tuple[int, ...], spec: TensorSpec, sequences: Collection[int]) -> bool:
    if len(shape) != len(spec.shape):
        return False
    for size, allowed in zip(shape, spec.shape, strict=True):
        if not isinstance(allowed, Axis):
            fits = size == allowed
        elif allowed.name == "sequence" and sequences:
            fits = size in sequences
        else:
            fits = allowed.minimum <= size <= allowed.maximum
        if not fits:
            return False
    return True
