"""Decoders with a cache through ONNX Runtime: every family, against the module without one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from edgeport.compress import apply_recipe
from edgeport.errors import BadInputError
from edgeport.export.artifact import Artifact, LoweringSettings
from edgeport.export.dispatch import read_weights
from edgeport.export.onnx.lower import lower
from edgeport.model.decoder import for_generation
from edgeport.model.types import SCORED, Model
from edgeport.quantized import digest
from edgeport.recipe import Recipe
from edgeport.runtime.decoder import DecoderSession
from edgeport.runtime.generate import generate
from edgeport.runtime.session import open_session, open_tokens
from edgeport.runtime.torch import TorchSession
from edgeport.schema import parse_mapping
from edgeport.target import load_target

TARGET = load_target("linux-x86_64-ort")
VOCABULARY = 97


@pytest.fixture(scope="module")
def make(tiny_decoder: Callable[..., Model]) -> Callable[..., Model]:
    """A family's random model without a cache."""
    return partial(tiny_decoder, vocabulary=VOCABULARY, positions=128)


def lowered(model: Model, out: Path, *, ort_format: bool = False) -> Artifact:
    out.mkdir(parents=True, exist_ok=True)
    return lower(model, TARGET, LoweringSettings("fp32", "dynamic", ort_format=ort_format), out)


def compressed(model: Model, form: str, activations: str) -> Model:
    step = {"method": "rtn", "linear": [form, "int8"], "embedding": [form, "int8"], "activations": activations}
    recipe = parse_mapping(Recipe, {"name": "test", "summary": "test", "compress": [step], "gate": {}}, "test")
    return apply_recipe(model, recipe, TARGET)[0]


def text(length: int) -> dict[str, np.ndarray]:
    return {"input_ids": np.random.default_rng(length).integers(0, VOCABULARY, (1, length))}


def error(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


@pytest.fixture(scope="module")
def llama(make: Callable[..., Model], tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Artifact]:
    model = for_generation(make("llama"), 48)
    return model, lowered(model, tmp_path_factory.mktemp("llama"))


def test_every_family_scores_through_its_cache_what_it_scores_without(
    make: Callable[..., Model], decoder_family: str, tmp_path: Path
) -> None:
    """Prompt and single tokens; texts longer than a sliding window of 8."""
    model = for_generation(make(decoder_family))
    session = open_session(lowered(model, tmp_path))
    for length in (50, 3):
        wanted = TorchSession(model).run(text(length))["logits"]
        found = session.run(text(length))["logits"]
        assert found.shape == wanted.shape == (1, min(length, SCORED), VOCABULARY)
        assert error(found, wanted) < 2e-6


@pytest.mark.parametrize(
    ("family", "form", "activations", "bound"),
    [
        ("llama", "uint4_g32", "float", 2e-5),
        ("qwen2", "int4_g16", "dynamic_int8", 0.05),
        ("gpt2", "int8", "dynamic_int8", 0.05),
        ("phi", "int4_g16", "float", 2e-5),
    ],
)
def test_compressed_weights_are_in_the_file_and_the_mobile_format_answers_the_same(
    make: Callable[..., Model], family: str, form: str, activations: str, bound: float, tmp_path: Path
) -> None:
    """The bound is that of activations in 8 bits."""
    model = compressed(for_generation(make(family)), form, activations)
    artifact = lowered(model, tmp_path, ort_format=True)
    stored = read_weights(artifact)
    assert {name: digest(tensor) for name, tensor in stored.items()} == {
        name: digest(tensor) for name, tensor in model.quantized.items()
    }
    assert len(stored) == len(model.quantized) > 8
    found = open_session(artifact).run(text(40))["logits"]
    assert error(found, TorchSession(model).run(text(40))["logits"]) < bound
    other = open_session(replace(artifact, entry="model.ort")).run(text(40))["logits"]
    assert error(other, found) < 1e-5


def test_projections_to_queries_keys_and_values_are_one_product(make: Callable[..., Model], tmp_path: Path) -> None:
    import onnx

    artifact = lowered(compressed(for_generation(make("qwen2")), "int4_g16", "dynamic_int8"), tmp_path)
    graph = onnx.load(artifact.path).graph
    attention = [node for node in graph.node if node.op_type == "GroupQueryAttention"]
    assert [list(node.input[1:3]) for node in attention] == [["", ""]] * 2
    # Four products a layer (joined, output, two up, down) and the head.
    assert sum(node.op_type == "MatMulNBits" for node in graph.node) == 2 * 5 + 1


def test_the_cache_is_used_up_to_its_last_place_and_not_beyond(llama: tuple[Model, Artifact]) -> None:
    model, artifact = llama
    tokens = open_tokens(artifact)
    ids = text(48)["input_ids"][0]
    tokens.feed(ids[:47])
    last = tokens.feed(ids[47:])
    assert tokens.length == tokens.context == 48
    wanted = TorchSession(model).run({"input_ids": ids[None]})["logits"][0, -1]
    assert error(last, wanted) < 2e-6
    with pytest.raises(BadInputError, match="don't fit: the cache holds 48 and has 48"):
        tokens.feed(ids[:1])
    with pytest.raises(BadInputError, match="49 tokens don't fit"):
        open_tokens(artifact).feed(np.zeros(49, np.int64))


def test_a_rewound_cache_forgets(llama: tuple[Model, Artifact]) -> None:
    _, artifact = llama
    tokens = open_tokens(artifact)
    first, second = text(20)["input_ids"][0], text(30)["input_ids"][0]
    tokens.feed(first)
    tokens.rewind(5)
    again = tokens.feed(second)
    fresh = open_tokens(artifact).feed(np.concatenate([first[:5], second]))
    assert error(again, fresh) < 2e-6


def test_scores_stay_when_more_tokens_are_fed(llama: tuple[Model, Artifact]) -> None:
    """The runtime writes all calls' scores to one place."""
    model, artifact = llama
    tokens = open_tokens(artifact)
    ids = text(12)["input_ids"]
    first, second = tokens.feed(ids[0, :8]), tokens.feed(ids[0, 8:])
    wanted = TorchSession(model).run({"input_ids": ids})["logits"][0]
    assert error(first, wanted[7]) < 2e-6
    assert error(second, wanted[11]) < 2e-6


def test_tokens_outside_the_vocabulary_and_empty_texts_are_refused(llama: tuple[Model, Artifact]) -> None:
    tokens = open_tokens(llama[1])
    with pytest.raises(BadInputError, match="not in the vocabulary"):
        tokens.feed(np.array([VOCABULARY], np.int64))
    with pytest.raises(BadInputError, match="not empty"):
        tokens.feed(np.array([], np.int64))
    assert tokens.length == 0


def test_greedy_generation_is_that_of_transformers(llama: tuple[Model, Artifact]) -> None:
    model, artifact = llama
    prompt = text(9)["input_ids"]
    with torch.no_grad():
        wanted = model.module.generate(  # type: ignore[operator]
            torch.tensor(prompt), max_new_tokens=30, do_sample=False, use_cache=True, eos_token_id=None, pad_token_id=0
        )
    record, new = generate(open_tokens(artifact), prompt[0], most=30)
    assert list(new) == wanted[0, 9:].tolist() == record.ids
    assert record.finish == "length"


def test_generation_ends_when_the_cache_is_full(llama: tuple[Model, Artifact]) -> None:
    tokens = open_tokens(llama[1])
    record, new = generate(tokens, text(40)["input_ids"][0], most=100)
    # The last token is known when the cache is full, and can't be fed any more.
    assert len(list(new)) == 48 - 40 + 1
    assert record.finish == "context"


def test_what_is_timed_is_one_token_after_the_others(llama: tuple[Model, Artifact]) -> None:
    session = open_session(llama[1])
    assert isinstance(session, DecoderSession)
    decode = session.step(text(20))
    for _ in range(3):
        decode()
        assert session.tokens.length == 20


def test_a_model_without_a_cache_can_not_generate(make: Callable[..., Model], tmp_path: Path) -> None:
    artifact = lowered(make("llama"), tmp_path)
    assert artifact.context is None
    with pytest.raises(BadInputError, match="exported without a cache"):
        open_tokens(artifact)


@pytest.mark.parametrize("context", [1, 129])
def test_a_context_that_the_model_can_not_count_is_refused(make: Callable[..., Model], context: int) -> None:
    with pytest.raises(BadInputError, match="can't hold") as caught:
        for_generation(make("llama"), context)
    assert "2 to 128" in (caught.value.allowed or "")


def test_an_encoder_gets_no_cache(tiny_model: Callable[[str], Path]) -> None:
    from edgeport.model.load import load_model

    with pytest.raises(BadInputError, match="no decoder language model"):
        for_generation(load_model(str(tiny_model("bert"))))


def test_positions_that_change_with_the_length_are_refused(make: Callable[..., Model]) -> None:
    """Dynamic NTK turns all positions otherwise when a text outgrows the trained length: a cache can't follow."""
    scaling = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    model = make("llama", rope_parameters=scaling)  # trained for 128, so 512 is long
    import tempfile

    long = for_generation(model, 128)
    assert long.decoder is not None
    with tempfile.TemporaryDirectory() as folder, pytest.raises(BadInputError, match="rotary positions change"):
        lowered(replace(long, decoder=replace(long.decoder, context=512)), Path(folder))
