"""Windows of a card's recording, and how they become a model's input."""

from __future__ import annotations

import math
import wave
from dataclasses import dataclass
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


def read_speech(path: Path) -> np.ndarray:
    """A 16-bit WAV file of any rate and number of channels as float32 in [-1, 1), mono at 16 kHz, shape (samples,).

    Raises:
        BadInputError: it is something else, or empty.
    """
    from scipy.signal import resample_poly  # type: ignore[import-untyped]

    try:
        with wave.open(str(path), "rb") as file:
            channels, width, rate = file.getnchannels(), file.getsampwidth(), file.getframerate()
            data = file.readframes(file.getnframes())
    except (wave.Error, EOFError, OSError) as error:
        raise BadInputError(f"The recording can't be read: {error}.", where=path.name, allowed="a WAV file") from error
    if width != 2 or not data:
        raise BadInputError(
            f"The recording has {8 * width} bits and {len(data)} bytes.", where=path.name, allowed="16 bits, not empty"
        )
    samples = np.frombuffer(data, "<i2").reshape(-1, channels).mean(axis=1) / 32768
    if rate != RATE:
        common = math.gcd(rate, RATE)
        samples = resample_poly(samples, RATE // common, rate // common)
    return np.asarray(samples, np.float32)


@dataclass(frozen=True)
class Recording:
    """Sound put together: files one after the other, silence between them, and noise over all of it.

    Attributes:
        pieces: WAV files.
        pauses: seconds of silence before each piece, and after the last; none where it is empty.
        noise_db: how far the noise lies below the pieces (both by their power); None for no noise.
        seed: of the noise, which is pink: its power falls with the frequency, as that of rooms and streets does.
    """

    pieces: tuple[Path, ...]
    pauses: tuple[float, ...] = ()
    noise_db: float | None = None
    seed: int = 0

    def clean(self) -> np.ndarray:
        """The pieces and pauses alone, float32 (samples,), at 16 kHz.

        Raises:
            BadInputError: a file can't be read.
        """
        gaps = [np.zeros(round(seconds * RATE), np.float32) for seconds in self.pauses or (0.0,) * len(self.pieces)]
        found: list[np.ndarray] = []
        for gap, piece in zip(gaps, self.pieces, strict=False):
            found += [gap, read_speech(piece)]
        return np.concatenate([*found, *gaps[len(self.pieces) :]])

    def samples(self) -> np.ndarray:
        """All of it, float32 (samples,), at 16 kHz.

        Raises:
            BadInputError: a file can't be read.
        """
        clean = self.clean()
        if self.noise_db is None:
            return clean
        loud = clean[clean != 0]
        power = float(np.square(loud).mean()) / 10 ** (self.noise_db / 10)
        noise = pink_noise(len(clean), self.seed)
        mixed: np.ndarray = clean + noise * np.float32(math.sqrt(power))
        return mixed / max(1.0, float(np.abs(mixed).max()))


def pink_noise(length: int, seed: int) -> np.ndarray:
    """Noise of power 1 whose power falls as one over the frequency, float32 (length,)."""
    generator = np.random.default_rng(seed)
    spectrum = np.fft.rfft(generator.standard_normal(length))
    spectrum[1:] /= np.sqrt(np.arange(1, len(spectrum)))
    spectrum[0] = 0
    noise = np.fft.irfft(spectrum, length)
    return np.asarray(noise / np.sqrt(np.square(noise).mean()), np.float32)


SPEECH_FRAME = 512  # samples, 32 ms
SPEECH_FLOOR_DB = 35.0
SHORTEST_PAUSE = 3  # frames


def speech_intervals(clean: np.ndarray) -> list[tuple[float, float]]:
    """When somebody speaks in a recording without noise, seconds: where it is not SPEECH_FLOOR_DB below its loud parts.

    Args:
        clean: float32 (samples,), at 16 kHz.
    """
    frames = clean[: len(clean) // SPEECH_FRAME * SPEECH_FRAME].reshape(-1, SPEECH_FRAME)
    power = np.square(frames.astype(np.float64)).mean(axis=1)
    spoken = power > np.quantile(power[power > 0], 0.95) / 10 ** (SPEECH_FLOOR_DB / 10) if power.any() else power > 0
    found: list[list[int]] = []
    for index in np.flatnonzero(spoken).tolist():
        if found and index - found[-1][1] < SHORTEST_PAUSE:
            found[-1][1] = index + 1
        else:
            found.append([index, index + 1])
    return [(start * SPEECH_FRAME / RATE, stop * SPEECH_FRAME / RATE) for start, stop in found]


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
