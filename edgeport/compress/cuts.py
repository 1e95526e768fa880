"""A restructured model on disk: its cuts and records as JSON, and the values that the cuts alone don't give."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from safetensors.torch import load_file, save_file

from edgeport.compress.prune.cut import Cut
from edgeport.compress.restructure import Restructured, StepRecord, apply_cuts
from edgeport.model.types import Model
from edgeport.storage import canonical_json

VALUES, RECORD = "values.safetensors", "cuts.json"
STEPS: TypeAdapter[tuple[StepRecord, ...]] = TypeAdapter(tuple[StepRecord, ...])


def save_restructured(folder: Path, original: Model, made: Restructured) -> None:
    """Write what makes a restructured model of the original into an existing folder."""
    before = dict(apply_cuts(original, made.cuts).module.named_parameters())
    values = {
        name: value.detach().clone()
        for name, value in made.model.module.named_parameters()
        if not torch.equal(value, before[name])
    }
    save_file(values, folder / VALUES)
    record = {"cuts": [asdict(cut) for cut in made.cuts], "steps": [asdict(step) for step in made.steps]}
    (folder / RECORD).write_text(canonical_json(record))


def load_steps(folder: Path) -> tuple[StepRecord, ...]:
    """The records that `save_restructured` wrote."""
    return STEPS.validate_python(json.loads((folder / RECORD).read_text())["steps"])


def load_restructured(folder: Path, original: Model) -> Restructured:
    """What `save_restructured` wrote, from the same original."""
    cuts = _cuts(json.loads((folder / RECORD).read_text())["cuts"])
    model = apply_cuts(original, cuts)
    values = load_file(folder / VALUES)
    if values:
        model = replace(model, module=copy.deepcopy(model.module))
        with torch.no_grad():
            for name, value in values.items():
                model.module.get_parameter(name).copy_(value)
    return Restructured(model, cuts, load_steps(folder))


def _cuts(values: Sequence[Mapping[str, Any]]) -> tuple[Cut, ...]:
    return tuple(Cut(value["method"], {name: tuple(kept) for name, kept in value["kept"].items()}) for value in values)
