"""Windows of a card's recording, and how they become a model's input."""

from __future__ import annotations

import math
import wave
from pathlib import Path
from typing import Any

import numpy as np

from edgeport.data.cards import Card, Split
from edgeport.errors import BadInputError

RATE = 16_000  # samples a second, of every speech model here
HOP = 160  # samples between two of Whisper's frames


def read_recording(path: Path) -> np.ndarray:
    """A 16-bit mono WAV file at 16 kHz as float32 in [-1, 1), shape (samples,).

    Raises:
        BadInputError: it is something else.
    """
    try:
        with wave.open(str(path), "rb") as file:
            form = (file.getnchannels(), file.getsampwidth(), file.getframerate())
            data = file.readframes(file.getnframes())
    except (wave.Error, EOFError) as error:
        raise BadInputError(f"The recording can't be read: {error}.", where=path.name) from error
    if form != (1, 2, RATE):
        raise BadInputError(
            f"The recording has {form[0]} channels, {8 * form[1]} bits, {form[2]} Hz.",
            where=path.name,
            allowed="1 channel, 16 bits, 16000 Hz",
        )
    return np.frombuffer(data, "<i2").astype(np.float32) / 32768


def window_starts(card: Card, split: Split, seconds: float) -> list[float]:
    """Where the windows of a slice begin, seconds; none reaches beyond the slice."""
    assert card.audio is not None
    part = card.slice(split)
    count = math.floor((part.stop - part.start - seconds) / card.audio.hop_seconds) + 1
    return [part.start + index * card.audio.hop_seconds for index in range(max(count, 0))]


def cut(recording: np.ndarray, start: float, samples: int) -> np.ndarray:
    """A window of exactly `samples` samples, padded with silence at the recording's end."""
    begin = round(start * RATE)
    window = recording[begin : begin + samples]
    return np.pad(window, (0, samples - len(window)))


def standardize(window: np.ndarray) -> np.ndarray:
    """Zero mean and unit variance, as wav2vec 2.0's feature extractor does."""
    result: np.ndarray = (window - window.mean()) / np.sqrt(window.var() + 1e-7)
    return result.astype(np.float32)


def whisper_features(window: np.ndarray, *, bins: int, frames: int) -> np.ndarray:
    """Whisper's log-mel spectrogram, shape (bins, frames), of a window padded with silence to `frames` frames.

    Radford et al. 2022 (https://arxiv.org/abs/2212.04356), section 2.2, as transformers computes it.
    """
    from transformers import WhisperFeatureExtractor

    seconds = math.ceil(frames * HOP / RATE)
    extractor: Any = WhisperFeatureExtractor(feature_size=bins, chunk_length=seconds, hop_length=HOP)
    features = extractor(window, sampling_rate=RATE, return_tensors="np")["input_features"][0]
    result: np.ndarray = features[:, :frames].astype(np.float32)
    return result
