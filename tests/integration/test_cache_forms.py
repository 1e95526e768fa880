"""What ONNX Runtime keeps of a text: windows only, integers, and the same scores through them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgeport.cli.main import main
from edgeport.compress.cache import cache_scales, round_to
from edgeport.errors import TargetRefusesError
from edgeport.export.artifact import Artifact, LoweringSettings
from edgeport.export.dispatch import cache_bytes, lower
from edgeport.export.onnx import decoder as onnx_decoder
from edgeport.formats import CACHE_BITS, CacheFormat
from edgeport.model.decoder import Call, StepCache, attending, causal_attention, for_generation
from edgeport.model.types import Model
from edgeport.runtime.decoder import Tokens
from edgeport.runtime.onnx_decoder import OnnxRuntimeTokens
from edgeport.runtime.session import open_session, open_tokens
from edgeport.runtime.torch import TorchSession
from edgeport.target import load_target

TARGET = load_target("linux-x86_64-ort")
VOCABULARY, CONTEXT = 97, 96
WINDOW, SLACK = 8, 6
OWN: dict[str, dict[str, Any]] = {"llama": {"tie_word_embeddings": False}, "gemma2": {"head_dim": 32}}


@pytest.fixture(scope="module")
def make(tiny_decoder: Callable[..., Model]) -> Callable[..., Model]:
    """A family's random model, with the scales of its cache where that holds integers."""

    def build(family: str, form: CacheFormat = "float") -> Model:
        plain = tiny_decoder(family, vocabulary=VOCABULARY, positions=128, **OWN.get(family, {}))
        model = for_generation(plain, CONTEXT)
        assert model.decoder is not None
        if form == "float":
            return model
        decoder = replace(model.decoder, cache=form)
        texts = [torch.from_numpy(ids(60, seed=seed))[None] for seed in range(7)]
        scales = cache_scales(replace(model, decoder=decoder), texts, form)
        return replace(model, decoder=replace(decoder, scales=scales))

    return build


def lowered(model: Model, out: Path) -> Artifact:
    assert model.decoder is not None
    out.mkdir(parents=True, exist_ok=True)
    return lower(model, TARGET, LoweringSettings("fp32", "dynamic", kv_cache=model.decoder.cache), out)


def ids(length: int, seed: int = 100) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCABULARY, length)


def error(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


@pytest.fixture
def little_slack(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens are dropped every 7 instead of every 129."""
    monkeypatch.setattr(onnx_decoder, "SLACK", SLACK)


@pytest.fixture(scope="module")
def windowed(make: Callable[..., Model], tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Artifact]:
    """Both layers have windows."""
    model = make("mistral")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_decoder, "SLACK", SLACK)
        return model, lowered(model, tmp_path_factory.mktemp("mistral"))


@pytest.mark.usefixtures("little_slack")
def test_a_layer_with_a_window_keeps_no_more_and_scores_the_same(windowed: tuple[Model, Artifact]) -> None:
    """The text is eleven windows long."""
    model, artifact = windowed
    assert model.decoder is not None
    session = open_session(artifact)
    text = {"input_ids": ids(90)[None]}
    assert error(session.run(text)["logits"], TorchSession(model).run(text)["logits"]) < 2e-6
    tokens = OnnxRuntimeTokens(artifact)
    assert tokens.cache_bytes == 2 * (WINDOW + SLACK) * 2 * 2 * 16 * 4
    assert tokens.cache_bytes == cache_bytes(model.decoder, TARGET) == artifact.facts["cache_bytes"]


def test_tokens_that_a_window_dropped_come_back(windowed: tuple[Model, Artifact]) -> None:
    """Every length rewound to from later ones, and fed on: as if the text had never been longer."""
    _, artifact = windowed
    text, other = ids(60), ids(3, seed=7)
    fresh, tokens = open_tokens(artifact), open_tokens(artifact)

    def wanted(length: int) -> np.ndarray:
        fresh.rewind()
        return fresh.feed(np.concatenate([text[:length], other]))

    for back in (1, 2, 5, 9, 30):
        for length in range(31, 47):
            tokens.rewind()
            tokens.feed(text[: length + back])
            tokens.rewind(length)
            assert error(tokens.feed(other), wanted(length)) < 2e-6, (back, length)
            assert tokens.length == length + 3
    tokens.rewind(20)
    tokens.rewind(10)
    assert error(tokens.feed(other), wanted(10)) < 2e-6


def rounded_scores(model: Model, text: np.ndarray) -> np.ndarray:
    """The torch model with keys and values rounded on the way to attention: (S, V)."""
    decoder = model.decoder
    assert decoder is not None
    bits = CACHE_BITS[decoder.cache]

    def attend(call: Call) -> torch.Tensor:
        scales = decoder.scales[call.index]
        key, value = round_to(call.key, scales.key, bits), round_to(call.value, scales.value, bits)
        return causal_attention(replace(call, key=key, value=value))

    row = torch.from_numpy(text)[None]
    with torch.no_grad(), attending(model.module, attend):
        positions = torch.arange(row.shape[1])[None]
        result = model.module(input_ids=row, position_ids=positions, past_key_values=StepCache(), use_cache=True)
    scores: np.ndarray = result.logits[0].numpy()
    return scores


def step_by_step(tokens: Tokens, text: np.ndarray, first: int) -> np.ndarray:
    tokens.rewind()
    return np.stack([tokens.feed(text[:first]), *(tokens.feed(text[at : at + 1]) for at in range(first, len(text)))])


@pytest.mark.usefixtures("little_slack")
@pytest.mark.parametrize(
    ("family", "form", "loss"),
    [("llama", "int8", 0.05), ("gemma2", "int4", 0.5), ("phi", "int4", 0.5)],
)
def test_a_cache_of_integers_scores_as_rounded_keys_and_values_do(
    make: Callable[..., Model], family: str, form: CacheFormat, loss: float, tmp_path: Path
) -> None:
    """The file rounds exactly to the steps that calibration chose; what that costs the scores is bounded too. Gemma 2
    has one layer with a window and one that sees everything, both with a soft cap."""
    model = make(family, form)
    assert model.decoder is not None
    artifact = lowered(model, tmp_path)
    tokens, text = OnnxRuntimeTokens(artifact), ids(70)
    found = step_by_step(tokens, text, 40)
    assert error(found, rounded_scores(model, text)[39:]) < 2e-5
    plain = TorchSession(replace(model, decoder=None)).run({"input_ids": text[None]})["logits"][0]
    assert 0 < error(found, plain[-len(found) :]) < loss
    wide = cache_bytes(replace(model.decoder, cache="float"), TARGET)
    assert tokens.cache_bytes == cache_bytes(model.decoder, TARGET) == wide * CACHE_BITS[form] // 32


def test_steps_are_the_best_of_those_tried_for_every_channel(make: Callable[..., Model]) -> None:
    """Against a plain search on all values at once; outliers in one channel leave the others fine steps."""
    model = make("llama", "int4")
    assert model.decoder is not None
    seen: dict[int, list[torch.Tensor]] = {0: [], 1: []}

    def attend(call: Call) -> torch.Tensor:
        seen[call.index].append(call.key)
        return causal_attention(call)

    for seed in range(7):
        row = torch.from_numpy(ids(60, seed=seed))[None]
        with torch.no_grad(), attending(model.module, attend):
            positions = torch.arange(60)[None] + 6 * seed  # spread over the context of 96
            model.module(input_ids=row, position_ids=positions, past_key_values=StepCache(), use_cache=True)
    for layer, found in enumerate(model.decoder.scales):
        keys = torch.cat(seen[layer], 2)[0].double()  # (kv_heads, S, head_dim)
        for head in range(2):
            for channel in range(16):
                values = keys[head, :, channel]
                steps = [values.abs().max() * ratio / 7 for ratio in np.arange(1.0, 0.49, -0.05)]
                losses = [((values / s).round().clamp(-8, 7) * s - values).square().sum() for s in steps]
                step = found.key[head, channel].double()
                loss = ((values / step).round().clamp(-8, 7) * step - values).square().sum()
                assert loss <= min(losses) * (1 + 1e-5)


def recipe(folder: Path, cache: str) -> Path:
    path = folder / f"{cache}.toml"
    path.write_text(
        f'name = "{cache}-cache"\nsummary = "test"\n[lower]\nkv_cache = "{cache}"\n[calibration]\nsamples = 8\n[gate]\n'
    )
    return path


def test_an_export_keeps_its_cache_as_the_recipe_says(
    tiny_model: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bundle"
    arguments = ["export", str(tiny_model("llama")), "-t", "linux-x86_64-ort", "-r", str(recipe(tmp_path, "int8"))]
    assert main([*arguments, "-o", str(out), "--samples", "4", "--quick", "--json"]) == 0
    evidence = json.loads(capsys.readouterr().out)["evidence"]
    assert evidence["generation"]["cache"] == "int8"
    assert evidence["generation"]["cache_bytes"] == 64 * 2 * 2 * 2 * 16
    assert evidence["parity"][0]["kl"]["mean"] < 0.01
    plan = evidence["memory_plan"]
    assert (plan["context"], plan["cache_bytes"], plan["longest_context"]) == (64, 64 * 2 * 2 * 2 * 16, 64)
    assert plan["weights_bytes"] == (out / "model" / "model.onnx").stat().st_size
    assert evidence["memory"]["tokens"] == 64
    measured = (evidence["memory"]["peak_rss_mb"] - evidence["memory"]["runtime_rss_mb"]) * 1e6
    assert 0.4 < measured / plan["total_bytes"] < 2.5
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["settings"]["kv_cache"] == "int8"
    assert {spec["dtype"] for spec in manifest["inputs"] if spec["name"].startswith("past")} == {"int8"}


def test_caches_that_can_not_be_are_refused(
    tiny_model: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refusal(model: str, target: str, cache: str, *more: str) -> tuple[int, str]:
        arguments = ["export", str(tiny_model(model)), "-t", target, "-r", str(recipe(tmp_path, cache))]
        code = main([*arguments, "-o", str(tmp_path / "none"), "--dry-run", *more])
        return code, " ".join(capsys.readouterr().err.split())

    code, words = refusal("llama", "raspberry-pi-5-executorch", "int4")
    assert code == 3
    assert "keeps no keys and values in int4" in words
    code, words = refusal("bert", "linux-x86_64-ort", "int8")
    assert code == 2
    assert "the model keeps none" in words
    code, words = refusal("llama", "linux-x86_64-ort", "int8", "--task", "text-generation")
    assert code == 2


def test_a_context_that_a_device_can_not_hold_is_refused_with_the_longest_that_fits(
    tiny_model: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def dry_run(target: str, context: int) -> tuple[int, dict[str, Any]]:
        arguments = ["export", str(tiny_model("llama")), "-t", target, "-r", "fp32", "-o", str(tmp_path / "none")]
        code = main([*arguments, "--context", str(context), "--dry-run", "--json"])
        return code, json.loads(capsys.readouterr().out)

    _, found = dry_run("linux-x86_64-ort", 64)
    plan = found["memory"]
    small = tmp_path / "small.toml"
    text = (Path(__file__).parents[2] / "targets" / "linux-x86_64-ort.toml").read_text()
    short = plan["total_bytes"] - (plan["cache_bytes"] + plan["activations_bytes"]) // 2
    small.write_text(text.replace("ram_gb = 16", f"ram_gb = {short / 1e9:.9f}"))
    code, refused = dry_run(str(small), 64)
    assert code == 3
    assert "keys and values" in refused["what"]
    longest = int(refused["allowed"].removeprefix("a context of at most ").removesuffix(" tokens"))
    assert abs(longest - 32) <= 1  # half of what grows with the context
    assert dry_run(str(small), longest)[0] == 0
    assert dry_run(str(small), longest + 1)[0] == 3


def test_a_target_that_keeps_floats_refuses_integers(make: Callable[..., Model], tmp_path: Path) -> None:
    plain = TARGET.model_copy(update={"kv_cache": ("float",)})
    with pytest.raises(TargetRefusesError, match="keeps no keys and values in int8") as caught:
        lower(make("llama", "int8"), plain, LoweringSettings("fp32", "dynamic", kv_cache="int8"), tmp_path)
    assert caught.value.allowed == "float"
