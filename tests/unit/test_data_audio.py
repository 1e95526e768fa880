"""Recordings: windows stay in their slice, and become what transformers' feature extractors make."""

from __future__ import annotations

import wave
from pathlib import Path

import numpy as np
import pytest

from edgeport.data.audio import RATE, cut, read_recording, standardize, whisper_features, window_starts
from edgeport.data.cards import load_card
from edgeport.data.text import text_between
from edgeport.errors import BadInputError


def write_wav(path: Path, samples: np.ndarray, rate: int = RATE, channels: int = 1) -> None:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.astype("<i2").tobytes())


def test_a_recording_is_read_as_fractions_of_full_scale(tmp_path: Path) -> None:
    write_wav(tmp_path / "a.wav", np.asarray([0, 16384, -32768, 32767]))
    assert read_recording(tmp_path / "a.wav").tolist() == [0.0, 0.5, -1.0, 32767 / 32768]


def test_other_recordings_are_refused(tmp_path: Path) -> None:
    write_wav(tmp_path / "a.wav", np.zeros(8), rate=8000)
    with pytest.raises(BadInputError, match="8000 Hz"):
        read_recording(tmp_path / "a.wav")
    write_wav(tmp_path / "b.wav", np.zeros(8), channels=2)
    with pytest.raises(BadInputError, match="2 channels"):
        read_recording(tmp_path / "b.wav")
    (tmp_path / "c.wav").write_bytes(b"RIFF")
    with pytest.raises(BadInputError, match="can't be read"):
        read_recording(tmp_path / "c.wav")


@pytest.mark.parametrize("seconds", [1.0, 5.0])
def test_windows_of_the_two_slices_share_no_sample(seconds: float) -> None:
    card = load_card("conversation")
    spans = {}
    for split in ("parity", "calibration"):
        starts = window_starts(card, split, seconds)
        assert len(starts) >= 8
        assert starts[0] == card.slice(split).start
        assert starts[-1] + seconds <= card.slice(split).stop
        spans[split] = (starts[0], starts[-1] + seconds)
    assert spans["parity"][1] <= spans["calibration"][0] or spans["calibration"][1] <= spans["parity"][0]
    assert window_starts(card, "parity", 100.0) == []


def test_windows_are_padded_with_silence_at_the_end() -> None:
    recording = np.arange(RATE, dtype=np.float32)
    assert cut(recording, 0.5, 4).tolist() == [8000, 8001, 8002, 8003]
    assert cut(recording, 1.0 - 2 / RATE, 4).tolist() == [RATE - 2, RATE - 1, 0, 0]


def test_standardizing_equals_wav2vec2s_feature_extractor() -> None:
    from transformers import Wav2Vec2FeatureExtractor

    window = np.random.default_rng(0).normal(0.3, 2.0, 3000).astype(np.float32)
    extractor = Wav2Vec2FeatureExtractor(do_normalize=True)
    expected = extractor(window, sampling_rate=RATE, return_tensors="np")["input_values"][0]
    np.testing.assert_allclose(standardize(window), expected, rtol=1e-5, atol=1e-6)


def test_a_tone_stands_in_its_own_mel_bin_and_silence_is_flat() -> None:
    time = np.arange(RATE) / RATE
    low = whisper_features(np.sin(2 * np.pi * 300 * time).astype(np.float32), bins=80, frames=100)
    high = whisper_features(np.sin(2 * np.pi * 3000 * time).astype(np.float32), bins=80, frames=100)
    assert low.shape == (80, 100)
    assert low.dtype == np.float32
    assert low[:, 50].argmax() < 15 < 50 < high[:, 50].argmax()
    silent = whisper_features(np.zeros(RATE, np.float32), bins=80, frames=200)
    assert silent.shape == (80, 200)
    assert np.ptp(silent) == 0


def test_the_words_between_two_times(tmp_path: Path) -> None:
    path = tmp_path / "a.stm"
    path.write_text(";; a comment\nrec 1 A 0.0 1.0 Hello there.\nrec 1 B 1.0 2.0 Good day.\nrec 1 A 4.0 9.0 Late.\n")
    assert text_between(path, 0.0, 2.0) == "Hello there. Good day."
    assert text_between(path, 0.9, 2.0) == "Good day."
    assert text_between(path, 2.0, 4.0) == ""
