"""Read back, from the saved package, the codes and scales that are really there."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch

from edgeport.errors import BadInputError
from edgeport.export.artifact import Artifact
from edgeport.mlpackage.constants import Constant, constants
from edgeport.mlpackage.package import load_package
from edgeport.mlpackage.program import parse_function
from edgeport.quantized import QuantizedTensor, ScaleDtype

BLOCKWISE = "constexpr_blockwise_shift_scale"  # iOS 18
AFFINE = "constexpr_affine_dequantize"  # iOS 16 and 17
SCALE_DTYPES: dict[str, ScaleDtype] = {"fp16": "float16", "fp32": "float32"}


def _parameter_names(operator: str) -> tuple[str, str, str]:
    """What an operator calls codes, scale and zero point."""
    if operator == BLOCKWISE:
        return "data", "scale", "offset"
    return "quantized_data", "scale", "zero_point"


def _element(constant: Constant, key: str) -> str:
    stored = constant.stored.get(key)
    if stored is None:
        raise BadInputError(f"The constant {constant.name!r} stores no {key}.")
    return str(getattr(stored.element, "name", stored.element))


def logical(constant: Constant) -> QuantizedTensor:
    """A compressed constant as codes and scales.

    Raises:
        BadInputError: it is not stored as integers with scales along its first axis and groups along its second.
    """
    if constant.operator not in (BLOCKWISE, AFFINE):
        raise BadInputError(
            f"The constant {constant.name!r} is stored as {constant.operator}.", allowed=f"{BLOCKWISE}, {AFFINE}"
        )
    data_name, scale_name, zero_name = _parameter_names(constant.operator)
    codes = np.array(constant.parameters[data_name])
    if codes.dtype == np.uint8 and codes.max(initial=0) > 127:
        raise BadInputError(f"The constant {constant.name!r} holds codes beyond int8.")
    scale = np.array(constant.parameters[scale_name], np.float32)
    zero = constant.parameters.get(zero_name)
    if constant.operator == AFFINE:
        axis = int(cast("Any", constant.parameters["axis"]))
        if axis != 0:
            raise BadInputError(f"The constant {constant.name!r} has its scales along axis {axis}.", allowed="0")
    rows, columns = codes.shape[0], codes.size // codes.shape[0]
    groups = scale.size // rows
    if groups == 0 or scale.size % rows or columns % groups or (groups > 1 and scale.shape[:2] != (rows, groups)):
        raise BadInputError(f"The constant {constant.name!r} has scales of shape {scale.shape} for {codes.shape}.")
    zeros = None if zero is None or not np.any(zero) else np.broadcast_to(np.asarray(zero, np.int8), scale.shape)
    bits = int("".join(filter(str.isdigit, _element(constant, data_name))))
    return QuantizedTensor(
        codes=torch.from_numpy(codes.astype(np.int8)),
        scale=torch.from_numpy(scale.reshape(rows, groups)),
        zero_point=None if zeros is None else torch.from_numpy(zeros.copy().reshape(rows, groups)),
        bits=bits,
        group_size=columns // groups,
        scale_dtype=SCALE_DTYPES[_element(constant, scale_name)],
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
