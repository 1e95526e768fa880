"""Five Hugging Face architectures of different families, exported to all three runtimes or refused with a reason.

The models are tiny and random: what is tested is that the graph survives and the numbers are the original's.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from edgeport.job import ExportRequest
from edgeport.pipeline import export
from edgeport.recipe import load_recipe
from edgeport.target import load_target

ARCHITECTURES = ("t5", "llama", "vit", "mobilenet", "wav2vec2")
"""An encoder-decoder, a decoder with grouped-query attention, a vision transformer, a depthwise conv net, a
speech encoder."""

TARGETS = ("linux-x86_64-ort", "android-arm64-executorch", "ios18-coreml")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_architecture(architecture: str, target: str, tiny_model: Callable[[str], Path], tmp_path: Path):
    recipe = load_recipe("int8")
    # A tiny model's file is mostly graph, and a random one's classes are a coin toss: cosine is the measure. An
    # untrained conv net spreads its activations more than int8 likes (.955 on XNNPACK): a broken one is near 0.
    loose = {"size_ratio_max": None, "top1_agreement_min": None, "kl_max": None, "cosine_min": 0.9}
    gate = recipe.gate.model_copy(update=loose)
    result = export(
        ExportRequest(
            model=str(tiny_model(architecture)),
            target=load_target(target),
            recipe=recipe.model_copy(update={"gate": gate}),
            output=tmp_path / "bundle",
            samples=4,
            quick=True,
        )
    )
    failed = [check.message for check in result.verdict.checks if not check.passed]
    assert failed == []
    assert result.evidence["weights"]["equal"] > 5
    assert result.evidence["states"]["numerics_verified"] == "yes"
