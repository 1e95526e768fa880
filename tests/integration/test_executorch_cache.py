"""ExecuTorch with keys and values in int8: a layer that sees everything, and one that keeps its window in a ring."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from edgeport.export.artifact import Artifact, LoweringSettings
from edgeport.export.dispatch import cache_bytes, lower
from edgeport.export.executorch.cache import buffers
from edgeport.model.build import build_huggingface
from edgeport.model.decoder import Call, StepCache, attending, causal_attention, for_generation
from edgeport.model.types import Model
from edgeport.runtime.decoder import Tokens
from edgeport.runtime.session import open_tokens
from edgeport.target import load_target

TARGET = load_target("raspberry-pi-5-executorch")
VOCABULARY, CONTEXT, WINDOW, PLACES = 97, 192, 8, 8 + 128


@pytest.fixture(scope="module")
def model() -> Model:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=256,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"],
        initializer_range=0.2,
    )
    made = build_huggingface(
        Gemma3ForCausalLM(config),
        name="gemma3",
        reference="gemma3",
        kind="factory",
        task="text-generation",
        files={},
        assets={},
        licence=None,
        note=None,
    )
    found = for_generation(made, CONTEXT)
    assert found.decoder is not None
    assert [layer.window for layer in found.decoder.layers] == [WINDOW, None]
    return replace(found, decoder=replace(found.decoder, cache="int8"))


@pytest.fixture(scope="module")
def artifact(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    out = tmp_path_factory.mktemp("int8")
    return lower(model, TARGET, LoweringSettings("fp32", "dynamic", kv_cache="int8"), out)


def rounded(x: torch.Tensor) -> torch.Tensor:
    """Asymmetric int8 with one scale a vector: low to -128, high to 127, zero itself always exact."""
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    step = ((high - low) / 255).clamp(min=torch.finfo(torch.float32).eps)
    zero = (-128 - low / step).round().clamp(-128, 127)
    return ((x / step).round().add(zero).clamp(-128, 127) - zero) * step


def scores(model: Model, ids: np.ndarray, *, integers: bool) -> np.ndarray:
    """The torch model on the whole text, without a cache; queries, keys and values rounded or not. (S, V)"""

    def attend(call: Call) -> torch.Tensor:
        if not integers:
            return causal_attention(call)
        query, key, value = (rounded(x) for x in (call.query, call.key, call.value))
        return causal_attention(replace(call, query=query, key=key, value=value))

    row = torch.from_numpy(ids)[None]
    with torch.no_grad(), attending(model.module, attend):
        positions = torch.arange(row.shape[1])[None]
        result = model.module(input_ids=row, position_ids=positions, past_key_values=StepCache(), use_cache=True)
    answer: np.ndarray = result.logits[0].numpy()
    return answer


def text(length: int) -> np.ndarray:
    return np.random.default_rng(3).integers(0, VOCABULARY, length)


def error(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def one_by_one(tokens: Tokens, ids: np.ndarray, first: int) -> np.ndarray:
    tokens.rewind()
    return np.stack([tokens.feed(ids[:first]), *(tokens.feed(ids[at : at + 1]) for at in range(first, len(ids)))])


def test_scores_are_those_of_rounded_keys_and_values_all_the_way_round_the_ring(
    model: Model, artifact: Artifact
) -> None:
    """180 tokens in a ring of 136: in pieces of 128 and 12, then one by one past the place where it began."""
    ids = text(180)
    found = one_by_one(open_tokens(artifact), ids, 140)
    assert error(found, scores(model, ids, integers=True)[139:]) < 1e-4
    assert 0 < error(found, scores(model, ids, integers=False)[139:]) < 0.1


def test_memory_is_that_of_codes_scales_and_zero_points(model: Model, artifact: Artifact) -> None:
    wanted = 2 * (PLACES + CONTEXT) * (16 + 4 + 1)
    assert artifact.facts["cache_bytes"] == wanted
    assert model.decoder is not None
    assert cache_bytes(model.decoder, TARGET) == wanted
    assert artifact.facts["planned_memory_bytes"] > wanted


def test_tokens_that_the_ring_wrote_over_come_back(artifact: Artifact) -> None:
    """Few tokens taken back lie in the ring still; after many the text is read again."""
    ids, other = text(190), np.array([5, 6, 7])
    tokens, fresh = open_tokens(artifact), open_tokens(artifact)
    for back in (1, 100, 128, 129, 170):
        tokens.rewind()
        tokens.feed(ids)
        tokens.rewind(190 - back)
        fresh.rewind()
        wanted = fresh.feed(np.concatenate([ids[: 190 - back], other])) if back > 1 else None
        if wanted is None:
            again = tokens.feed(ids[189:])
            fresh.feed(ids[:189])
            assert error(again, fresh.feed(ids[189:])) < 1e-5
        else:
            assert error(tokens.feed(other), wanted) < 1e-5


def test_a_context_hardly_longer_than_a_window_is_seen_through_a_copy(model: Model) -> None:
    """No ring is worth it: the window's tokens are cut out of the whole context. The traced graph, run by torch."""
    from edgeport.export.executorch.decoder import export_decoder
    from edgeport.export.executorch.program import exporter_patches

    assert model.decoder is not None
    short = replace(model, decoder=replace(model.decoder, context=100, cache="float"))
    assert short.decoder is not None
    assert {buffer.shape[1] for buffer in buffers(short.decoder)} == {100}
    with exporter_patches():
        run = export_decoder(short).module(check_guards=False)
    ids = text(60)
    wanted = scores(model, ids, integers=False)
    at = 0
    for length in (30, 1, 1, 20, 8):
        with torch.no_grad():
            found = run(torch.from_numpy(ids[at : at + length])[None], torch.tensor([at]))
        at += length
        assert error(found[0].numpy(), wanted[at - 1]) < 2e-5
