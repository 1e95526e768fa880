"""SmolLM2-135M with its cache on Core ML: the saved package, run by the reference evaluator, not by Apple's kernels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from edgeport.compress import apply_recipe
from edgeport.data.samples import samples
from edgeport.export.artifact import LoweringSettings
from edgeport.export.dispatch import lower, read_weights
from edgeport.model.decoder import for_generation
from edgeport.model.load import load_model
from edgeport.quantized import digest
from edgeport.recipe import Recipe
from edgeport.runtime.session import open_session
from edgeport.runtime.torch import TorchSession
from edgeport.schema import parse_mapping
from edgeport.target import load_target

TARGET = load_target("ios18-coreml")
STEP = {"method": "rtn", "linear": ["int4_g32"], "embedding": ["int8"], "activations": ["float"]}


def divergence(reference: np.ndarray, found: np.ndarray) -> float:
    """KL of the second from the first, mean over rows, nats."""
    p, q = (torch.log_softmax(torch.from_numpy(x).double(), -1) for x in (reference, found))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.slow
def test_smollm2_in_four_bits(tmp_path: Path) -> None:
    """What is in the file is the compressed model, and scores as it does; the rounding to float16 costs little."""
    recipe = parse_mapping(Recipe, {"name": "t", "summary": "t", "compress": [STEP], "gate": {}}, "t")
    model = for_generation(apply_recipe(load_model("zoo:smollm2"), recipe, TARGET)[0])
    artifact = lower(model, TARGET, LoweringSettings("fp16", "dynamic"), tmp_path)
    size = sum(path.stat().st_size for path in artifact.path.rglob("*") if path.is_file())
    assert 88e6 < size < 91e6  # 135 million weights; the table, which is the head as well, is there once
    stored = read_weights(artifact)
    assert {name: digest(tensor) for name, tensor in stored.items()} == {
        name: digest(tensor) for name, tensor in model.quantized.items()
    }
    (text,) = samples(model, count=1, split="parity").inputs
    found, expected = open_session(artifact).run(text)["logits"][0], TorchSession(model).run(text)["logits"][0]
    assert divergence(expected, found) < 5e-4
    assert float((found.argmax(-1) == expected.argmax(-1)).mean()) > 0.9
