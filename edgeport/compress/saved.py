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
from edgeport.data.samples import SampleRecord
from edgeport.model.types import Model
from edgeport.quantized import QuantizedTensor
from edgeport.storage import canonical_json

WEIGHTS = "quantized.safetensors"
LAYERS = "layers.json"
PARTS = ("codes", "scale", "zero_point", "palette")


def save_compressed(
    folder: Path, model: Model, records: tuple[LayerRecord, ...], calibration: SampleRecord | None = None
) -> None:
    """Write a model's quantized weights, layer records, and what they were tuned on, into a folder."""
    tensors: dict[str, torch.Tensor] = {}
    forms: dict[str, dict[str, Any]] = {}
    for name, tensor in model.quantized.items():
        parts = {part: getattr(tensor, part) for part in PARTS}
        tensors |= {f"{name}.{part}": value.contiguous() for part, value in parts.items() if value is not None}
        forms[name] = {
            "bits": tensor.bits,
            "group_size": tensor.group_size,
            "axis": tensor.axis,
            "scale_dtype": tensor.scale_dtype,
        }
    save_file(tensors, folder / WEIGHTS)
    tuned = None if calibration is None else asdict(calibration)
    text = canonical_json({"forms": forms, "layers": [asdict(record) for record in records], "calibration": tuned})
    (folder / LAYERS).write_text(text)


def load_calibration(folder: Path) -> SampleRecord | None:
    """What `save_compressed` was told that the weights were tuned on."""
    record = json.loads((folder / LAYERS).read_text())["calibration"]
    return None if record is None else SampleRecord(**record)


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
            parts = {part: file.get_tensor(f"{name}.{part}") for part in PARTS if f"{name}.{part}" in names}
            quantized[name] = QuantizedTensor(**{"zero_point": None, **parts, **form})
    return set_weights(model, quantized, assignments)
