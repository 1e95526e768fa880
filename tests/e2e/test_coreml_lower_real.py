"""MiniLM and EfficientNet-Lite0 as Core ML packages: size, weights bit for bit, numbers through the evaluator."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from edgeport.compress import apply_recipe
from edgeport.export.artifact import LoweringSettings
from edgeport.export.coreml.lower import lower
from edgeport.export.coreml.weights import read_weights
from edgeport.model.inputs import select_outputs
from edgeport.model.load import load_model
from edgeport.recipe import load_recipe
from edgeport.runtime.coreml.session import CoreMLReferenceSession
from edgeport.storage import tree_size
from edgeport.target import load_target

MB = 1e6

CASES = [
    # model, target, recipe, shapes, largest size, least cosine with the compressed and with the original model
    ("zoo:minilm", "ios18-coreml", "fp16", "dynamic", 45.7, 0.99999, 0.99999),
    ("zoo:minilm", "ios17-coreml", "int8", "fixed", 23.1, 0.99999, 0.998),
    ("zoo:minilm", "ios18-coreml", "int4", "fixed", 13.0, 0.99999, 0.92),
    # Fifty float16 layers in a row: errors of some 2**-8 in a logit, squared in the cosine.
    ("zoo:efficientnet-lite0", "ios18-coreml", "int8", "fixed", 4.9, 0.99998, 0.995),
]


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "target", "recipe", "shapes", "megabytes", "faithful", "original"), CASES)
def test_real_model(name, target, recipe, shapes, megabytes, faithful, original, tmp_path: Path):
    model = load_model(name)
    compressed, _ = apply_recipe(model, load_recipe(recipe), load_target(target))
    artifact = lower(compressed, load_target(target), LoweringSettings("fp16", shapes), tmp_path)
    assert tree_size(tmp_path) < megabytes * MB
    stored = read_weights(artifact)
    assert sorted(stored) == sorted(compressed.quantized)
    for key, logical in compressed.quantized.items():
        assert torch.equal(stored[key].codes, logical.codes), key
        assert torch.equal(stored[key].scale, logical.scale), key
    measured = CoreMLReferenceSession(artifact).run({key: value.numpy() for key, value in model.example.items()})
    names = tuple(spec.name for spec in model.outputs)
    with torch.no_grad():
        same = select_outputs(compressed.module(**model.example), names)
        before = select_outputs(model.module(**model.example), names)
    for key in names:
        assert cosine(measured[key], same[key].numpy()) > faithful, key
        assert cosine(measured[key], before[key].numpy()) > original, key
