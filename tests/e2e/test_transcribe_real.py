"""Whisper tiny.en through its cache on real speech: the tokens are those that PyTorch writes without one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgeport.compress import apply_recipe
from edgeport.data.audio import read_recording, whisper_features
from edgeport.data.cards import load_card
from edgeport.export.artifact import Artifact, LoweringSettings
from edgeport.export.dispatch import lower, read_weights
from edgeport.model.decoder import for_generation
from edgeport.model.load import load_model
from edgeport.model.types import Model
from edgeport.quantized import digest
from edgeport.recipe import load_recipe
from edgeport.runtime.generate import generate
from edgeport.runtime.session import open_encoded
from edgeport.target import load_target

pytestmark = [pytest.mark.slow, pytest.mark.network]

START = [50257, 50362]  # <|startoftranscript|>, <|notimestamps|>
END = 50256


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model("zoo:whisper-tiny.en")


@pytest.fixture(scope="module")
def features() -> np.ndarray:
    """The half minute of the calibration card."""
    files = {path.suffix: path for path in load_card("conversation").fetch()}
    values: np.ndarray = whisper_features(read_recording(files[".wav"]), bins=80, frames=3000)[None]
    return values


@pytest.fixture(scope="module")
def written(model: Model, features: np.ndarray) -> list[int]:
    """What PyTorch writes, without a cache."""
    ids = list(START)
    with torch.no_grad():
        module: Any = model.module
        states = module.get_encoder()(torch.from_numpy(features))
        while ids[-1] != END and len(ids) < 200:
            scores = module(encoder_outputs=states, decoder_input_ids=torch.tensor([ids])).logits
            ids.append(int(scores[0, -1].argmax()))
    assert len(ids) > 40
    return [token for token in ids[2:] if token != END]


def lowered(model: Model, target: str, recipe: str, out: Path) -> tuple[Model, Artifact]:
    small, _ = apply_recipe(model, load_recipe(recipe), load_target(target))
    return small, lower(small, load_target(target), LoweringSettings("fp32", "dynamic"), out)


def test_on_onnx_runtime(model: Model, features: np.ndarray, written: list[int], tmp_path: Path) -> None:
    _, artifact = lowered(for_generation(model), "linux-x86_64-ort", "fp32", tmp_path)
    tokens = open_encoded(artifact)
    tokens.encode(features)
    record, new = generate(tokens, np.array(START), most=200, stop=frozenset({END}))
    assert list(new) == written
    assert record.finish == "stop"


@pytest.mark.parametrize("target", ["linux-x86_64-ort", "android-arm64-executorch"])
def test_in_8_bits(target: str, model: Model, features: np.ndarray, written: list[int], tmp_path: Path) -> None:
    """A quarter of the size, the weights bit for bit, and nine of ten tokens in their places when forced."""
    cached, artifact = lowered(for_generation(model), target, "int8", tmp_path)
    assert sum(path.stat().st_size for path in artifact.paths) < 0.3 * 37_760_256 * 4
    stored = read_weights(artifact)
    assert {name: digest(tensor) for name, tensor in stored.items()} == {
        name: digest(tensor) for name, tensor in cached.quantized.items()
    }
    tokens = open_encoded(artifact)
    tokens.encode(features)
    forced, agree = [*START, *written], 0
    scores = tokens.feed(np.array(forced[:2]))
    for token in written:
        agree += int(scores.argmax()) == token
        scores = tokens.feed(np.array([token]))
    assert agree >= 0.9 * len(written)
