"""4-bit weights of XNNPACK in groups wider than 32: what the runtime computes, and what the file holds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from edgeport.compress import apply_recipe
from edgeport.compress.quantize.grid import Grid
from edgeport.compress.quantize.rtn import quantize_rtn
from edgeport.errors import TargetRefusesError
from edgeport.export.artifact import LoweringSettings
from edgeport.export.dispatch import lower, read_weights
from edgeport.model.types import Axis, Model, Source, TensorSpec
from edgeport.quantized import dequantize
from edgeport.recipe import Recipe
from edgeport.runtime.executorch import open_executorch
from edgeport.schema import parse_mapping
from edgeport.target import load_target

pytest.importorskip("executorch")

TARGET = "android-arm64-executorch"
BATCH = Axis("batch", 1, 4, 2)


class Grouped(nn.Module):
    """A table, a layer of several groups, one of a single group, and a head that shares the table."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(96, 256)
        self.several = nn.Linear(256, 40)
        self.single = nn.Linear(128, 24, bias=False)
        self.head = nn.Linear(256, 96, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.table(ids), self.several(rows), self.single(rows[..., :128]), self.head(rows)


OUTPUTS = {"table": (BATCH, 5, 256), "several": (BATCH, 7, 40), "single": (BATCH, 7, 24), "head": (BATCH, 7, 96)}


def grouped() -> Model:
    torch.manual_seed(0)
    example = {"ids": torch.randint(0, 96, (2, 5)), "rows": torch.randn(2, 7, 256)}
    return Model(
        name="tiny",
        module=Grouped().eval(),
        source=Source("factory", "tiny", {}),
        task="other",
        modality="other",
        inputs=(TensorSpec("ids", "int64", (BATCH, 5)), TensorSpec("rows", "float32", (BATCH, 7, 256))),
        outputs=tuple(TensorSpec(name, "float32", shape) for name, shape in OUTPUTS.items()),
        example=example,
        huggingface=False,
    )


def rounded_rows(rows: torch.Tensor) -> torch.Tensor:
    """Each row to int8 and back, asymmetric, over a range that holds 0: XNNPACK's qdint8."""
    low, high = rows.amin(-1, keepdim=True).clamp_max(0), rows.amax(-1, keepdim=True).clamp_min(0)
    scale = (high - low) / 255
    zero = torch.clamp(torch.round(-128 - low / scale), -128, 127)
    return (torch.clamp(torch.round(rows / scale) + zero, -128, 127) - zero) * scale


@pytest.mark.parametrize("size", [64, 128])
def test_wide_groups_compute_what_their_codes_say(size: int, tmp_path: Path):
    form = f"int4_g{size}"
    step = {"method": "rtn", "linear": form, "embedding": form, "activations": "dynamic_int8"}
    recipe = parse_mapping(Recipe, {"name": "x", "summary": "x", "compress": [step], "gate": {}}, "test")
    target = load_target(TARGET)
    model, _ = apply_recipe(grouped(), recipe, target)
    assert {tensor.group_size for tensor in model.quantized.values()} == {size}
    artifact = lower(model, target, LoweringSettings("fp32", "fixed"), tmp_path)

    stored = read_weights(artifact)
    assert set(stored) == {"table.weight", "several.weight", "single.weight"}
    for name, tensor in model.quantized.items():
        assert torch.equal(stored[name].codes, tensor.codes), name
        assert torch.equal(stored[name].scale, tensor.scale), name
        assert torch.equal(dequantize(stored[name]), dequantize(tensor)), name

    weights = {name: dequantize(tensor) for name, tensor in model.quantized.items()}
    rows = rounded_rows(model.example["rows"])
    expected = {
        "table": weights["table.weight"][model.example["ids"]],
        "several": rows @ weights["several.weight"].T + model.module.several.bias.detach(),
        "single": rounded_rows(model.example["rows"][..., :128]) @ weights["single.weight"].T,
        "head": rows @ weights["table.weight"].T,
    }
    outputs = open_executorch(artifact).run({name: value.numpy() for name, value in model.example.items()})
    for name, value in expected.items():
        error = float(np.abs(outputs[name] - value.numpy()).max() / value.abs().max())
        assert error < 1e-5, (name, error)
    outside = set(artifact.facts["outside_delegates"])
    assert not {name for name in outside if "linear" in name or "quantize_per" in name}


def test_groups_that_are_no_multiple_of_32_are_refused_by_name(tmp_path: Path):
    original = grouped()
    tensor = quantize_rtn(original.module.several.weight, Grid(bits=4, group_size=16, scale_dtype="bfloat16"))
    model = replace(original, quantized={"several.weight": tensor})
    with pytest.raises(TargetRefusesError, match="4-bit") as error:
        lower(model, load_target(TARGET), LoweringSettings("fp32", "fixed"), tmp_path)
    assert error.value.where == "layer several.weight"
    assert "multiple of 32" in error.value.allowed
