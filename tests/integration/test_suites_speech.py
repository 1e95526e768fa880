"""Suites of speech and of pictures with words, on tiny random models and their files, against torch; and what is kept
of an original's answers."""

from __future__ import annotations

import json
import wave
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import transformers as T
from PIL import Image

from edgeport import suites
from edgeport.errors import BadInputError
from edgeport.export.artifact import LoweringSettings
from edgeport.export.onnx.lower import lower
from edgeport.job import model_key
from edgeport.model.decoder import for_generation
from edgeport.model.load import load_model
from edgeport.model.nano_ocr import CHARACTERS, load_nano_ocr
from edgeport.model.silero_vad import SileroVad, load_silero_vad
from edgeport.progress import Silent
from edgeport.runtime.torch import TorchSession
from edgeport.target import load_target
from edgeport.validate.suites.evaluate import evaluate, remember
from edgeport.validate.suites.remembered import Remembered, read_answers, write_answers
from edgeport.validate.suites.subject import of_artifact, of_model
from edgeport.validate.suites.traits import traits_of

TARGET = load_target("linux-x86_64-ort")
FP32 = LoweringSettings("fp32", "dynamic")
RATE = 16_000


def write_suite(folder: Path, kind: str, rows: list[dict[str, object]]) -> str:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "mine.toml").write_text(
        f'name = "mine"\ntitle = "mine"\nkind = "{kind}"\ndata = "rows.jsonl"\nmost_tokens = 24\n'
        f"[evaluation]\nstart = 0\nstop = {len(rows)}\n"
    )
    return str(folder / "mine.toml")


def write_wav(path: Path, samples: np.ndarray) -> np.ndarray:
    """Write 16 bits, and give what they are as floats."""
    codes = (samples * 32767).astype("<i2")
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(codes.tobytes())
    return codes.astype(np.float32) / 32768


def sounds(folder: Path, count: int, seconds: float) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    found = []
    for index in range(count):
        loud = np.repeat(random.random(8), round(seconds * RATE / 8))  # in steps, so that no two sound alike
        found.append(write_wav(folder / f"{index}.wav", 0.5 * loud * random.standard_normal(len(loud)).clip(-1, 1)))
    return found


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A Whisper of one second with letters as tokens: the folder, its model, the original, and its file."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("whisper")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|startoftranscript|>", "<|notimestamps|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    ids = {"pad_token_id": 256, "bos_token_id": 256, "eos_token_id": 256, "decoder_start_token_id": 257}
    torch.manual_seed(0)
    config = T.WhisperConfig(
        vocab_size=259, d_model=64, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=96, decoder_ffn_dim=96, init_std=0.3, max_source_positions=50,
        max_target_positions=64, num_mel_bins=80, **ids,
    )  # fmt: skip
    T.WhisperForConditionalGeneration(config).save_pretrained(folder)
    # Letters that are no words of the normalizer's are never written: what is compared has words.
    settings = {"eos_token_id": 256, "decoder_start_token_id": 257, "suppress_tokens": [7, 9]}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    model = load_model(str(folder))
    artifact = lower(for_generation(model, 48), TARGET, FP32, tmp_path_factory.mktemp("speech"))
    original = of_model(model)
    return folder, original, of_artifact(artifact, original.traits)


def test_a_transcript_is_what_transformers_writes(whisper: Any, tmp_path: Path) -> None:
    folder, original, artifact = whisper
    recordings = sounds(tmp_path, 4, 0.8)
    rows = [{"audio": f"{index}.wav", "text": f"number {index} of four"} for index in range(4)]
    found = evaluate(write_suite(tmp_path, "speech_recognition", rows), original, artifact)
    module: Any = T.WhisperForConditionalGeneration.from_pretrained(folder).eval()
    extractor = T.WhisperFeatureExtractor(feature_size=80, chunk_length=1)
    tokenizer = original.tokenizer(24)
    expected = []
    for samples in recordings:
        features = extractor(samples, sampling_rate=RATE, return_tensors="pt")["input_features"]
        ids = [257, 258]
        with torch.no_grad():
            while len(ids) < 24 and ids[-1] != 256:
                scores = module(features, decoder_input_ids=torch.tensor([ids])).logits[0, -1]
                scores[[7, 9]] = -torch.inf
                ids.append(int(scores.argmax()))
        expected.append(tokenizer.decode(ids[2:], skip_special_tokens=True))
    assert len(set(expected)) > 1
    assert sorted(found.original_answers or ()) == sorted(expected)
    assert found.artifact_answers == found.original_answers
    assert (found.metric, found.higher_is_better, found.chance) == ("word_error_rate", False, 1.0)
    assert found.weights == (4.0,) * 4


def test_a_recording_that_is_too_long_is_refused(whisper: Any, tmp_path: Path) -> None:
    _, original, artifact = whisper
    sounds(tmp_path, 1, 1.5)
    path = write_suite(tmp_path, "speech_recognition", [{"audio": "0.wav", "text": "a"}])
    with pytest.raises(BadInputError, match="exported without a cache"):
        evaluate(path, original, replace(artifact, tokens=None))
    with pytest.raises(BadInputError, match=r"has 1\.5 s; the model reads 1 s at once"):
        evaluate(path, original, artifact)


@pytest.fixture(scope="module")
def voice(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A random Silero VAD out of an ONNX file, and the tensors in it."""
    root = tmp_path_factory.mktemp("voice")
    torch.manual_seed(0)
    shapes = {"stft.forward_basis_buffer": (258, 1, 256), "decoder.decoder.2.weight": (1, 128, 1)}
    shapes |= {"decoder.decoder.2.bias": (1,), "decoder.rnn.weight_ih": (512, 128), "decoder.rnn.weight_hh": (512, 128)}
    shapes |= {"decoder.rnn.bias_ih": (512,), "decoder.rnn.bias_hh": (512,)}
    for index, (give, take) in enumerate(((128, 129), (64, 128), (64, 64), (128, 64))):
        shapes |= {
            f"encoder.{index}.reparam_conv.weight": (give, take, 3),
            f"encoder.{index}.reparam_conv.bias": (give,),
        }
    tensors = {f"model.{name}": 0.2 * torch.randn(shape) for name, shape in shapes.items()}
    graph = onnx.helper.make_graph(
        [], "g", [], [], [onnx.numpy_helper.from_array(value.numpy(), name) for name, value in tensors.items()]
    )
    onnx.save(onnx.helper.make_model(graph), root / "vad.onnx")
    return load_silero_vad(root / "vad.onnx", name="vad", reference="vad"), tensors


def reference_probabilities(tensors: dict[str, torch.Tensor], samples: np.ndarray) -> list[float]:
    """Silero VAD with torch's own LSTM cell, frame by frame."""
    cell = torch.nn.LSTMCell(128, 128)
    cell.load_state_dict({name: tensors[f"model.decoder.rnn.{name}"] for name in cell.state_dict()})
    state, found = (torch.zeros(1, 128), torch.zeros(1, 128)), []
    padded = torch.from_numpy(np.concatenate([np.zeros(64, np.float32), samples]))
    for start in range(0, len(samples) - 511, 512):
        frame = torch.nn.functional.pad(padded[None, None, start : start + 576], (0, 64), mode="reflect")
        parts = torch.nn.functional.conv1d(frame, tensors["model.stft.forward_basis_buffer"], stride=128)
        hidden = torch.sqrt(parts[:, :129] ** 2 + parts[:, 129:] ** 2)
        for index, stride in enumerate((1, 2, 2, 1)):
            weight, bias = (tensors[f"model.encoder.{index}.reparam_conv.{part}"] for part in ("weight", "bias"))
            hidden = torch.relu(torch.nn.functional.conv1d(hidden, weight, bias, stride=stride, padding=1))
        state = cell(hidden[..., 0], state)
        weight, bias = (tensors[f"model.decoder.decoder.2.{part}"] for part in ("weight", "bias"))
        found.append(float(torch.sigmoid(torch.relu(state[0]) @ weight[0, :, 0] + bias)))
    return found


def test_voice_activity_goes_through_the_state(voice: Any, tmp_path: Path, own_cache: Path) -> None:
    model, tensors = voice
    original = of_model(model)
    (tmp_path / "out").mkdir()
    artifact = of_artifact(lower(model, TARGET, FP32, tmp_path / "out"), original.traits)
    recordings = sounds(tmp_path, 3, 1.0)
    with torch.no_grad():
        expected = reference_probabilities(tensors, recordings[0])
    assert len(expected) == 31
    assert np.ptp(expected) > 0.05
    for subject in (original, artifact):
        assert subject.speech(recordings[0]).tolist() == pytest.approx(expected, abs=1e-4)
    rows = [{"audio": f"{index}.wav", "speech": [[0.2, 0.6]]} for index in range(3)]
    path = write_suite(tmp_path, "voice_activity", rows)
    found = evaluate(path, original, artifact)
    assert suites._score(path, original, artifact, model_key(model), False, frozenset(), Silent()) == found
    assert found.artifact_scores == pytest.approx(found.original_scores, abs=1e-2)
    assert (found.metric, found.n, found.chance) == ("roc_auc", 3, 0.5)

    class Forgetful:
        """The planted fault: each frame begins with an empty state."""

        def run(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            assert original.session is not None
            return original.session.run({**inputs, "state": np.zeros_like(inputs["state"])})

    broken: Any = replace(original, session=Forgetful())
    assert np.abs(broken.speech(recordings[0]) - np.array(expected)).max() > 0.01


def test_speech_everywhere_is_one_clear_error(voice: Any, tmp_path: Path) -> None:
    original = of_model(voice[0])
    sounds(tmp_path, 2, 0.3)
    rows = [{"audio": f"{index}.wav", "speech": [[0.0, 1.0]]} for index in range(2)]
    with pytest.raises(BadInputError, match="in one recording at most"):
        evaluate(write_suite(tmp_path, "voice_activity", rows), original, original)


def test_another_file_is_no_silero_vad(tmp_path: Path) -> None:
    graph = onnx.helper.make_graph([], "g", [], [])
    onnx.save(onnx.helper.make_model(graph), tmp_path / "other.onnx")
    (tmp_path / "text.onnx").write_text("no model")
    for name in ("other.onnx", "text.onnx"):
        with pytest.raises(BadInputError, match="no Silero VAD checkpoint"):
            load_silero_vad(tmp_path / name, name="vad", reference="vad")
    assert SileroVad().cell.hidden.bias is None


class GreyReader(torch.nn.Module):
    """nano-ocr as its package has it: grey pictures, torch's LSTM."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[torch.nn.Module] = []
        for take, give, norm, pool in (
            (1, 64, False, (2, 2, 0)), (64, 128, False, (2, 2, 0)), (128, 256, True, None),
            (256, 256, False, ((2, 2), (2, 1), (0, 1))), (256, 512, True, ((2, 2), (2, 1), (0, 1))),
        ):  # fmt: skip
            layers.append(torch.nn.Conv2d(take, give, 3, padding=1))
            layers += [torch.nn.BatchNorm2d(give)] * norm + [torch.nn.ReLU()]
            layers += [] if pool is None else [torch.nn.MaxPool2d(*pool)]
        layers += [torch.nn.Conv2d(512, 512, 2), torch.nn.BatchNorm2d(512), torch.nn.ReLU()]
        self.cnn = torch.nn.Sequential(*layers)
        self.rnn = torch.nn.LSTM(512, 256, bidirectional=True, batch_first=True)
        self.fc = torch.nn.Linear(512, 66)

    def forward(self, grey: torch.Tensor) -> torch.Tensor:
        steps = self.cnn(grey).squeeze(2).permute(0, 2, 1)
        scores: torch.Tensor = self.fc(self.rnn(steps)[0])
        return scores


def test_words_are_read_as_the_package_reads_them(tmp_path: Path) -> None:
    torch.manual_seed(0)
    reader = GreyReader().eval()
    for name, value in reader.named_parameters():  # so large that pictures make a difference
        if value.dim() > 1:
            torch.nn.init.normal_(value, std=1.5 / value[0].numel() ** 0.5 if "cnn" in name else 0.3)
    torch.save(reader.state_dict(), tmp_path / "ocr.pth")
    model = load_nano_ocr(tmp_path / "ocr.pth", name="ocr", reference="ocr")
    random = np.random.default_rng(0)
    expected = []
    for index in range(3):
        pixels = random.integers(0, 256, (4, 16, 3), dtype=np.uint8).repeat(8, axis=0).repeat(8, axis=1)
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
        grey = pixels @ np.array([0.299, 0.587, 0.114]) / 255
        with torch.no_grad():
            scores = reader(torch.from_numpy(((grey - 0.5) / 0.5)[None, None].astype(np.float32)))[0]
        text, last = "", 0
        for best in scores.argmax(-1).tolist():
            if best not in (0, last):
                text += CHARACTERS[best - 1]
            last = best
        expected.append(text)
    assert len(set(expected)) == 3
    original = of_model(model)
    rows = [{"path": f"{index}.png", "text": text + "!"} for index, text in enumerate(expected)]
    found = evaluate(write_suite(tmp_path, "text_recognition", rows), original, original)
    assert sorted(found.original_answers or ()) == sorted(expected)
    wrong = sorted(1 / (len(text) + 1) for text in expected)
    assert sorted(score for score in found.original_scores if score is not None) == pytest.approx(wrong)
    (tmp_path / "0.png").write_bytes(b"no picture")
    with pytest.raises(BadInputError, match="can't be read"):
        evaluate(str(tmp_path / "mine.toml"), original, original)


SENTENCES = ["the cat is in the hat", "a hat was on the mat", "of all the cats this is the fattest"]


@pytest.fixture(scope="module")
def llama(tiny_model: Any) -> Any:
    return load_model(str(tiny_model("llama")), task="text-generation")


def test_kept_answers_give_the_same_scores(llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = of_model(llama)
    path = write_suite(tmp_path, "next_word", [{"text": text} for text in SENTENCES])
    plain = evaluate(path, original, original)
    answers = remember(original, 24, lambda one, other: evaluate(path, one, other))
    write_answers(answers, tmp_path / "answers.npz")
    first = (tmp_path / "answers.npz").read_bytes()
    write_answers(dict(reversed(answers.items())), tmp_path / "answers.npz")
    assert (tmp_path / "answers.npz").read_bytes() == first
    kept = read_answers(tmp_path / "answers.npz")
    monkeypatch.setattr(TorchSession, "run", None)  # the original can't be asked any more
    assert evaluate(path, Remembered(original, 24, kept), Remembered(original, 24, kept)) == plain
    (tmp_path / "answers.npz").write_bytes(first[:50])
    with pytest.raises(BadInputError, match="can't be read"):
        read_answers(tmp_path / "answers.npz")


def test_the_original_is_asked_once_for_all_its_files(
    llama: Any, tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = of_model(llama)
    asked: list[str] = []
    run = TorchSession.run

    def counted(self: TorchSession, inputs: Any) -> Any:
        asked.append("original")
        return run(self, inputs)

    monkeypatch.setattr(TorchSession, "run", counted)
    path = write_suite(tmp_path, "language_modelling", [{"text": text} for text in SENTENCES])
    file = lower(for_generation(llama, 32), TARGET, FP32, tmp_path)
    files = [of_artifact(file, traits_of(llama)) for _ in range(2)]
    key = model_key(llama)
    scores = [suites._score(path, original, file, key, False, frozenset(), Silent()) for file in files]
    assert len(asked) == len(SENTENCES)
    assert scores[0] == scores[1]
    assert scores[0].artifact_scores == pytest.approx(scores[0].original_scores, rel=1e-5)
    suites._score(path, original, files[0], "another model", False, frozenset(), Silent())
    assert len(asked) == 2 * len(SENTENCES)
