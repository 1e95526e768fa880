"""Write weights with many zeros as Core ML's constexpr_sparse_to_dense: a mask of one bit a place, and the numbers.

The operator is in iOS 16's form (mask packed in bytes) for iOS 17, and in iOS 18's (a tensor of single bits).
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any, Literal

import numpy as np
import torch

from edgeport.errors import EdgeportError
from edgeport.mlpackage.constants import Constant
from edgeport.packing import pack_bits

OPERATOR = "constexpr_sparse_to_dense"


def sparse_arrays(weight: torch.Tensor, deployment: Literal["iOS17", "iOS18"]) -> tuple[str, dict[str, Any]]:
    """The operator and its parameters as coremltools takes them.

    Args:
        weight: float32, any shape; its zeros are not stored.
    """
    values = weight.detach().to(torch.float32).numpy()
    mask = values != 0
    numbers = values[mask]
    if deployment == "iOS17":
        packed = pack_bits(mask.astype(np.uint8).reshape(-1), 1)
        return OPERATOR, {"nonzero_data": numbers, "mask": packed, "shape": np.array(values.shape, np.uint32)}
    types = import_module("coremltools.converters.mil.mil.types")
    kind: type = types.nptype_from_builtin(types.string_to_builtin("uint1"))
    return OPERATOR, {"nonzero_data": numbers, "mask": mask.astype(np.uint8).astype(kind)}


def check_sparse_weights(
    weights: Mapping[str, torch.Tensor], found: Mapping[str, Constant], precision: str
) -> dict[str, str]:
    """See that the file holds every sparse weight as such, bit for bit, and where.

    Args:
        weights: by parameter name, float32.
        found: the constants of the file.
        precision: "fp16" where the numbers are rounded to float16.

    Raises:
        EdgeportError: one is missing or differs (a bug: nothing here should do that).
    """
    stored = {name: constant for name, constant in found.items() if constant.operator == OPERATOR}
    places = {}
    for name, weight in weights.items():
        wanted = (weight.half() if precision == "fp16" else weight).float().numpy()
        place = next((key for key, one in stored.items() if np.array_equal(_value(one), wanted)), None)
        if place is None:
            raise EdgeportError("The converter did not keep a sparse weight as it was.", where=f"layer {name}")
        places[name] = place
        del stored[place]
    return places


def _value(constant: Constant) -> np.ndarray:
    return np.asarray(constant.value(), np.float32)
