"""Encoder-decoders with a cache, tiny and random, on ONNX Runtime and ExecuTorch, against transformers without one."""

from __future__ import annotations

import json
import wave
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as T

from edgeport.bundle.read import read_bundle
from edgeport.cli.main import main
from edgeport.compress import apply_recipe
from edgeport.errors import EXIT_BAD_INPUT, BadInputError
from edgeport.export.artifact import Artifact, LoweringSettings
from edgeport.export.dispatch import lower, read_weights
from edgeport.job import ExportRequest
from edgeport.model.build import build_huggingface
from edgeport.model.decoder import for_generation
from edgeport.model.encoder_decoder import bias_tables
from edgeport.model.load import load_model
from edgeport.model.types import SCORED, Model
from edgeport.pipeline import export
from edgeport.quantized import digest
from edgeport.recipe import Recipe, load_recipe
from edgeport.runtime.generate import Sampling, generate
from edgeport.runtime.session import open_encoded, open_session
from edgeport.runtime.torch import TorchSession
from edgeport.schema import parse_mapping
from edgeport.target import load_target
from edgeport.validate.generation import measure_generation
from edgeport.validating import validate_bundle

ORT, EXECUTORCH = "linux-x86_64-ort", "android-arm64-executorch"
VOCABULARY, CONTEXT = 97, 48
ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
PAIR: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 64,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "init_std": 0.2,
    "max_position_embeddings": 64,
    "decoder_start_token_id": 3,
    "forced_eos_token_id": None,
    **ENDS,
}
WHISPER = {**PAIR, "max_source_positions": 50, "max_target_positions": 64, "num_mel_bins": 80}
# Few buckets and a short distance: tokens beyond it share one bucket within the context.
STACK: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 96,
    "num_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
    "decoder_start_token_id": 0,
}
FAMILIES: dict[str, Callable[[], torch.nn.Module]] = {
    "whisper": lambda: T.WhisperForConditionalGeneration(T.WhisperConfig(**WHISPER)),
    "t5": lambda: T.T5ForConditionalGeneration(T.T5Config(**STACK)),
    "mt5": lambda: T.MT5ForConditionalGeneration(T.MT5Config(**STACK)),
    "umt5": lambda: T.UMT5ForConditionalGeneration(T.UMT5Config(**STACK)),
    "bart": lambda: T.BartForConditionalGeneration(T.BartConfig(**PAIR)),
    "mbart": lambda: T.MBartForConditionalGeneration(T.MBartConfig(**PAIR)),
    "marian": lambda: T.MarianMTModel(T.MarianConfig(**PAIR)),
    "pegasus": lambda: T.PegasusForConditionalGeneration(T.PegasusConfig(**PAIR)),
    "m2m_100": lambda: T.M2M100ForConditionalGeneration(T.M2M100Config(**PAIR)),
    "blenderbot-small": lambda: T.BlenderbotSmallForConditionalGeneration(T.BlenderbotSmallConfig(**PAIR)),
}


def make(family: str) -> Model:
    torch.manual_seed(0)
    module = FAMILIES[family]()
    return build_huggingface(
        module, name=family, reference=family, kind="factory", task=None, files={}, assets={}, licence=None, note=None
    )  # fmt: skip


def lowered(model: Model, target: str, out: Path) -> Artifact:
    out.mkdir(parents=True, exist_ok=True)
    artifact = lower(model, load_target(target), LoweringSettings("fp32", "dynamic"), out)
    return Artifact.from_json(json.loads(json.dumps(artifact.to_json())), out)


def compressed(model: Model, target: str, form: str) -> Model:
    step = {"method": "rtn", "linear": [form], "embedding": [form, "int8"], "activations": ["dynamic_int8"]}
    recipe = parse_mapping(Recipe, {"name": "t", "summary": "t", "compress": [step], "gate": {}}, "t")
    return apply_recipe(model, recipe, load_target(target))[0]


def sources(model: Model, length: int = 20) -> np.ndarray:
    """A recording's features, or a text of a length."""
    generator, spec = np.random.default_rng(length), model.inputs[0]
    if spec.dtype == "float32":
        return generator.standard_normal(spec.fixed_shape()).astype(np.float32)
    return generator.integers(3, VOCABULARY, (1, length))


def text(length: int) -> np.ndarray:
    return np.random.default_rng(length).integers(0, VOCABULARY, length)


def call(model: Model, length: int, source_length: int = 20) -> dict[str, np.ndarray]:
    return {model.inputs[0].name: sources(model, source_length), "decoder_input_ids": text(length)[None]}


def error(found: np.ndarray, wanted: np.ndarray) -> float:
    assert found.shape == wanted.shape
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def start(model: Model) -> list[int]:
    assert model.decoder is not None
    return list(model.decoder.start)


def generated(model: Model, source: np.ndarray, count: int) -> list[int]:
    """What transformers' own `generate` writes, greedily; Whisper's class has a longer one of its own."""
    ids = torch.tensor([start(model)])
    with torch.no_grad():
        answer = T.GenerationMixin.generate(
            model.module, torch.from_numpy(source), decoder_input_ids=ids, max_new_tokens=count,
            do_sample=False, num_beams=1, use_cache=True, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
    return [int(token) for token in answer[0, ids.shape[1] :]]


def bundle_of(folder: Path, out: Path) -> Path:
    request = ExportRequest(
        str(folder), load_target(ORT), load_recipe("fp32"), out, samples=4, quick=True, context=CONTEXT
    )
    result = export(request)
    assert [check.message for check in result.verdict.checks if not check.passed] == []
    return out


def speech_folder(folder: Path) -> Path:
    """A Whisper of one second, with a tokenizer that has its special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    special = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|de|>", "<|transcribe|>", "<|notimestamps|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    folder.mkdir()
    ids = {"pad_token_id": 256, "bos_token_id": 256, "eos_token_id": 256, "decoder_start_token_id": 257}
    torch.manual_seed(0)
    config = T.WhisperConfig(**{**WHISPER, "vocab_size": 262, **ids})
    T.WhisperForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"eos_token_id": 256, "decoder_start_token_id": 257, "is_multilingual": True, "suppress_tokens": [7, 9]}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def t5_bundle(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundle_of(tiny_model("t5"), tmp_path_factory.mktemp("t5") / "bundle")


@pytest.fixture(scope="module")
def t5(t5_bundle: Path, tiny_model: Callable[[str], Path]) -> tuple[Model, Artifact]:
    return for_generation(load_model(str(tiny_model("t5"))), CONTEXT), read_bundle(t5_bundle).artifact


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folder of a checkpoint and its bundle."""
    root = tmp_path_factory.mktemp("speech")
    return speech_folder(root / "whisper"), bundle_of(root / "whisper", root / "bundle")


@pytest.fixture(scope="module")
def whisper(speech: tuple[Path, Path]) -> tuple[Model, Artifact]:
    return for_generation(load_model(str(speech[0])), CONTEXT), read_bundle(speech[1]).artifact


@pytest.fixture(scope="module", params=["t5", "whisper"])
def both(request: pytest.FixtureRequest) -> tuple[Model, Artifact]:
    found: tuple[Model, Artifact] = request.getfixturevalue(request.param)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_known_with_its_attention(family: str) -> None:
    model = for_generation(make(family), CONTEXT)
    assert model.decoder is not None
    assert model.task.endswith("-with-past")
    assert len(model.decoder.layers) == len(model.decoder.cross) == 2
    assert all(layer.biased == family.endswith("t5") for layer in model.decoder.layers)
    assert not any(layer.biased for layer in model.decoder.cross)
    assert model.decoder.states == (50 if family == "whisper" else None)
    assert model.decoder.start == (0,) if family.endswith("t5") else (3,)


@pytest.mark.parametrize(("family", "different"), [("t5", 1), ("umt5", 2)])
def test_what_t5_adds_to_scores_is_a_table_by_distance(family: str, different: int) -> None:
    """Written from the paper's side: a bucket for each distance, in UMT5 other numbers in every layer."""
    model = for_generation(make(family), CONTEXT)
    assert model.decoder is not None
    tables = bias_tables(model.module, model.decoder)
    assert len({id(table) for table in tables}) == different
    state = model.module.state_dict()
    for layer, table in enumerate(tables):
        assert table is not None
        block = layer if different == 2 else 0
        weight = state[f"decoder.block.{block}.layer.0.SelfAttention.relative_attention_bias.weight"]
        for distance in (0, 3, 4, 19, 47):
            # Half of 8 buckets are exact; the others grow by logarithms up to a distance of 20.
            bucket = distance if distance < 4 else min(7, 4 + int(np.log(distance / 4) / np.log(20 / 4) * 4))
            assert torch.equal(table[distance], weight[bucket]), distance


def test_it_scores_through_its_cache_what_it_scores_without(both: tuple[Model, Artifact]) -> None:
    """A full cache, a short text, and sources shorter and longer than the text."""
    model, artifact = both
    session = open_session(artifact)
    for length, source_length in ((CONTEXT, 20), (3, 7), (40, 128)):
        wanted = TorchSession(model).run(call(model, length, source_length))["logits"]
        found = session.run(call(model, length, source_length))["logits"]
        assert found.shape[:2] == (1, min(length, SCORED))
        assert error(found, wanted) < 3e-6


def test_greedy_generation_is_that_of_transformers(both: tuple[Model, Artifact]) -> None:
    model, artifact = both
    tokens = open_encoded(artifact)
    for source_length in (20, 9):
        source = sources(model, source_length)
        tokens.encode(source)
        settings: Any = model.module.generation_config
        never = settings.suppress_tokens or ()
        record, new = generate(tokens, np.array(start(model)), most=30, never=never)
        assert list(new) == generated(model, source, 30)
        assert record.finish == "length"


def test_the_cache_is_used_up_to_its_last_place_and_not_beyond(both: tuple[Model, Artifact]) -> None:
    model, artifact = both
    tokens = open_encoded(artifact)
    with pytest.raises(BadInputError, match="Nothing was encoded"):
        tokens.feed(np.array([1]))
    tokens.encode(sources(model))
    record, new = generate(tokens, text(40), most=100)
    assert len(list(new)) == CONTEXT - 40 + 1
    assert record.finish == "context"
    with pytest.raises(BadInputError, match=f"holds {CONTEXT} and has {CONTEXT}"):
        tokens.feed(np.array([1]))
    tokens.rewind(10)
    again = tokens.feed(text(5))
    tokens.encode(sources(model))
    assert tokens.length == 0
    assert error(again, tokens.feed(np.concatenate([text(40)[:10], text(5)]))) < 3e-6


def test_a_stop_token_and_banned_tokens(whisper: tuple[Model, Artifact]) -> None:
    model, artifact = whisper
    tokens = open_encoded(artifact)

    def written(**more: Any) -> list[int]:
        tokens.encode(sources(model))
        return list(generate(tokens, np.array(start(model)), most=8, **more)[1])

    drawn = Sampling(temperature=3.0, seed=1)
    several = written(sampling=drawn)
    stop = next(token for token in several if several.index(token) > 0)
    assert written(sampling=drawn, stop=frozenset({stop})) == several[: several.index(stop)]
    plain = written()
    assert plain[0] not in written(never=[plain[0]])
    other = written(never_first=[plain[0]])
    assert other[0] != plain[0]


def test_a_source_that_does_not_fit_is_refused(t5: tuple[Model, Artifact], whisper: tuple[Model, Artifact]) -> None:
    with pytest.raises(BadInputError, match="does not fit"):
        open_encoded(t5[1]).encode(np.ones((1, 513), np.int64))
    with pytest.raises(BadInputError, match="does not fit"):
        open_encoded(whisper[1]).encode(np.zeros((1, 80, 99), np.float32))


def test_long_texts_and_speeds_are_measured_with_the_encoder(both: tuple[Model, Artifact]) -> None:
    model, artifact = both
    assert model.decoder is not None
    samples = [call(model, 30), call(model, 25)]
    found = measure_generation(artifact, samples, quick=True)
    assert (found.context, found.long_tokens) == (CONTEXT, CONTEXT)
    assert found.long_cosine > 0.999999
    assert found.encoder_ms is not None
    assert found.encoder_ms > 0
    assert [rate.length for rate in found.rates] == [4]


@pytest.mark.parametrize(
    ("family", "form"), [("whisper", "int4_g32"), pytest.param("t5", "int8", marks=pytest.mark.slow)]
)
def test_compressed_weights_are_in_the_two_files_and_the_mobile_format_answers_the_same(
    family: str, form: str, tmp_path: Path
) -> None:
    model = compressed(for_generation(make(family), CONTEXT), ORT, form)
    settings = LoweringSettings("fp32", "dynamic", ort_format=True)
    artifact = lower(model, load_target(ORT), settings, tmp_path)
    unused = artifact.facts.get("unused_weights", [])
    # The table of distances is what the file holds of it.
    assert all("relative_attention_bias" in name for name in unused)
    stored = read_weights(artifact)
    assert {name: digest(tensor) for name, tensor in stored.items()} == {
        name: digest(tensor) for name, tensor in model.quantized.items() if name not in unused
    }
    assert any(place.startswith("encoder.onnx:") for place in artifact.weights.values())
    found = open_session(artifact).run(call(model, 30))["logits"]
    assert error(found, TorchSession(model).run(call(model, 30))["logits"]) < 0.05
    assert artifact.encoder is not None
    mobile = replace(artifact, entry="decoder.ort", encoder=replace(artifact.encoder, entry="encoder.ort"))
    assert error(open_session(mobile).run(call(model, 30))["logits"], found) < 1e-5
    config = (tmp_path / "required_operators_and_types.config").read_text()
    assert "GroupQueryAttention" in config  # of the decoder
    assert ("Conv" if family == "whisper" else "Log") in config  # of the encoder


@pytest.mark.slow
@pytest.mark.parametrize("family", ["umt5", "bart", "marian"])
@pytest.mark.parametrize("target", [ORT, EXECUTORCH])
def test_further_families_write_what_transformers_write(family: str, target: str, tmp_path: Path) -> None:
    model = for_generation(make(family), CONTEXT)
    tokens = open_encoded(lowered(model, target, tmp_path))
    tokens.encode(sources(model))
    assert list(generate(tokens, np.array(start(model)), most=30)[1]) == generated(model, sources(model), 30)


@pytest.mark.parametrize("family", ["t5", pytest.param("whisper", marks=pytest.mark.slow)])
def test_the_methods_traced_for_executorch_are_the_model(family: str) -> None:
    """The very graphs that are lowered, run by torch with ExecuTorch's kernels: pieces, tokens, a second source."""
    from edgeport.export.executorch.encoder_decoder import DECODER, ENCODER, export_both
    from edgeport.export.executorch.program import exporter_patches

    model = for_generation(make(family), CONTEXT)
    with exporter_patches():
        methods = {name: program.module(check_guards=False) for name, program in export_both(model).items()}
    for source_length in (20, 13):
        inputs = call(model, 40, source_length)
        with torch.no_grad():
            name = model.inputs[0].name
            wanted = model.module(**{k: torch.from_numpy(v) for k, v in inputs.items()}, use_cache=False).logits[0]
            states, at = methods[ENCODER](torch.from_numpy(inputs[name])), 0
            for length in (13, 1, 2, 12, 1, 11):
                ids = torch.from_numpy(inputs["decoder_input_ids"][:, at : at + length])
                scores = methods[DECODER](ids, states, torch.tensor([at]))
                at += length
                assert error(scores[0].numpy(), wanted[at - 1].numpy()) < 2e-5, (length, at)


def test_more_states_than_transformers_plans_for_fit_a_program(tmp_path: Path) -> None:
    """Real Whisper has 1500; transformers' patches cap every open size at 1024, and the runtime then stops."""
    torch.manual_seed(0)
    sizes = {"max_source_positions": 1100, "decoder_layers": 1, "num_mel_bins": 8}
    config = T.WhisperConfig(**{**WHISPER, **sizes})
    model = build_huggingface(
        T.WhisperForConditionalGeneration(config), name="whisper", reference="whisper", kind="factory", task=None,
        files={}, assets={}, licence=None, note=None,
    )  # fmt: skip
    model = for_generation(model, CONTEXT)
    found = open_session(lowered(model, EXECUTORCH, tmp_path)).run(call(model, 5))["logits"]
    assert error(found, TorchSession(model).run(call(model, 5))["logits"]) < 2e-5


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Artifact]:
    """Whisper with 4-bit weights as a .pte file."""
    torch.manual_seed(0)
    config = T.WhisperConfig(**{**WHISPER, "decoder_layers": 1})
    model = build_huggingface(
        T.WhisperForConditionalGeneration(config), name="whisper", reference="whisper", kind="factory", task=None,
        files={}, assets={}, licence=None, note=None,
    )  # fmt: skip
    model = compressed(for_generation(model, CONTEXT), EXECUTORCH, "int4_g32")
    return model, lowered(model, EXECUTORCH, tmp_path_factory.mktemp("program"))


def test_a_program_holds_every_weight_bit_for_bit_and_the_tied_one_once(program: tuple[Model, Artifact]) -> None:
    model, artifact = program
    stored = read_weights(artifact)
    assert {name: digest(tensor) for name, tensor in stored.items()} == {
        name: digest(tensor) for name, tensor in model.quantized.items()
    }
    places = [place.split(" + ") for place in artifact.weights.values()]
    assert [place for place in places if len(place) > 1 and place[0].startswith("text_decoder/kernel/")]
    # No layer's product is left to the runtime's own kernels, which are slow.
    assert not {"aten::mm.out", "aten::addmm.out"} & set(artifact.facts["operators"])
    tensors = model.quantized.values()
    logical = sum(tensor.codes.numel() * tensor.bits // 8 + tensor.scale.numel() * 2 for tensor in tensors)
    floats = sum(
        parameter.numel() * 4 for name, parameter in model.module.named_parameters() if name not in model.quantized
    )
    # Beside the weights: the graphs.
    assert artifact.path.stat().st_size < logical + floats + 150_000


def test_a_program_scores_through_its_cache_what_torch_does(program: tuple[Model, Artifact]) -> None:
    model, artifact = program
    session = open_session(artifact)
    for length in (CONTEXT, 3):
        wanted = TorchSession(model).run(call(model, length))["logits"]
        assert error(session.run(call(model, length))["logits"], wanted) < 0.05  # activations in 8 bits


def test_a_program_is_used_up_to_its_last_place_and_takes_new_sources(program: tuple[Model, Artifact]) -> None:
    model, artifact = program
    tokens = open_encoded(artifact)
    with pytest.raises(BadInputError, match="Nothing was encoded"):
        tokens.feed(np.array([1]))
    tokens.encode(sources(model, 1))
    first = tokens.feed(text(CONTEXT))
    with pytest.raises(BadInputError, match=f"holds {CONTEXT} and has {CONTEXT}"):
        tokens.feed(np.array([1]))
    other = np.flip(sources(model, 1), -1).copy()
    tokens.encode(other)
    second = tokens.feed(text(CONTEXT))
    assert error(second, first) > 0.01
    tokens.encode(sources(model, 1))
    tokens.feed(text(CONTEXT)[:40])
    assert error(tokens.feed(text(CONTEXT)[40:]), first) < 0.02
    with pytest.raises(BadInputError, match="has the shape"):
        tokens.encode(np.zeros((1, 80, 99), np.float32))


def test_run_answers_a_text_with_what_transformers_writes(
    t5_bundle: Path, tiny_model: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", str(t5_bundle), "the cat is in a hat", "-n", "12", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    tokenizer = T.PreTrainedTokenizerFast(tokenizer_file=str(tiny_model("t5") / "tokenizer.json"))
    module = T.T5ForConditionalGeneration.from_pretrained(tiny_model("t5"))
    ids = torch.tensor([tokenizer("the cat is in a hat")["input_ids"]])
    wanted = module.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None)[0, 1:].tolist()
    stop = wanted.index(1) if 1 in wanted else len(wanted)
    assert answer["ids"] == wanted[:stop]
    assert answer["time_to_first_token_s"] > 0
    evidence = json.loads((t5_bundle / "evidence.json").read_text())
    assert evidence["generation"]["encoder_ms"] > 0
    manifest = json.loads((t5_bundle / "manifest.json").read_text())
    assert (manifest["entry"], manifest["encoder"]["entry"]) == ("model/decoder.onnx", "encoder.onnx")
    files = sum((t5_bundle / "model" / name).stat().st_size for name in ("encoder.onnx", "decoder.onnx"))
    assert evidence["size"]["bytes"] == files


def test_a_bundle_is_measured_again_from_what_it_carries(t5_bundle: Path) -> None:
    result = validate_bundle(t5_bundle, quick=True)
    assert result.exit_code == 0
    assert result.evidence["parity"][0]["cosine"]["mean"] > 0.999999
    assert result.evidence["generation"]["long_cosine"] > 0.999999
    assert result.evidence["generation"]["cache_bytes"] > 0
    assert "long_cache" in {check.metric for check in result.verdict.checks}


def test_run_refuses_what_the_model_does_not_take(
    t5_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", str(t5_bundle), "--audio", str(tmp_path / "x.wav")]) == EXIT_BAD_INPUT
    assert "a PROMPT" in capsys.readouterr().err
    assert main(["run", str(t5_bundle), "the " * 600]) == EXIT_BAD_INPUT
    assert "does not fit" in capsys.readouterr().err
    assert main(["chat", str(t5_bundle)]) == EXIT_BAD_INPUT
    assert "holds no conversation" in capsys.readouterr().err


def test_the_task_without_a_cache_is_still_there(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    folder = str(tiny_model("t5"))
    plan = ["export", folder, "-t", ORT, "-r", "fp32", "-o", str(tmp_path / "out"), "--dry-run"]
    assert main([*plan, "--task", "text2text-generation", "--sequence", "16"]) == 0
    assert main([*plan, "--task", "text2text-generation", "--context", "16"]) == EXIT_BAD_INPUT
    assert main([*plan, "--task", "text2text-generation-with-past", "--context", "16"]) == 0
    assert main([*plan, "--context", "1"]) == EXIT_BAD_INPUT
    coreml = ["export", folder, "-t", "ios18-coreml", "-r", "fp32", "-o", str(tmp_path / "out"), "--dry-run"]
    assert main(coreml) == 0
    assert main([*coreml, "--context", "16"]) == EXIT_BAD_INPUT


def record(path: Path, seconds: float, rate: int = 16000) -> np.ndarray:
    samples = np.random.default_rng(0).integers(-9000, 9000, int(seconds * rate)).astype("<i2")
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.tobytes())
    return samples.astype(np.float32) / 32768


def test_run_writes_a_recording_down(
    speech: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, bundle = speech
    samples = record(tmp_path / "a.wav", 0.8)
    arguments = ["run", str(bundle), "--audio", str(tmp_path / "a.wav"), "-n", "10", "--json"]
    assert main([*arguments, "--language", "de"]) == 0
    answer = json.loads(capsys.readouterr().out)
    features = T.WhisperFeatureExtractor(chunk_length=1)(samples, sampling_rate=16000, return_tensors="pt")
    module = T.WhisperForConditionalGeneration.from_pretrained(folder).eval()
    written = [257, 259, 260, 261]
    with torch.no_grad():
        for _ in range(10):
            scores = module(features.input_features, decoder_input_ids=torch.tensor([written])).logits[0, -1]
            scores[[7, 9]] = -torch.inf
            written.append(int(scores.argmax()))
    wanted = written[4:]
    assert answer["ids"] == (wanted[: wanted.index(256)] if 256 in wanted else wanted)
    assert answer["prompt_tokens"] == 4
    capsys.readouterr()
    for case, words in (
        ([*arguments, "--language", "xx"], "does not know <|xx|>"),
        (["run", str(bundle), "hello"], "--audio"),
        (["run", str(bundle), "--audio", str(tmp_path / "none.wav")], "no such recording"),
    ):
        assert main(case) == EXIT_BAD_INPUT
        assert words in "".join(capsys.readouterr())
    record(tmp_path / "long.wav", 1.5)
    assert main(["run", str(bundle), "--audio", str(tmp_path / "long.wav")]) == EXIT_BAD_INPUT
    assert "reads 1 s at once" in capsys.readouterr().err
    record(tmp_path / "slow.wav", 0.5, rate=8000)
    assert main(["run", str(bundle), "--audio", str(tmp_path / "slow.wav")]) == EXIT_BAD_INPUT
    assert "16000 Hz" in capsys.readouterr().err
