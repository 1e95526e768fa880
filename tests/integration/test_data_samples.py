"""Samples for tiny models from data made here: real where it fits, random and saying so where not."""

from __future__ import annotations

import hashlib
import json
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as T
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from edgeport.data.cards import Card
from edgeport.data.samples import Samples, samples
from edgeport.errors import BadInputError
from edgeport.model.load import load_model
from edgeport.model.types import Model
from edgeport.schema import parse_mapping

WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *(f"word{index}" for index in range(60))]
SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
SPLITS = {"parity": {"start": 10, "stop": 20}, "calibration": {"start": 0, "stop": 10}}


def make_card(cache: Path, kind: str, members: dict[str, bytes], **extra: Any) -> Card:
    """A card whose members already lie in the cache."""
    folder = cache / "packages" / "toy-1.0"
    for name, data in members.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in members.items()}
    package = {"name": "toy", "version": "1.0", "sha256": "0" * 64, "size_mb": 1, "members": hashes}
    value = {"name": "toy", "title": "Toy", "kind": kind, "licence": "CC0-1.0", "source": "made", "splits": SPLITS}
    return parse_mapping(Card, {**value, "package": package, **extra}, "toy.toml")


def write_tokenizer(path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    # As real files do, it carries truncation and padding of its own, which must not count.
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=50)
    tokenizer.save(str(path))


@pytest.fixture
def texts(own_cache: Path) -> Card:
    """Row r of file f is "word<r> word<40 + f> word<r> ..." of 2 + r words, r = 0 ... 19."""

    def lines(file: int) -> bytes:
        rows = [" ".join([f"word{row}", f"word{40 + file}"] + [f"word{row}"] * row) for row in range(20)]
        return "\n".join(json.dumps({"0": text, "1": "shuffled"}) for text in rows).encode()

    return make_card(own_cache, "text", {"a.jsonl": lines(0), "b.jsonl": lines(1)}, unit="rows", text={"key": "0"})


def bert(folder: Path, vocabulary: int = 64) -> Model:
    config = T.BertConfig(**SMALL, vocab_size=vocabulary, max_position_embeddings=40)
    T.BertModel(config).save_pretrained(folder)
    write_tokenizer(folder / "tokenizer.json")
    return load_model(str(folder))


def words_of(found: Samples) -> set[int]:
    """The rows that the samples came from."""
    return {int(call["input_ids"][0, 1]) - 4 for call in found.inputs}


def test_texts_are_tokenized_with_the_models_own_tokenizer(tmp_path: Path, texts: Card) -> None:
    model = bert(tmp_path / "m")
    found = samples(model, count=20, split="parity", card=texts)
    assert (found.record.name, found.record.real, found.record.samples) == ("toy", True, 20)
    assert found.record.sha256 == texts.package.members
    assert "rows 10 to 20" in found.record.slice
    assert words_of(found) == set(range(10, 20))
    for call in found.inputs:
        row = int(call["input_ids"][0, 1]) - 4
        file = int(call["input_ids"][0, 2]) - 44
        assert call["input_ids"].tolist() == [[1, row + 4, 44 + file, *[row + 4] * row, 2]]
        assert call["input_ids"].dtype == np.int64
        assert call["attention_mask"].tolist() == [[1] * (row + 4)]
        assert call["token_type_ids"].tolist() == [[0] * (row + 4)]
        assert model.module(**{name: torch.from_numpy(value) for name, value in call.items()})


def test_the_two_splits_never_share_a_row_and_the_seed_chooses(tmp_path: Path, texts: Card) -> None:
    model = bert(tmp_path / "m")
    parity = samples(model, count=99, split="parity", card=texts)
    calibration = samples(model, count=99, split="calibration", card=texts)
    assert len(parity.inputs) == parity.record.samples == 20
    assert words_of(calibration) == set(range(10))
    first, again, other = (samples(model, count=5, split="parity", seed=s, card=texts) for s in (1, 1, 2))
    for a, b in zip(first.inputs, again.inputs, strict=True):
        assert all(np.array_equal(a[name], b[name]) for name in a)
    assert [call["input_ids"].tolist() for call in first.inputs] != [
        call["input_ids"].tolist() for call in other.inputs
    ]


@pytest.mark.parametrize("length", [16, 40])
def test_a_fixed_length_pads_with_mask_zero_and_truncates_keeping_the_end_token(
    tmp_path: Path, texts: Card, length: int
) -> None:
    found = samples(bert(tmp_path / "m"), count=20, split="parity", sequence=length, card=texts)
    padded = 0
    for call in found.inputs:
        assert {value.shape for value in call.values()} == {(1, length)}
        kept = int(call["attention_mask"].sum())
        assert call["attention_mask"].tolist() == [[1] * kept + [0] * (length - kept)]
        assert call["input_ids"][0, kept - 1] == 2
        assert not call["input_ids"][0, kept:].any()
        padded += kept < length
    assert padded > 0


def test_lengths_outside_the_models_range_are_refused(tmp_path: Path, texts: Card) -> None:
    model = bert(tmp_path / "m")
    for length in (0, 41):
        with pytest.raises(BadInputError, match=f"can't take a sequence of {length}") as caught:
            samples(model, count=1, split="parity", sequence=length, card=texts)
        assert caught.value.allowed == "1 to 40"
    with pytest.raises(BadInputError, match="At least one sample"):
        samples(model, count=0, split="parity", card=texts)


def test_decoders_get_the_text_behind_their_start_token(tmp_path: Path, texts: Card) -> None:
    config = T.T5Config(
        d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=2, vocab_size=64, decoder_start_token_id=5, pad_token_id=0
    )
    T.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    write_tokenizer(tmp_path / "t5" / "tokenizer.json")
    model = load_model(str(tmp_path / "t5"))
    for call in samples(model, count=4, split="parity", card=texts).inputs:
        assert call["decoder_input_ids"][0].tolist() == [5, *call["input_ids"][0].tolist()][:32]
    for call in samples(model, count=4, split="parity", sequence=24, card=texts).inputs:
        assert call["decoder_input_ids"].shape == (1, 32)


def test_random_tokens_where_there_is_no_tokenizer_or_it_does_not_fit(tmp_path: Path, texts: Card) -> None:
    small = bert(tmp_path / "small", vocabulary=50)
    found = samples(small, count=30, split="parity", card=texts)
    assert (found.record.name, found.record.real, found.record.samples) == ("synthetic", False, 30)
    assert found.record.sha256 == {}
    assert "more tokens than the model's 50" in found.record.slice
    ids = np.concatenate([call["input_ids"][0] for call in found.inputs])
    assert ids.min() >= 0
    assert ids.max() == 49
    assert len({call["input_ids"].shape for call in found.inputs}) > 1

    (tmp_path / "small" / "tokenizer.json").unlink()
    bare = load_model(str(tmp_path / "small"))
    parity = samples(bare, count=2, split="parity", sequence=8)
    assert "without a tokenizer" in parity.record.slice
    assert parity.inputs[0]["input_ids"].shape == (1, 8)
    calibration = samples(bare, count=2, split="calibration", sequence=8)
    assert not np.array_equal(parity.inputs[0]["input_ids"], calibration.inputs[0]["input_ids"])


def test_a_damaged_tokenizer_is_an_error_not_a_reason_for_random_input(tmp_path: Path, texts: Card) -> None:
    model = bert(tmp_path / "m")
    (tmp_path / "m" / "tokenizer.json").write_text("{")
    with pytest.raises(BadInputError, match="tokenizer can't be read"):
        samples(model, count=1, split="parity", card=texts)


def jpeg_free_png(value: int) -> bytes:
    import io

    buffer = io.BytesIO()
    pixels = np.zeros((40, 40, 3), np.uint8)
    pixels[:, :20] = value  # left half
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def test_pictures_are_preprocessed_labelled_and_mirrored_when_they_run_out(tmp_path: Path, own_cache: Path) -> None:
    members = {f"p/pic_{index:02d}_{index + 100}.png": jpeg_free_png(10 * index) for index in range(20)}
    card = make_card(own_cache, "image", members, unit="pictures", image={"label_pattern": r"pic_[0-9]+_([0-9]+)\.png"})
    T.ViTForImageClassification(T.ViTConfig(**SMALL, image_size=32, patch_size=8)).save_pretrained(tmp_path / "vit")
    T.ViTImageProcessorPil(size={"height": 32, "width": 32}, image_mean=[0] * 3, image_std=[1] * 3).save_pretrained(
        tmp_path / "vit"
    )
    model = load_model(str(tmp_path / "vit"))
    found = samples(model, count=15, split="parity", card=card)
    assert found.record.real
    assert sorted(found.labels[:10]) == list(range(110, 120))
    assert found.labels[10:] == found.labels[:5]
    for call, label in zip(found.inputs[:10], found.labels[:10], strict=True):
        assert call["pixel_values"].shape == (1, 3, 32, 32)
        np.testing.assert_allclose(call["pixel_values"][0, :, 16, 2], 10 * (label - 100) / 255, atol=1e-6)
        np.testing.assert_allclose(call["pixel_values"][0, :, 16, -2], 0, atol=1e-6)
    for plain, mirrored in zip(found.inputs[:5], found.inputs[10:], strict=True):
        assert np.array_equal(plain["pixel_values"], mirrored["pixel_values"][..., ::-1])
    assert "mirror images of 5" in found.record.slice
    with pytest.raises(BadInputError, match="The data is image, the model takes text"):
        samples(bert(tmp_path / "bert"), count=1, split="parity", card=card)


def test_without_a_preprocessing_config_pictures_are_random_and_say_so(tmp_path: Path, own_cache: Path) -> None:
    T.ViTForImageClassification(T.ViTConfig(**SMALL, image_size=32, patch_size=8)).save_pretrained(tmp_path / "vit")
    found = samples(load_model(str(tmp_path / "vit")), count=3, split="parity")
    assert not found.record.real
    assert "how pictures are prepared" in found.record.slice
    assert [call["pixel_values"].shape for call in found.inputs] == [(1, 3, 32, 32)] * 3


def test_speech_windows_for_wav2vec2_and_for_whisper_with_the_words_spoken(tmp_path: Path, own_cache: Path) -> None:
    import io

    rate, buffer = 16_000, io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(np.random.default_rng(0).integers(-9000, 9000, 20 * rate).astype("<i2").tobytes())
    transcript = "".join(f"rec 1 A {second}.0 {second}.9 word{second}\n" for second in range(20))
    card = make_card(
        own_cache, "audio", {"a.wav": buffer.getvalue(), "a.stm": transcript.encode()}, unit="seconds",
        audio={"recording": "a.wav", "transcript": "a.stm", "window_seconds": 3.0, "hop_seconds": 1.0},
    )  # fmt: skip
    config = T.Wav2Vec2Config(**SMALL, vocab_size=32, conv_dim=(16,) * 7, num_conv_pos_embeddings=16,
                              num_conv_pos_embedding_groups=2)  # fmt: skip
    T.Wav2Vec2ForCTC(config).save_pretrained(tmp_path / "w2v")
    found = samples(load_model(str(tmp_path / "w2v")), count=99, split="parity", card=card)
    assert found.record.real
    assert len(found.inputs) == 10
    for call in found.inputs:
        assert call["input_values"].shape == (1, rate)
        assert abs(float(call["input_values"].mean())) < 1e-4
        assert abs(float(call["input_values"].std()) - 1) < 1e-4

    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
    more = {"decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "vocab_size": 80}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    whisper = T.WhisperConfig(**sizes, **more, **tokens, max_source_positions=200, max_target_positions=12)
    T.WhisperForConditionalGeneration(whisper).save_pretrained(tmp_path / "whisper")
    write_tokenizer(tmp_path / "whisper" / "tokenizer.json")
    tokenizer = Tokenizer.from_file(str(tmp_path / "whisper" / "tokenizer.json"))
    tokenizer.add_special_tokens(["<|startoftranscript|>", "<|notimestamps|>"])
    tokenizer.save(str(tmp_path / "whisper" / "tokenizer.json"))
    model = load_model(str(tmp_path / "whisper"))
    found = samples(model, count=99, split="parity", card=card)
    assert len(found.inputs) == 8  # windows of 3 s in 10 s, one a second
    for call in found.inputs:
        assert call["input_features"].shape == (1, 80, 400)
        prompt, words = call["decoder_input_ids"][0, :2].tolist(), call["decoder_input_ids"][0, 2:].tolist()
        assert prompt == [64, 65]
        assert len(words) == 3
        assert words[1:] == [words[0] + 1, words[0] + 2]
        assert 14 <= words[0] <= 21  # word10 is token 14
        model.module(**{name: torch.from_numpy(value) for name, value in call.items()})
