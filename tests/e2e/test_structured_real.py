"""Pruned real models through the shipped file: half of MiniLM, MobileNetV2 without a quarter of its inner channels."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from edgeport.bundle.read import read_bundle
from edgeport.compress.calibrate import as_tensors
from edgeport.compress.chain import call
from edgeport.compress.distill.distance import distance
from edgeport.compress.prune.narrow import choose_channels, cut_channels
from edgeport.compress.prune.repair import repair_channels
from edgeport.data.samples import samples
from edgeport.model.inputs import select_outputs
from edgeport.model.load import load_model
from edgeport.model.types import Model
from edgeport.pipeline import ExportRequest, export
from edgeport.recipe import Recipe
from edgeport.restructuring import PruneChannels
from edgeport.schema import parse_mapping
from edgeport.target import load_target

pytestmark = [pytest.mark.slow, pytest.mark.network]


def test_half_of_minilm_makes_half_the_products(tmp_path: Path) -> None:
    steps = [{"method": "prune_depth", "keep": 0.5}]
    tables = {"calibration": {"samples": 16}, "gate": {}}
    recipe = parse_mapping(Recipe, {"name": "half", "summary": "x", "compress": steps, **tables}, "test")
    request = ExportRequest(
        "zoo:minilm", load_target("linux-x86_64-ort"), recipe, tmp_path / "out", samples=8, quick=True
    )
    bundle = read_bundle(export(request).bundle)
    assert bundle.evidence is not None
    products, size = bundle.evidence.products, bundle.evidence.size
    (step,) = bundle.manifest.steps
    assert products is not None
    assert products.file == products.model
    tokens = products.input_shapes["input_ids"][1]
    # Three of six layers of 384 channels and 1536 inner ones, and the pooler.
    assert products.file == 2 * (3 * tokens * (4 * 384**2 + 2 * 384 * 1536) + 384**2)
    assert size.predicted_bytes is not None
    assert size.bytes == pytest.approx(size.predicted_bytes, rel=0.01)
    assert step.bytes_after == pytest.approx(size.bytes, rel=0.01)


def test_mobilenetv2_solved_again_answers_as_before_more_often_than_not() -> None:
    model = load_model("zoo:mobilenetv2")
    calibration, held = (
        as_tensors(model, samples(model, count=14, split=split)) for split in ("calibration", "parity")
    )
    whole = ("features.*.conv.1", "features.*.conv.2", "features.0.*", "features.18.*")
    step = PruneChannels(method="prune_channels", keep=0.75, exclude=whole)
    kept, _ = choose_channels(model, step, calibration)
    cut = cut_channels(model, kept)
    solved = repair_channels(cut, model, kept, calibration)
    names = [spec.name for spec in model.outputs]

    def outputs(one: Model) -> list[dict[str, torch.Tensor]]:
        with torch.no_grad():
            return [select_outputs(call(one.module, sample), names) for sample in held]

    wanted = outputs(model)

    def divergence(one: Model) -> float:
        return sum(float(distance(*pair, {})) for pair in zip(outputs(one), wanted, strict=True)) / len(held)

    assert divergence(solved) < 0.25 * divergence(cut)
    same = [
        int(next(iter(a.values())).argmax()) == int(next(iter(b.values())).argmax())
        for a, b in zip(outputs(solved), wanted, strict=True)
    ]
    assert sum(same) > len(same) / 2
