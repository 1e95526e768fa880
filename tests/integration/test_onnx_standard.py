"""Decoders in operators of the ONNX standard alone: every family, through a cache that grows, against none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from edgeport.errors import BadInputError, TargetRefusesError
from edgeport.export.artifact import Artifact, LoweringSettings
from edgeport.export.dispatch import cache_bytes, lower
from edgeport.export.onnx.genai import genai_config
from edgeport.model.decoder import for_generation
from edgeport.model.types import Model
from edgeport.runtime.session import open_session, open_tokens
from edgeport.runtime.torch import TorchSession
from edgeport.schema import parse_mapping
from edgeport.target import OnnxRuntimeOptions, load_target

OPTIONS = OnnxRuntimeOptions(opset=23, attention="standard")
TARGET = load_target("linux-x86_64-ort").model_copy(update={"onnxruntime": OPTIONS})
VOCABULARY = 97


@pytest.fixture(scope="module")
def make(tiny_decoder: Callable[..., Model]) -> Callable[..., Model]:
    """A family's random model with a cache of 64 tokens."""

    def build(family: str) -> Model:
        own = {"attn_logit_softcapping": 3.0} if family == "gemma2" else {}
        return for_generation(tiny_decoder(family, vocabulary=VOCABULARY, positions=128, **own), 64)

    return build


def lowered(model: Model, out: Path) -> Artifact:
    return lower(model, TARGET, LoweringSettings("fp32", "dynamic"), out)


def text(length: int) -> np.ndarray:
    return np.random.default_rng(length).integers(0, VOCABULARY, length)


def error(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


@pytest.mark.often("llama", "mistral", "gemma2", "phi", "gpt2")  # they differ in what attention gets
def test_every_family_scores_through_its_cache_what_it_scores_without(
    make: Callable[..., Model], decoder_family: str, tmp_path: Path
) -> None:
    """Texts of several windows, one token alone, and nothing but the standard's operators in the file."""
    model = make(decoder_family)
    artifact = lowered(model, tmp_path)
    session = open_session(artifact)
    for length in (60, 1):
        inputs = {"input_ids": text(length)[None]}
        assert error(session.run(inputs)["logits"], TorchSession(model).run(inputs)["logits"]) < 3e-6
    file = onnx.load(artifact.path)
    assert {(entry.domain, entry.version) for entry in file.opset_import} == {("", 23)}
    attention = [node for node in file.graph.node if node.op_type == "Attention"]
    assert len(attention) == (0 if decoder_family == "gemma2" else 2)  # with a soft cap: matrix products


def test_the_cache_is_used_up_to_its_last_place_and_forgets_what_it_is_told_to(
    make: Callable[..., Model], tmp_path: Path
) -> None:
    model = make("mistral")
    assert model.decoder is not None
    artifact = lowered(model, tmp_path)
    tokens = open_tokens(artifact)
    assert artifact.facts["cache_bytes"] == 64 * 2 * 2 * 2 * 16 * 4 == cache_bytes(model.decoder, TARGET)
    first, second = text(20), text(30)
    tokens.feed(first)
    tokens.rewind(5)
    joined = np.concatenate([first[:5], second])
    wanted = TorchSession(model).run({"input_ids": joined[None]})["logits"][0, -1]
    assert error(tokens.feed(second), wanted) < 3e-6
    assert tokens.length == 35
    tokens.rewind()
    tokens.feed(text(63))
    tokens.feed(text(1))
    assert tokens.length == tokens.context == 64
    with pytest.raises(BadInputError, match="don't fit"):
        tokens.feed(text(1))


def test_what_the_form_does_not_have_is_refused(make: Callable[..., Model], tmp_path: Path) -> None:
    with pytest.raises(TargetRefusesError, match="The standard's Attention keeps no keys and values in int8"):
        lower(make("llama"), TARGET, LoweringSettings("fp32", "dynamic", kv_cache="int8"), tmp_path)
    with pytest.raises(BadInputError, match="opset 23"):
        parse_mapping(OnnxRuntimeOptions, {"opset": 21, "attention": "standard"}, "test")


def test_the_generation_library_is_told_that_the_cache_grows(make: Callable[..., Model]) -> None:
    config = genai_config(make("llama"), "model.onnx", [2], grows=True)
    assert config is not None
    assert json.loads(config)["search"]["past_present_share_buffer"] is False
