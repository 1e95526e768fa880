"""A compressed model on disk: codes and scales as safetensors, what happened to each layer as JSON."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from safetensors import safe_open
from safetensors.torch import save_file

from edgeport.activations import LayerRange
from edgeport.compress.apply import LayerRecord, set_weights
from edgeport.compress.assign import Assignment
from edgeport.compress.parts import form_of, read_tensor, tensors_of
from edgeport.data.samples import SampleRecord
from edgeport.model.corrected import add_corrections
from edgeport.model.types import Model
from edgeport.storage import canonical_json

RANGES: TypeAdapter[dict[str, LayerRange]] = TypeAdapter(dict[str, LayerRange])
WEIGHTS = "quantized.safetensors"
LAYERS = "layers.json"
RECORDS: TypeAdapter[tuple[LayerRecord, ...]] = TypeAdapter(tuple[LayerRecord, ...])


def _prepared(original: Model, model: Model) -> dict[str, torch.Tensor]:
    """The float tensors that preparation changed or added (a bias that a norm's moved into), by name; each once."""
    before = original.module.state_dict()
    return {
        name: value.detach().clone()
        for name, value in model.module.named_parameters()
        if name not in model.quantized and (name not in before or not torch.equal(value, before[name]))
    }


def save_compressed(
    folder: Path,
    original: Model,
    model: Model,
    records: tuple[LayerRecord, ...],
    calibration: SampleRecord | None = None,
) -> None:
    """Write what makes `model` of the original into a folder: quantized weights, float weights that preparation
    changed, activation formats and ranges, layer records, and what the weights were tuned on."""
    tensors = {f"{name}.float": value for name, value in _prepared(original, model).items()}
    forms: dict[str, dict[str, Any]] = {}
    for name, tensor in model.quantized.items():
        tensors |= tensors_of(name, tensor)
        forms[name] = form_of(tensor)
    save_file(tensors, folder / WEIGHTS)
    tuned = None if calibration is None else asdict(calibration)
    record = {
        "forms": forms,
        "activations": dict(model.activations),
        "ranges": {name: asdict(found) for name, found in model.ranges.items()},
        "layers": [asdict(record) for record in records],
        "calibration": tuned,
    }
    (folder / LAYERS).write_text(canonical_json(record))


def load_calibration(folder: Path) -> SampleRecord | None:
    """What `save_compressed` was told that the weights were tuned on."""
    record = json.loads((folder / LAYERS).read_text())["calibration"]
    return None if record is None else SampleRecord(**record)


def load_records(folder: Path) -> tuple[LayerRecord, ...]:
    """The layer records that `save_compressed` wrote."""
    return RECORDS.validate_python(json.loads((folder / LAYERS).read_text())["layers"])


def load_compressed(folder: Path, model: Model, assignments: tuple[Assignment, ...]) -> Model:
    """The uncompressed model with the saved quantized weights in place."""
    record = json.loads((folder / LAYERS).read_text())
    forms = record["forms"]
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        prepared = [name for name in file.keys() if name.endswith(".float")]  # noqa: SIM118  # no mapping
        floats = {name.removesuffix(".float"): file.get_tensor(name) for name in prepared}
        quantized = {name: read_tensor(file, name, form) for name, form in forms.items()}
    added = {item.name: item.shape for item in assignments if item.corrects is not None and item.name in quantized}
    if floats or added:
        model = replace(model, module=copy.deepcopy(model.module))
        add_corrections(model.module, added)
        parameters = dict(model.module.named_parameters())
        with torch.no_grad():
            for name, value in floats.items():
                if name in parameters:
                    parameters[name].copy_(value)
                else:
                    layer, _, attribute = name.rpartition(".")
                    added_value = torch.nn.Parameter(value, requires_grad=False)
                    model.module.get_submodule(layer).register_parameter(attribute, added_value)
    made = set_weights(model, quantized, assignments)
    # Static activations are given up where they cost too much, which the assignments don't know.
    return replace(made, activations=record["activations"], ranges=RANGES.validate_python(record["ranges"]))
