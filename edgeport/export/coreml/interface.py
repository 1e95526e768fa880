"""What the Core ML model takes and gives: coremltools' input types, and the same as our TensorSpecs."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np

from edgeport.errors import TargetRefusesError
from edgeport.export.artifact import LoweringSettings
from edgeport.export.coreml.trace import SEQUENCE, fixed_size, varies
from edgeport.model.types import Axis, Model, TensorSpec

# Core ML's multi-arrays hold no 64-bit integers. Floats stay float32 also around float16 arithmetic, so that
# an app sees one interface whatever the precision.
DTYPES = {"int64": "int32", "int32": "int32", "float32": "float32", "float16": "float32"}


def file_dtype(spec: TensorSpec) -> str:
    """The dtype that the file has for a tensor of the model.

    Raises:
        TargetRefusesError: Core ML has no such multi-array.
    """
    if spec.dtype not in DTYPES:
        raise TargetRefusesError(
            f"Core ML has no multi-array of {spec.dtype}.", where=spec.name, allowed=sorted(DTYPES)
        )
    return DTYPES[spec.dtype]


def file_specs(specs: tuple[TensorSpec, ...], settings: LoweringSettings) -> tuple[TensorSpec, ...]:
    """Names, dtypes and shapes as the file has them: only dimensions that vary keep their Axis."""

    def size(axis: int | Axis) -> int | Axis:
        if not isinstance(axis, Axis) or not varies(axis, settings):
            return fixed_size(axis, settings)
        if settings.enumerated:
            return Axis(axis.name, min(settings.enumerated), max(settings.enumerated), settings.enumerated[0])
        return axis

    return tuple(TensorSpec(spec.name, file_dtype(spec), tuple(size(axis) for axis in spec.shape)) for spec in specs)


def _enumerated_shapes(ct: ModuleType, spec: TensorSpec, settings: LoweringSettings) -> Any:
    shapes = [
        [
            length if isinstance(axis, Axis) and varies(axis, settings) else fixed_size(axis, settings)
            for axis in spec.shape
        ]
        for length in settings.enumerated
    ]
    return ct.EnumeratedShapes(shapes=shapes, default=shapes[0])


def check_enumerated(model: Model, settings: LoweringSettings, deployment_target: str) -> None:
    """Refuse enumerated sizes that the model or the system version can't take.

    Raises:
        TargetRefusesError: no sequence axis, a size outside its range, or several such inputs before iOS 18.
    """
    if not settings.enumerated:
        return
    axes = {axis for spec in model.inputs for axis in spec.shape if isinstance(axis, Axis) and axis.name == SEQUENCE}
    outside = [n for n in settings.enumerated for axis in axes if not axis.minimum <= n <= axis.maximum]
    if not axes or outside:
        raise TargetRefusesError(
            f"The sequence can't have {outside[0]} entries." if outside else "The model has no sequence axis.",
            where="--enumerate",
            allowed=", ".join(f"{axis.minimum} to {axis.maximum}" for axis in axes) or None,
        )
    inputs = [
        spec.name for spec in model.inputs if any(isinstance(a, Axis) and varies(a, settings) for a in spec.shape)
    ]
    if len(inputs) > 1 and deployment_target == "iOS17":
        raise TargetRefusesError(
            f"iOS 17 takes enumerated shapes for one input only; the model has {len(inputs)}: {', '.join(inputs)}.",
            where="--enumerate",
            allowed="one size, a range (`--shapes dynamic`), or an iOS 18 target",
        )


def input_types(ct: ModuleType, model: Model, settings: LoweringSettings) -> list[Any]:
    """coremltools' description of the inputs, in the model's order; equal axes share one symbol."""
    ranges: dict[str, Any] = {}
    types = []
    for spec in model.inputs:
        if settings.image_input:
            shape = tuple(fixed_size(axis, settings) for axis in spec.shape)
            types.append(ct.ImageType(name=spec.name, shape=shape, color_layout=ct.colorlayout.RGB))
            continue
        if settings.enumerated and any(isinstance(axis, Axis) and varies(axis, settings) for axis in spec.shape):
            shape = _enumerated_shapes(ct, spec, settings)
        else:
            shape = tuple(_dimension(ct, axis, settings, ranges) for axis in spec.shape)
        types.append(ct.TensorType(name=spec.name, shape=shape, dtype=np.dtype(file_dtype(spec)).type))
    return types


def _dimension(ct: ModuleType, axis: int | Axis, settings: LoweringSettings, ranges: dict[str, Any]) -> Any:
    if not isinstance(axis, Axis) or not varies(axis, settings):
        return fixed_size(axis, settings)
    if axis.name not in ranges:
        ranges[axis.name] = ct.RangeDim(lower_bound=axis.minimum, upper_bound=axis.maximum, default=axis.example)
    return ranges[axis.name]
