"""Real models through ExecuTorch's runtime on real data: size, weights bit for bit, numbers, latency ratio."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import torch

from edgeport.compress import apply_recipe
from edgeport.data.samples import samples
from edgeport.export.artifact import Artifact, LoweringSettings
from edgeport.export.dispatch import lower, read_weights
from edgeport.model.load import load_model
from edgeport.model.types import Model
from edgeport.recipe import load_recipe
from edgeport.runtime.executorch import open_executorch
from edgeport.target import load_target

pytestmark = [pytest.mark.slow, pytest.mark.network]

MB = 1e6
TARGET = "android-arm64-executorch"

# model, sequence, recipe, largest MB, least cosine with the original: mean and worst of 8 samples
CASES = [
    ("zoo:minilm", 128, "fp32", 91.1, 0.999999, 0.999999),
    ("zoo:minilm", 128, "int8", 23.3, 0.997, 0.995),
    ("zoo:minilm", 128, "int4", 14.2, 0.9, 0.85),
    ("zoo:efficientnet-lite0", None, "fp32", 18.7, 0.999999, 0.999999),
    ("zoo:efficientnet-lite0", None, "int8", 5.5, 0.98, 0.95),
]


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def lowered(model: Model, recipe: str, out: Path) -> tuple[Model, Artifact]:
    target = load_target(TARGET)
    compressed, _ = apply_recipe(model, load_recipe(recipe), target)
    out.mkdir()
    return compressed, lower(compressed, target, LoweringSettings("fp32", "fixed"), out)


@pytest.mark.parametrize(("name", "sequence", "recipe", "megabytes", "mean", "worst"), CASES)
def test_real_model(name, sequence, recipe, megabytes, mean, worst, tmp_path: Path):
    model = load_model(name)
    start = time.process_time()
    compressed, artifact = lowered(model, recipe, tmp_path / "out")
    seconds = time.process_time() - start
    size = artifact.path.stat().st_size / MB
    assert size < megabytes
    stored = read_weights(artifact)
    assert sorted(stored) == sorted(compressed.quantized)
    for key, logical in compressed.quantized.items():
        assert torch.equal(stored[key].codes, logical.codes), key
        assert torch.equal(stored[key].scale, logical.scale), key
    session, output, found = open_executorch(artifact), model.outputs[0].name, []
    for call in samples(model, count=8, split="parity", sequence=sequence).inputs:
        with torch.no_grad():
            result = model.module(**{key: torch.from_numpy(value) for key, value in call.items()})
        reference = result if isinstance(result, torch.Tensor) else result[output]
        found.append(cosine(session.run(call)[output], reference.numpy()))
    cosines = f"cosine mean {np.mean(found):.5f} worst {min(found):.5f}"
    print(f"\n{name} {recipe}: {size:.2f} MB, {cosines}, lowered in {seconds:.0f} CPU s")
    assert np.mean(found) > mean
    assert min(found) > worst


@pytest.mark.parametrize("name", ["zoo:minilm", "zoo:efficientnet-lite0"])
def test_int8_is_reported_against_fp32(name: str, tmp_path: Path):
    """Latency is printed, not asserted: the same artifacts, interleaved, one thread."""
    model = load_model(name)
    inputs = {key: value.numpy() for key, value in model.example.items()}
    sessions = {r: open_executorch(lowered(model, r, tmp_path / r)[1]) for r in ("fp32", "int8")}
    times: dict[str, list[float]] = {recipe: [] for recipe in sessions}
    results = {}
    for _ in range(30):
        for recipe, session in sessions.items():
            start = time.perf_counter()
            results[recipe] = session.run(inputs)
            times[recipe].append(time.perf_counter() - start)
    p50 = {recipe: float(np.median(values)) * 1e3 for recipe, values in times.items()}
    print(f"\n{name}: fp32 {p50['fp32']:.1f} ms, int8 {p50['int8']:.1f} ms, ratio {p50['int8'] / p50['fp32']:.2f}")
    output = model.outputs[0].name
    assert cosine(results["int8"][output], results["fp32"][output]) > 0.98
