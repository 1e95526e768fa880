"""Read back, from the saved package, the codes, scales, zero points and palettes that are really there."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch

from edgeport.errors import BadInputError
from edgeport.export.artifact import Artifact
from edgeport.mlpackage.constants import Constant, constants
from edgeport.mlpackage.package import load_package
from edgeport.mlpackage.program import parse_function
from edgeport.mlpackage.values import ElementType, unpack_bits
from edgeport.quantized import QuantizedTensor, ScaleDtype

BLOCKWISE = "constexpr_blockwise_shift_scale"  # iOS 18
AFFINE = "constexpr_affine_dequantize"  # iOS 16 and 17
PALETTE = "constexpr_lut_to_dense"
SCALE_DTYPES: dict[str, ScaleDtype] = {"fp16": "float16", "fp32": "float32"}


def _element(constant: Constant, key: str) -> ElementType:
    stored = constant.stored.get(key)
    if stored is None:
        raise BadInputError(f"The constant {constant.name!r} stores no {key}.")
    return stored.element


def _float_type(constant: Constant, key: str) -> ScaleDtype:
    name = _element(constant, key).name
    if name not in SCALE_DTYPES:
        raise BadInputError(
            f"The constant {constant.name!r} has its {key} in {name}.", allowed=", ".join(sorted(SCALE_DTYPES))
        )
    return SCALE_DTYPES[name]


def _groups(constant: Constant, shape: tuple[int, ...], scale: np.ndarray) -> int:
    """Scales of a channel: 1, or as many as the second axis has blocks.

    Raises:
        BadInputError: one scale serves several channels, or blocks cut the axes after the second.
    """
    expected = (shape[0], scale.shape[1] if scale.ndim > 1 else 1, *[1] * (len(shape) - 2))
    if scale.shape not in (expected, expected[:1]) or (len(shape) > 1 and shape[1] % expected[1]):
        raise BadInputError(f"The constant {constant.name!r} has scales of shape {scale.shape} for {shape}.")
    return expected[1]


def _integers(constant: Constant) -> QuantizedTensor:
    """Codes with scales: signed ones are symmetric unless a zero point differs from 0.

    Unsigned ones have zero points, and both move down by half the range; iOS 18's without an offset are symmetric.
    """
    data_name, zero_name = ("data", "offset") if constant.operator == BLOCKWISE else ("quantized_data", "zero_point")
    if constant.operator == AFFINE and int(cast("Any", constant.parameters["axis"])) != 0:
        axis = int(cast("Any", constant.parameters["axis"]))
        raise BadInputError(f"The constant {constant.name!r} has its scales along axis {axis}.", allowed="0")
    element = _element(constant, data_name)
    codes = np.asarray(constant.parameters[data_name]).astype(np.int16)
    scale = np.array(constant.parameters["scale"], np.float32)
    groups = _groups(constant, codes.shape, scale)
    half = 2 ** (element.bits - 1)
    zero = constant.parameters.get(zero_name)
    if zero is not None:
        zero = np.broadcast_to(np.asarray(zero), scale.shape)
        if not np.array_equal(zero, zero.astype(np.int16)):
            raise BadInputError(f"The constant {constant.name!r} has zero points that are no codes.")
        zero = zero.astype(np.int16).reshape(codes.shape[0], groups)
        if not element.is_signed:
            codes, zero = codes - half, zero - half
        elif constant.operator == AFFINE and not zero.any():
            zero = None  # the operator of iOS 16 always has one
    if codes.max(initial=0) >= half:
        raise BadInputError(f"The constant {constant.name!r} holds codes beyond {'int' + str(element.bits)}.")
    return QuantizedTensor(
        codes=torch.from_numpy(codes.astype(np.int8)),
        scale=torch.from_numpy(scale.reshape(codes.shape[0], groups)),
        zero_point=None if zero is None else torch.from_numpy(zero.astype(np.int8)),
        bits=element.bits,
        group_size=codes.size // (codes.shape[0] * groups),
        scale_dtype=_float_type(constant, "scale"),
    )


def _palettes(constant: Constant) -> QuantizedTensor:
    """Indices with one palette, or one every some channels. In iOS 16's form the indices are packed in bytes."""
    lut, indices = np.array(constant.parameters["lut"], np.float32), np.asarray(constant.parameters["indices"])
    packed = "shape" in constant.parameters
    bits = int(lut.size).bit_length() - 1 if packed else _element(constant, "indices").bits
    shape = tuple(int(size) for size in cast("Any", constant.parameters["shape"])) if packed else indices.shape
    expected = (2**bits,) if packed else (lut.shape[0], *[1] * (len(shape) - 1), 2**bits, 1)
    if lut.shape != expected or (not packed and shape[0] % lut.shape[0]):
        raise BadInputError(
            f"The constant {constant.name!r} has palettes of shape {lut.shape} for {shape}.",
            allowed="2**bits single values, shared by whole channels",
        )
    if packed:
        indices = unpack_bits(indices, bits, int(np.prod(shape, dtype=np.int64)), signed=False).reshape(shape)
    return QuantizedTensor(
        codes=torch.from_numpy(np.array(indices, np.uint8)),
        scale=torch.ones(indices.shape[0], 1),
        zero_point=None,
        bits=bits,
        group_size=indices.size // indices.shape[0],
        scale_dtype=_float_type(constant, "lut"),
        palette=torch.from_numpy(lut.reshape(-1, 2**bits)),
    )


def logical(constant: Constant) -> QuantizedTensor:
    """A compressed constant in the logical form.

    Raises:
        BadInputError: it is stored in a form that has none: scales along another axis than the first, blocks that
            cut other axes than the second, palettes of vectors, sparse weights, ...
    """
    if constant.operator in (BLOCKWISE, AFFINE):
        return _integers(constant)
    if constant.operator == PALETTE:
        return _palettes(constant)
    raise BadInputError(
        f"The constant {constant.name!r} is stored as {constant.operator}.", allowed=f"{BLOCKWISE}, {AFFINE}, {PALETTE}"
    )


def read_weights(artifact: Artifact) -> dict[str, QuantizedTensor]:
    """The compressed weights in the artifact's package, by parameter name.

    Raises:
        BadInputError: the package is damaged, or a weight that should be compressed is not there or not so.
    """
    program = constants(parse_function(load_package(artifact.path)).body)
    found = {}
    for name, stored_as in artifact.weights.items():
        if stored_as not in program:
            raise BadInputError(
                f"The package has no constant {stored_as!r} for the weight {name!r}.", where=artifact.path
            )
        found[name] = logical(program[stored_as])
    return found
