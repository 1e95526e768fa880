"""Tiny random decoders with a cache on Core ML, against the same models without one in torch.

What is run is the saved package, by the reference evaluator: the program's arithmetic, not Apple's kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgeport.compress import apply_recipe
from edgeport.errors import BadInputError, TargetRefusesError
from edgeport.export.artifact import Artifact, LoweringSettings
from edgeport.export.coreml.decoder import KEYS, VALUES, export_decoder
from edgeport.export.dispatch import cache_bytes, lower, read_weights
from edgeport.mlpackage.constants import constants
from edgeport.mlpackage.package import load_package
from edgeport.mlpackage.program import parse_function
from edgeport.model.decoder import for_generation
from edgeport.model.types import Model
from edgeport.quantized import digest
from edgeport.recipe import Recipe
from edgeport.runtime.coreml.decoder import CoreMLReferenceTokens
from edgeport.runtime.generate import generate
from edgeport.runtime.session import open_session, open_tokens
from edgeport.runtime.torch import TorchSession
from edgeport.schema import parse_mapping
from edgeport.target import load_target
from edgeport.validate.generation import measure_generation

TARGET = "ios18-coreml"
VOCABULARY, CONTEXT, WINDOW = 160, 48, 8
HALF = 5e-3
"""Relative L2 difference that float16 arithmetic and a float16 cache make in two layers."""
HALF_CACHE = 2e-3
"""That the float16 cache makes alone."""
SCALE = {"query_pre_attn_scalar": 24}
OWN: dict[str, dict[str, Any]] = {"gemma2": SCALE, "gemma3_text": SCALE}
"""A scale of the scores that is not the square root of a head's width."""
ALTERNATING = ("gemma2", "gemma3_text")


@pytest.fixture(scope="module")
def make(tiny_decoder: Callable[..., Model]) -> Callable[..., Model]:
    """A family's random model with a cache."""

    def build(family: str, layers: int = 2) -> Model:
        # Rows of 80 can't be cut into blocks of 32.
        sizes = {"vocabulary": VOCABULARY, "positions": 64, "layers": layers, "intermediate_size": 80}
        return for_generation(tiny_decoder(family, **sizes, **OWN.get(family, {})), CONTEXT)

    return build


def compressed(model: Model) -> Model:
    """Blocks of 4 bits, palettes where a row can't be cut into blocks of 32, 8 bits for the table."""
    step = {"method": "rtn", "linear": ["int4_g32", "lut4_g16"], "embedding": ["int8"], "activations": ["float"]}
    recipe = parse_mapping(Recipe, {"name": "t", "summary": "t", "compress": [step], "gate": {}}, "t")
    return apply_recipe(model, recipe, load_target(TARGET))[0]


def lowered(model: Model, out: Path, precision: Any) -> Artifact:
    out.mkdir()
    return lower(model, load_target(TARGET), LoweringSettings(precision, "dynamic"), out)


def text(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCABULARY, length)


def uncached(model: Model, ids: np.ndarray) -> np.ndarray:
    """The scores after every token of a text, (S, V), by the model as transformers runs it."""
    with torch.no_grad():
        scores: np.ndarray = model.module(input_ids=torch.from_numpy(ids)[None], use_cache=False).logits[0].numpy()
    return scores


def relative(got: np.ndarray, expected: np.ndarray) -> float:
    assert got.shape == expected.shape
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


def largest_error(tokens: CoreMLReferenceTokens, model: Model) -> float:
    """Over a prompt, pieces and single tokens of one text."""
    ids = text(40)
    expected = uncached(model, ids)
    tokens.rewind()
    errors = []
    for length in (19, 1, 2, 13, 1, 4):
        scores = tokens.feed(ids[tokens.length : tokens.length + length])
        errors.append(relative(scores, expected[tokens.length - 1]))
    return max(errors)


def test_traced_program_is_the_model(make: Callable[..., Model], decoder_family: str) -> None:
    """The very graph that is converted, run by torch: a prompt, pieces, tokens, in buffers that it changes itself."""
    model = make(decoder_family, layers=2 if decoder_family in ALTERNATING else 1)
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    run = export_decoder(model, half=True)[0].module(check_guards=False)
    ids = text(40)
    expected = uncached(model, ids)
    at = 0
    for length in (19, 1, 2, 13, 1, 4):
        row = torch.from_numpy(ids[at : at + length].astype(np.int32))[None]
        at += length
        with torch.no_grad():
            scores = run(row, torch.zeros(1, 1, 1, at))
        assert scores.shape == (1, 1, VOCABULARY)
        assert relative(scores[0, -1].numpy(), expected[at - 1]) < 2e-5, (length, at)
    after = model.module.state_dict()
    assert set(after) == set(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.often
def test_package_is_the_model(make: Callable[..., Model], decoder_family: str, precision: str, tmp_path: Path) -> None:
    model = make(decoder_family)
    artifact = lowered(model, tmp_path / "out", precision)
    assert largest_error(CoreMLReferenceTokens(artifact), model) < (HALF_CACHE if precision == "fp32" else HALF)
    if precision == "fp32":
        assert largest_error(CoreMLReferenceTokens(artifact, "fp32"), model) < 2e-5


@pytest.fixture(scope="module")
def gemma(make: Callable[..., Model], tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Artifact]:
    """Windows, a soft cap, a scale of its own, in float32."""
    model = make("gemma2")
    return model, lowered(model, tmp_path_factory.mktemp("gemma") / "out", "fp32")


@pytest.fixture(scope="module")
def llama(make: Callable[..., Model], tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Artifact]:
    """Compressed, in float16."""
    model = compressed(make("llama"))
    return model, lowered(model, tmp_path_factory.mktemp("llama") / "out", "fp16")


@pytest.fixture
def tokens(llama: tuple[Model, Artifact]) -> CoreMLReferenceTokens:
    return CoreMLReferenceTokens(llama[1])


def test_float32_is_the_model_but_for_its_float16_cache(gemma: tuple[Model, Artifact]) -> None:
    model, artifact = gemma
    assert largest_error(CoreMLReferenceTokens(artifact, "fp32"), model) < 2e-5
    assert 1e-6 < largest_error(CoreMLReferenceTokens(artifact), model) < HALF_CACHE


def test_float16_is_the_model_within_its_rounding(llama: tuple[Model, Artifact], tokens: CoreMLReferenceTokens) -> None:
    model, artifact = llama
    assert largest_error(tokens, model) < HALF
    assert artifact.facts["safe_norms"] == 5


def test_tokens_are_all_that_varies(llama: tuple[Model, Artifact]) -> None:
    """Attention: two heads of 16, the queries of those that share a key under each other."""
    operations = parse_function(load_package(llama[1].path)).body.operations
    types = [item.outputs[0].type for item in operations if item.type == "scaled_dot_product_attention"]
    assert [None if kind is None else kind.shape for kind in types] == [(1, 2, None, 16)] * 2
    varying = [
        sum(size is None for size in output.type.shape)
        for item in operations
        for output in item.outputs
        if output.type is not None and output.type.shape is not None
    ]
    assert max(varying) == 2  # the mask: tokens of a call by tokens in all


def test_compressed_weights_are_in_the_file_bit_for_bit_and_once(llama: tuple[Model, Artifact]) -> None:
    model, artifact = llama
    stored = read_weights(artifact)
    assert {name: digest(tensor) for name, tensor in stored.items()} == {
        name: digest(tensor) for name, tensor in model.quantized.items()
    }
    bits = sorted({(tensor.bits, tensor.palette is None) for tensor in stored.values()})
    assert bits == [(4, False), (4, True), (8, True)]
    found = constants(parse_function(load_package(artifact.path)).body).values()
    tables = [item for item in found if item.type is not None and item.type.shape == (VOCABULARY, 64)]
    assert [item.operator for item in tables] == ["constexpr_blockwise_shift_scale"]  # head and embedding read it


def test_states_are_written_in_place_layer_by_layer(llama: tuple[Model, Artifact]) -> None:
    """Each write is a slice of the state, and what the evaluator holds stays where it is."""
    _, artifact = llama
    package = load_package(artifact.path)
    kinds = [operation.type for operation in parse_function(package).body.operations]
    assert kinds.count("slice_update") == kinds.count("write_state") == 4
    assert all(kinds[at + 1] == "write_state" for at, kind in enumerate(kinds) if kind == "slice_update")
    states = {item.name: tuple(item.type.stateType.arrayType.shape) for item in package.spec.description.state}
    assert states == {KEYS: (2, 1, 2, CONTEXT, 16), VALUES: (2, 1, 2, CONTEXT, 16)}
    assert artifact.facts["cache_bytes"] == 2 * 2 * 2 * CONTEXT * 16 * 2
    tokens = CoreMLReferenceTokens(artifact)
    places = {name: state.data_ptr() for name, state in tokens._state.items()}
    tokens.feed(text(5))
    tokens.feed(text(1))
    assert {name: state.data_ptr() for name, state in tokens._state.items()} == places
    rows = tokens._state[KEYS].abs().amax((0, 1, 2, 4))
    assert bool((rows[:6] > 0).all())
    assert bool((rows[6:] == 0).all())


def test_a_full_cache_and_one_past_it(llama: tuple[Model, Artifact], tokens: CoreMLReferenceTokens) -> None:
    model, artifact = llama
    ids = text(CONTEXT)
    tokens.feed(ids[: CONTEXT - 1])
    assert relative(tokens.feed(ids[CONTEXT - 1 :]), uncached(model, ids)[-1]) < HALF
    with pytest.raises(BadInputError, match="the cache holds 48 and has 48"):
        tokens.feed(ids[:1])
    assert tokens.length == CONTEXT
    with pytest.raises(BadInputError, match="49 tokens don't fit"):
        open_tokens(artifact).feed(text(CONTEXT + 1))
    with pytest.raises(BadInputError, match="not in the vocabulary"):
        open_tokens(artifact).feed(np.array([VOCABULARY]))


def test_rewound_is_as_if_never_fed(tokens: CoreMLReferenceTokens) -> None:
    ids, other = text(20), text(20, seed=1)
    tokens.feed(ids[:12])
    once = tokens.feed(ids[12:])
    tokens.rewind(12)
    tokens.feed(other)
    tokens.rewind(12)
    assert np.array_equal(tokens.feed(ids[12:]), once)


def test_generation_stops_where_it_should(llama: tuple[Model, Artifact]) -> None:
    _, artifact = llama
    prompt = text(9)
    record, new = generate(open_tokens(artifact), prompt, most=12)
    plain = list(new)
    assert record.finish == "length"
    assert len(plain) == 12
    stop = next(token for token in plain if plain.index(token) > 0)
    record, new = generate(open_tokens(artifact), prompt, most=12, stop=frozenset({stop}))
    assert list(new) == plain[: plain.index(stop)]
    assert record.finish == "stop"
    record, new = generate(open_tokens(artifact), text(45), most=12)
    assert len(list(new)) == CONTEXT - 45 + 1
    assert record.finish == "context"


def test_what_is_measured_goes_through_the_cache(llama: tuple[Model, Artifact]) -> None:
    model, artifact = llama
    assert model.decoder is not None
    session = open_session(artifact)
    assert (session.name, session.vendor_kernels) == ("coreml-reference", False)
    inputs = {"input_ids": text(40)[None]}
    assert relative(session.run(inputs)["logits"], TorchSession(model).run(inputs)["logits"]) < HALF
    found = measure_generation(artifact, [inputs], quick=True)
    assert found.cache_bytes == artifact.facts["cache_bytes"] == cache_bytes(model.decoder, load_target(TARGET))
    assert found.long_cosine > 0.9999
    assert found.rates == ()  # a reference evaluator's speed is no device's


@pytest.mark.parametrize(
    ("target", "settings", "match"),
    [
        ("ios17-coreml", {}, "from iOS 18 on"),
        (TARGET, {"enumerated": (1, 16)}, "can't enumerate"),
    ],
)
def test_what_can_not_keep_a_cache_is_refused(
    make: Callable[..., Model], target: str, settings: dict[str, Any], match: str, tmp_path: Path
) -> None:
    with pytest.raises(TargetRefusesError, match=match) as caught:
        lower(make("llama"), load_target(target), LoweringSettings("fp16", "dynamic", **settings), tmp_path)
    assert "--task text-generation" in (caught.value.next_step or "")
    assert list(tmp_path.iterdir()) == []


def test_layers_with_caches_of_different_shapes_are_refused(make: Callable[..., Model]) -> None:
    model = make("llama")
    assert model.decoder is not None
    first, second = model.decoder.layers
    odd = replace(model, decoder=replace(model.decoder, layers=(first, replace(second, kv_heads=4))))
    with pytest.raises(TargetRefusesError, match="caches of different shapes"):
        export_decoder(odd, half=False)


def test_ios_17_scores_whole_texts_and_refuses_a_context(
    tiny_model: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from edgeport.cli.main import main
    from edgeport.errors import EXIT_BAD_INPUT

    arguments = ["export", str(tiny_model("llama")), "-r", "fp16", "-o", str(tmp_path / "out"), "--dry-run", "--json"]
    assert main([*arguments, "-t", "ios17-coreml"]) == 0
    assert main([*arguments, "-t", "ios17-coreml", "--context", "32"]) == EXIT_BAD_INPUT
    assert "'ios17-coreml' keeps none" in capsys.readouterr().out
    assert main([*arguments, "-t", TARGET, "--context", "32"]) == 0
