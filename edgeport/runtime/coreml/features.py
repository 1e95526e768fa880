"""What a package's description says about inputs and outputs, and arrays made to fit it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from edgeport.errors import BadInputError
from edgeport.mlpackage.package import Package

# `ArrayFeatureType.ArrayDataType` and `ImageFeatureType.ColorSpace` of coremltools' FeatureTypes.proto.
ARRAY_TYPES = {65568: "float32", 65600: "float64", 131104: "int32", 131080: "int8", 65552: "float16"}
COLOR_SPACES: Mapping[int, Literal["gray", "rgb", "bgr"]] = {10: "gray", 20: "rgb", 30: "bgr", 40: "gray"}


@dataclass(frozen=True)
class InputFeature:
    """One input.

    Attributes:
        dtype: numpy dtype name.
        shapes: allowed shapes when they are enumerated (a fixed shape is one), else empty.
        ranges: least and largest size of each axis when they vary (largest None: no limit), else empty.
        color: channel order of a picture, None for an array.
    """

    dtype: str
    shapes: tuple[tuple[int, ...], ...] = ()
    ranges: tuple[tuple[int, int | None], ...] = ()
    color: Literal["gray", "rgb", "bgr"] | None = None

    def accepts(self, shape: tuple[int, ...]) -> bool:
        """The shape is allowed."""
        if self.shapes:
            return shape in self.shapes
        return len(shape) == len(self.ranges) and all(
            low <= size and (high is None or size <= high) for size, (low, high) in zip(shape, self.ranges, strict=True)
        )

    def allowed(self) -> str:
        """The allowed shapes in words."""
        if self.shapes:
            return " or ".join(str(shape) for shape in self.shapes)
        return "(" + ", ".join(f"{low}..{'' if high is None else high}" for low, high in self.ranges) + ")"


@dataclass(frozen=True)
class Features:
    """Inputs by name, and outputs by name with their numpy dtype (None for labels and dictionaries)."""

    inputs: Mapping[str, InputFeature]
    outputs: Mapping[str, str | None]


def function_features(package: Package, function: str) -> Features:
    """The description of one function; single-function packages describe it at the top."""
    description = package.spec.description
    for candidate in description.functions:
        if candidate.name == function:
            description = candidate
    return Features(
        inputs={item.name: _input(item, package) for item in description.input},
        outputs={item.name: _output_dtype(item) for item in description.output},
    )


def prepare_input(name: str, array: np.ndarray, feature: InputFeature) -> torch.Tensor:
    """An array as the tensor that the program takes.

    Raises:
        BadInputError: the shape or the dtype does not fit, an integer is out of range, or a finite value would
            become infinite.
    """
    if feature.color is not None:
        array = _picture(name, array, feature)
    if not feature.accepts(array.shape):
        raise BadInputError(f"The input has shape {array.shape}.", where=f"input '{name}'", allowed=feature.allowed())
    return torch.from_numpy(_fit_dtype(name, array, np.dtype(feature.dtype)))


def _picture(name: str, array: np.ndarray, feature: InputFeature) -> np.ndarray:
    """A picture as (1, channels, H, W) float32 in the order of the package's colour space."""
    if array.dtype == np.uint8 and array.ndim == 3 and array.shape[-1] == 3:
        array = array.transpose(2, 0, 1)[None]
    elif array.dtype == np.uint8 and array.ndim == 2:
        array = array[None, None]
    if array.ndim != 4 or (array.size and (array.min() < 0 or array.max() > 255)):
        raise BadInputError(
            "The input is no picture.",
            where=f"input '{name}'",
            allowed="uint8 (H, W, 3) in RGB order, or (1, 3, H, W) with values 0 to 255",
        )
    return np.ascontiguousarray(array[:, ::-1] if feature.color == "bgr" else array)


def _fit_dtype(name: str, array: np.ndarray, wanted: np.dtype[Any]) -> np.ndarray:
    """Integers exactly, floats rounded; a copy, so that no evaluation can change the caller's array."""
    if wanted.kind == "i":
        limits = np.iinfo(wanted)
        whole = array.dtype.kind in "iub"
        if not whole or (array.size and (int(array.min()) < limits.min or int(array.max()) > limits.max)):
            raise BadInputError(
                f"The input's {array.dtype} values can't be held exactly in {wanted}.",
                where=f"input '{name}'",
                allowed=f"integers from {limits.min} to {limits.max}",
            )
        return array.astype(wanted)
    if array.dtype.kind not in "fiub":
        raise BadInputError(f"The input has dtype {array.dtype}.", where=f"input '{name}'", allowed=str(wanted))
    with np.errstate(over="ignore"):
        fitted = array.astype(wanted)
    if bool(np.any(np.isinf(fitted) & np.isfinite(array))):
        raise BadInputError(f"The input has values beyond {wanted}.", where=f"input '{name}'")
    return fitted


def _input(item: Any, package: Package) -> InputFeature:
    kind = item.type.WhichOneof("Type")
    if kind == "multiArrayType":
        return _array_input(item.type.multiArrayType, package)
    if kind == "imageType":
        return _image_input(item.type.imageType, package)
    raise BadInputError(f"The input '{item.name}' is a {kind}.", where=package.path, allowed="arrays and pictures")


def _array_input(array: Any, package: Package) -> InputFeature:
    dtype = _array_dtype(array, package)
    flexibility = array.WhichOneof("ShapeFlexibility")
    if flexibility == "enumeratedShapes":
        shapes = tuple(tuple(int(size) for size in shape.shape) for shape in array.enumeratedShapes.shapes)
        return InputFeature(dtype, shapes=shapes)
    if flexibility == "shapeRange":
        return InputFeature(dtype, ranges=tuple(_range(size) for size in array.shapeRange.sizeRanges))
    return InputFeature(dtype, shapes=(tuple(int(size) for size in array.shape),))


def _image_input(image: Any, package: Package) -> InputFeature:
    if image.colorSpace not in COLOR_SPACES:
        raise BadInputError(f"The package has a picture of colour space {image.colorSpace}.", where=package.path)
    color = COLOR_SPACES[image.colorSpace]
    channels = 1 if color == "gray" else 3
    flexibility = image.WhichOneof("SizeFlexibility")
    if flexibility == "imageSizeRange":
        sizes = (_range(image.imageSizeRange.heightRange), _range(image.imageSizeRange.widthRange))
        return InputFeature("float32", ranges=((1, 1), (channels, channels), *sizes), color=color)
    if flexibility == "enumeratedSizes":
        shapes = tuple((1, channels, int(size.height), int(size.width)) for size in image.enumeratedSizes.sizes)
        return InputFeature("float32", shapes=shapes, color=color)
    return InputFeature("float32", shapes=((1, channels, int(image.height), int(image.width)),), color=color)


def _range(size: Any) -> tuple[int, int | None]:
    return int(size.lowerBound), None if size.upperBound < 0 else int(size.upperBound)


def _array_dtype(array: Any, package: Package) -> str:
    if array.dataType not in ARRAY_TYPES:
        raise BadInputError(f"The package has an array of type {array.dataType}.", where=package.path)
    return ARRAY_TYPES[array.dataType]


def _output_dtype(item: Any) -> str | None:
    if item.type.WhichOneof("Type") != "multiArrayType":
        return None
    return ARRAY_TYPES.get(item.type.multiArrayType.dataType)
