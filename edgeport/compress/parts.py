"""A QuantizedTensor as named tensors and a few numbers, for the files of `saved.py` and `journal.py`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from edgeport.quantized import QuantizedTensor

PARTS = ("codes", "scale", "zero_point", "palette")


def tensors_of(name: str, tensor: QuantizedTensor) -> dict[str, torch.Tensor]:
    """The parts that a weight has, as `NAME.PART`."""
    parts = {part: getattr(tensor, part) for part in PARTS}
    return {f"{name}.{part}": value.contiguous() for part, value in parts.items() if value is not None}


def form_of(tensor: QuantizedTensor) -> dict[str, Any]:
    """The rest of it, as JSON values."""
    return {
        "bits": tensor.bits,
        "group_size": tensor.group_size,
        "axis": tensor.axis,
        "scale_dtype": tensor.scale_dtype,
    }


def read_tensor(file: Any, name: str, form: Mapping[str, Any]) -> QuantizedTensor:
    """Undo the two. `file` is an open safetensors file."""
    stored = {part: f"{name}.{part}" for part in PARTS}
    names = set(file.keys())
    parts = {part: file.get_tensor(key) for part, key in stored.items() if key in names}
    return QuantizedTensor(**{"zero_point": None, **parts, **form})
