"""Low-rank corrections in the files of three backends, and through a compressed folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from edgeport.compress import apply_recipe
from edgeport.compression import CompressRequest, compress
from edgeport.data.samples import SampleRecord, Samples
from edgeport.export.artifact import LoweringSettings
from edgeport.export.dispatch import lower, read_weights
from edgeport.model.compressed import load_compressed
from edgeport.model.corrected import CorrectedLinear, corrected_layer
from edgeport.model.load import load_model
from edgeport.model.types import Model
from edgeport.recipe import Recipe
from edgeport.runtime.session import open_session
from edgeport.runtime.torch import TorchSession
from edgeport.schema import parse_mapping
from edgeport.target import load_target
from edgeport.validate.weights import check_weights

TARGETS = {
    # target: (precision, relative error allowed). XNNPACK rounds activations to 8 bits as well.
    "linux-x86_64-ort": ("fp32", 1e-5),
    "raspberry-pi-5-executorch": ("fp32", 0.05),
    "ios18-coreml": ("fp32", 1e-5),
}


def recipe(activations: str = "float") -> Recipe:
    steps = [
        {"method": "gptq", "linear": ["int4_g32", "int8"], "embedding": "int8", "activations": [activations, "float"]},
        {"method": "qera", "rank": 4},
    ]
    value = {"name": "corrected", "summary": "x", "compress": steps, "calibration": {"samples": 16}, "gate": {}}
    return parse_mapping(Recipe, value, "test")


def inputs(model: Model, count: int) -> list[dict[str, np.ndarray]]:
    generator = np.random.default_rng(0)
    length = model.example["input_ids"].shape[1]
    size = model.module.config.vocab_size
    calls = [{name: value.numpy().copy() for name, value in model.example.items()} for _ in range(count)]
    for call in calls:
        call["input_ids"] = generator.integers(1, size, (1, length), dtype=np.int64)
    return calls


@pytest.fixture(scope="module")
def model(tiny_model: Callable[[str], Path]) -> Model:
    return load_model(str(tiny_model("bert")))


@pytest.mark.parametrize("name", TARGETS)
def test_the_file_has_the_matrices_and_computes_with_them(name: str, model: Model, tmp_path: Path):
    precision, allowed = TARGETS[name]
    target = load_target(name)
    seen = Samples(inputs(model, 16), SampleRecord("random", False, {}, "all", None, 16))
    activations = "float" if "float" in target.activation_formats("linear") else "dynamic_int8"
    compressed, records = apply_recipe(model, recipe(activations), target, calibration=seen)
    artifact = lower(compressed, target, LoweringSettings(precision, "fixed"), tmp_path)
    check = check_weights(compressed.quantized, read_weights(artifact), unused=artifact.facts.get("unused_weights", ()))
    assert check.different == ()
    corrections = [name for name in compressed.quantized if corrected_layer(name)]
    assert len(corrections) >= 2 * 12
    assert set(corrections) - set(check.unused) <= set(artifact.weights)
    session, reference = open_session(artifact), TorchSession(compressed)
    for call in inputs(model, 3):
        found, wanted = (one.run(call)["logits"] for one in (session, reference))
        assert np.linalg.norm(found - wanted) < allowed * np.linalg.norm(wanted)
    assert sum(record.bytes_before == 0 for record in records) == len(corrections)


def test_without_a_target_the_scales_fit_all_of_them(tiny_model: Callable[[str], Path], tmp_path: Path):
    found = compress(CompressRequest(str(tiny_model("bert")), recipe(), tmp_path / "folder", samples=4))
    again = load_compressed(tmp_path / "folder")
    added = [layer.name for layer in found.layers if layer.bytes_before == 0]
    assert added
    for name in added:
        scale = again.quantized[name].scale
        assert torch.equal(scale.half().float(), scale)


def test_the_same_model_comes_out_of_a_folder(tiny_model: Callable[[str], Path], tmp_path: Path):
    target = load_target("linux-x86_64-ort")
    folder = tmp_path / "folder"
    found = compress(CompressRequest(str(tiny_model("bert")), recipe(), folder, target=target, samples=4))
    added = [layer for layer in found.layers if layer.bytes_before == 0]
    assert added
    again = load_compressed(folder)
    layers = {name for name, layer in again.module.named_modules() if isinstance(layer, CorrectedLinear)}
    assert layers == {corrected_layer(layer.name) for layer in added}
    # As good as the file that a direct export writes: the same bytes.
    direct, _ = apply_recipe(load_model(str(tiny_model("bert"))), recipe(), target)
    assert direct.quantized.keys() == again.quantized.keys()
    settings = LoweringSettings("fp32", "fixed")
    files = []
    for place, one in (("direct", direct), ("again", again)):
        (tmp_path / place).mkdir()
        files.append(lower(one, target, settings, tmp_path / place).path.read_bytes())
    assert files[0] == files[1]
    for name, value in direct.module.state_dict().items():
        assert torch.equal(value, again.module.state_dict()[name])
