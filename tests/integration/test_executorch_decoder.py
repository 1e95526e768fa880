"""Tiny random decoders with a cache on ExecuTorch, against the same models without one in torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from edgeport.compress import apply_recipe
from edgeport.errors import BadInputError
from edgeport.export.artifact import Artifact, LoweringSettings
from edgeport.export.dispatch import lower, read_weights
from edgeport.model.decoder import for_generation
from edgeport.model.types import Model
from edgeport.recipe import Recipe
from edgeport.runtime.decoder import Tokens
from edgeport.runtime.executorch_decoder import ExecuTorchTokens
from edgeport.runtime.session import open_session
from edgeport.runtime.torch import TorchSession
from edgeport.schema import parse_mapping
from edgeport.target import load_target

pytest.importorskip("executorch")

TARGET = "android-arm64-executorch"
VOCABULARY = 320


@pytest.fixture(scope="module")
def make(tiny_decoder: Callable[..., Model]) -> Callable[..., Model]:
    """A family's random model with a cache of 160 tokens."""

    def build(family: str, layers: int = 2) -> Model:
        sizes = {"vocabulary": VOCABULARY, "positions": 192, "layers": layers, "initializer_range": 0.1}
        return for_generation(tiny_decoder(family, **sizes), 160)

    return build


def compressed(model: Model, form: str) -> Model:
    step = {"method": "rtn", "linear": [form], "embedding": [form], "activations": ["dynamic_int8"]}
    recipe = parse_mapping(Recipe, {"name": "t", "summary": "t", "compress": [step], "gate": {}}, "t")
    return apply_recipe(model, recipe, load_target(TARGET))[0]


def lowered(model: Model, out: Path) -> Artifact:
    out.mkdir()
    return lower(model, load_target(TARGET), LoweringSettings("fp32", "dynamic"), out)


def text(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCABULARY, length)


def uncached(model: Model, ids: np.ndarray) -> np.ndarray:
    """The scores after every token of a text, (S, V), by the model as transformers runs it."""
    with torch.no_grad():
        scores: np.ndarray = model.module(input_ids=torch.from_numpy(ids)[None], use_cache=False).logits[0].numpy()
    return scores


@contextmanager
def rounded_activations(model: Model) -> Iterator[None]:
    """The inputs of every Linear rounded to int8, a scale a row, as XNNPACK's qdint8 has it."""

    def fake(x: torch.Tensor) -> torch.Tensor:
        low, high = x.amin(-1, keepdim=True).clamp_max(0), x.amax(-1, keepdim=True).clamp_min(0)
        scale = ((high - low) / 255).clamp_min(1e-12)
        zero = torch.clamp(torch.round(-128 - low / scale), -128, 127)
        return (torch.clamp(torch.round(x / scale) + zero, -128, 127) - zero) * scale

    linears = [layer for layer in model.module.modules() if isinstance(layer, nn.Linear)]
    hooks = [layer.register_forward_pre_hook(lambda _, args: (fake(args[0]),)) for layer in linears]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def relative(got: np.ndarray, expected: np.ndarray) -> float:
    assert got.shape == expected.shape
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


def test_traced_program_is_the_model(make: Callable[..., Model], decoder_family: str) -> None:
    """The very graph that is lowered, run by torch with ExecuTorch's attention kernels: a prompt, pieces, tokens."""
    from edgeport.export.executorch.decoder import export_decoder
    from edgeport.export.executorch.program import exporter_patches

    model = make(decoder_family, layers=2 if decoder_family.startswith("gemma") else 1)
    with exporter_patches():
        run = export_decoder(model).module(check_guards=False)
    ids = text(40)
    expected = uncached(model, ids)
    at = 0
    for length in (19, 1, 2, 13, 1, 4):
        with torch.no_grad():
            scores = run(torch.from_numpy(ids[at : at + length])[None], torch.tensor([at]))
        at += length
        assert relative(scores[0].numpy(), expected[at - 1]) < 2e-5, (length, at)


@pytest.mark.often("mistral", "gemma2")
def test_program_is_the_model(make: Callable[..., Model], decoder_family: str, tmp_path: Path) -> None:
    """The file in its runtime: windows by a mask (mistral), soft caps by products (gemma2)."""
    model = make(decoder_family, layers=1 if decoder_family in ("mistral", "gemma2") else 2)
    ids = text(60)
    got = open_session(lowered(model, tmp_path / "out")).run({"input_ids": ids[None]})["logits"]
    assert relative(got, TorchSession(model).run({"input_ids": ids[None]})["logits"]) < 2e-5


@pytest.fixture(scope="module")
def int4(make: Callable[..., Model]) -> Model:
    return compressed(make("llama"), "int4_g32")


@pytest.fixture(scope="module")
def artifact(int4: Model, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return lowered(int4, tmp_path_factory.mktemp("decoder") / "out")


@pytest.fixture
def tokens(artifact: Artifact) -> Tokens:
    return ExecuTorchTokens(artifact)


def test_weights_are_in_the_file_bit_for_bit(artifact: Artifact, int4: Model) -> None:
    stored = read_weights(artifact)
    assert set(stored) == set(int4.quantized)
    assert len(stored) == 15
    for name, tensor in int4.quantized.items():
        assert torch.equal(stored[name].codes, tensor.codes), name
        assert torch.equal(stored[name].scale, tensor.scale), name
    # The table that embedding and head share lies in the file once.
    (tied,) = (place for place in artifact.weights.values() if " + " in place)
    assert {part.split("/")[0] for part in tied.split(" + ")} == {"kernel", "xnnpack"}


def test_four_bits_compute_as_in_torch(tokens: Tokens, int4: Model) -> None:
    ids = text(24)
    with rounded_activations(int4):
        expected = uncached(int4, ids)
    assert relative(tokens.feed(ids[:20]), expected[19]) < 0.02
    for at in range(20, 24):
        assert relative(tokens.feed(ids[at : at + 1]), expected[at]) < 0.02


def test_a_prompt_longer_than_a_call_is_fed_in_pieces(tokens: Tokens, artifact: Artifact, int4: Model) -> None:
    assert artifact.facts["most_tokens_a_call"] == 128
    ids = text(150)
    with rounded_activations(int4):
        expected = uncached(int4, ids)
    assert relative(tokens.feed(ids), expected[-1]) < 0.02
    assert tokens.length == 150


def test_a_full_cache_and_one_past_it(tokens: Tokens, int4: Model) -> None:
    ids = text(160)
    tokens.feed(ids[:159])
    with rounded_activations(int4):
        expected = uncached(int4, ids)
    assert relative(tokens.feed(ids[159:]), expected[-1]) < 0.02
    with pytest.raises(BadInputError, match="holds 160"):
        tokens.feed(ids[:1])
    assert tokens.length == 160
    tokens.rewind()
    with pytest.raises(BadInputError, match="161 tokens don't fit"):
        tokens.feed(text(161))
    with pytest.raises(BadInputError, match="not in the vocabulary"):
        tokens.feed(np.array([VOCABULARY]))


def test_rewound_is_as_if_never_fed(tokens: Tokens) -> None:
    ids, other = text(30), text(30, seed=1)
    tokens.feed(ids[:12])
    once = tokens.feed(ids[12:20])
    tokens.rewind(12)
    tokens.feed(other)
    tokens.rewind(12)
    assert np.array_equal(tokens.feed(ids[12:20]), once)
    tokens.rewind()
    first = tokens.feed(ids[:1])
    tokens.rewind()
    assert np.array_equal(tokens.feed(ids[:1]), first)


def test_memory_is_planned_for_a_call_not_for_the_context(artifact: Artifact) -> None:
    """Beside the cache: a few rows of 128 tokens, nothing of tokens by tokens."""
    cache = artifact.facts["cache_bytes"]
    assert cache == 160 * 2 * 2 * 2 * 16 * 4
    assert artifact.facts["planned_memory_bytes"] - cache < 128 * 4 * (VOCABULARY + 12 * 96)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE tokenizer, as GPT-2's and SmolLM's are."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(["the quick brown fox jumps over the lazy dog and runs away from it"] * 8, trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    made.save(str(path))
    return path


@pytest.mark.parametrize("prompt", ["the quick brown fox", "jumps over 0123456789 " * 10])
def test_executorchs_own_runner_writes_the_same_text(
    prompt: str, artifact: Artifact, tokens: Tokens, tokenizer: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """extension/llm/runner loads the file, finds its constant methods, and decodes what we decode.

    The second prompt takes more than one call.
    """
    runner_module = pytest.importorskip("executorch.extension.llm.runner")
    from tokenizers import Tokenizer

    made = Tokenizer.from_file(str(tokenizer))
    ids = np.array(made.encode(prompt).ids)
    assert (len(ids) > artifact.facts["most_tokens_a_call"]) == (len(prompt) > 100)
    expected: list[int] = []
    scores = tokens.feed(ids)
    for _ in range(8):
        expected.append(int(scores.argmax()))
        scores = tokens.feed(np.array(expected[-1:]))
    pieces: list[str] = []
    runner = runner_module.TextLLMRunner(str(artifact.path), str(tokenizer))
    config = runner_module.GenerationConfig(echo=False, max_new_tokens=8, temperature=0.0)
    runner.generate(prompt, config, pieces.append)
    capfd.readouterr()
    wanted = made.decode(expected)
    assert "".join(pieces) == wanted
