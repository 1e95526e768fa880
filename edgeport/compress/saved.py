"""A compressed model on disk: codes and scales as safetensors, what happened to each layer as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from edgeport.compress.apply import LayerRecord, set_weights
from edgeport.compress.assign import Assignment
from edgeport.model.types import Model
from edgeport.quantized import QuantizedTensor
from edgeport.storage import canonical_json

WEIGHTS = "quantized.safetensors"
LAYERS = "layers.json"


def save_compressed(folder: Path, model: Model, records: tuple[LayerRecord, ...]) -> None:
    """Write a model's quantized weights and layer records into a folder."""
    tensors: dict[str, torch.Tensor] = {}
    forms: dict[str, dict[str, Any]] = {}
    for name, tensor in model.quantized.items():
        tensors[f"{name}.codes"] = tensor.codes
        tensors[f"{name}.scale"] = tensor.scale
        if tensor.zero_point is not None:
            tensors[f"{name}.zero_point"] = tensor.zero_point
        forms[name] = {
            "bits": tensor.bits,
            "group_size": tensor.group_size,
            "axis": tensor.axis,
            "scale_dtype": tensor.scale_dtype,
        }
    save_file(tensors, folder / WEIGHTS)
    text = canonical_json({"forms": forms, "layers": [asdict(record) for record in records]})
    (folder / LAYERS).write_text(text)


def load_records(folder: Path) -> tuple[LayerRecord, ...]:
    """The layer records that `save_compressed` wrote."""
    rows = json.loads((folder / LAYERS).read_text())["layers"]
    return tuple(LayerRecord(**{**row, **{key: tuple(row[key]) for key in ("kinds", "shape", "tied")}}) for row in rows)


def load_compressed(folder: Path, model: Model, assignments: tuple[Assignment, ...]) -> Model:
    """The uncompressed model with the saved quantized weights in place."""
    forms = json.loads((folder / LAYERS).read_text())["forms"]
    quantized = {}
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        names = set(file.keys())
        for name, form in forms.items():
            zero = file.get_tensor(f"{name}.zero_point") if f"{name}.zero_point" in names else None
            quantized[name] = QuantizedTensor(
                codes=file.get_tensor(f"{name}.codes"),
                scale=file.get_tensor(f"{name}.scale"),
                zero_point=zero,
                **form,
            )
    return set_weights(model, quantized, assignments)
