"""Texts out of an encoder-decoder: a recording written down, a text answered by another."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeport.data.audio import HOP, RATE, read_recording, whisper_features
from edgeport.errors import BadInputError
from edgeport.runtime.conversation import open_texts
from edgeport.runtime.generate import Generation, Sampling, generate
from edgeport.runtime.session import open_encoded
from edgeport.storage import read_json

if TYPE_CHECKING:
    import numpy as np

    from edgeport.export.artifact import Artifact
    from edgeport.model.types import TensorSpec

SETTINGS = "generation_config.json"


class Transcriber:
    """A loaded encoder-decoder with its tokenizer.

    Attributes:
        start: tokens that every text begins with.
        settings: what the checkpoint says about generating. Tokens that it rules out (`suppress_tokens`,
            `begin_suppress_tokens`) are never written.

    Args:
        assets: the folder of the tokenizer and of generation_config.json.
        speech: the model takes recordings as Whisper does, not texts.
        threads: of the runtime.

    Raises:
        BadInputError: a file is missing or damaged, or the artifact has no encoder or no cache.
    """

    def __init__(self, artifact: Artifact, assets: Path, *, speech: bool, sampling: Sampling, threads: int = 1) -> None:
        self.tokens, self.texts = open_encoded(artifact, threads=threads), open_texts(assets)
        assert artifact.encoder is not None
        self.start, (self.spec,) = artifact.encoder.start, artifact.encoder.inputs
        self.speech, self.sampling = speech, sampling
        path = assets / SETTINGS
        self.settings: Mapping[str, Any] = read_json(path) if path.is_file() else {}

    def answer(
        self,
        most: int,
        show: Callable[[str], None],
        *,
        text: str | None = None,
        audio: Path | None = None,
        language: str | None = None,
    ) -> Generation:
        """Write a text for another, or for a recording, and call `show` with each piece.

        Args:
            most: new tokens at most.
            language: of the recording, such as "de"; None takes English.

        Raises:
            BadInputError: the model takes the other of the two, the input does not fit it, or it does not know the
                language.
        """
        if self.speech and (audio is None or text is not None):
            raise BadInputError("The model writes recordings down.", where="PROMPT", allowed="--audio FILE.wav")
        if self.speech and audio is not None:
            return self.write(speech_features(audio, self.spec), self.speech_start(language), most, show)
        if text is None or audio is not None or language is not None:
            raise BadInputError("The model answers texts.", where="--audio", allowed="a PROMPT, and no recording")
        return self.write(self.texts.ids(text)[None], list(self.start), most, show)

    def write(self, source: np.ndarray, start: list[int], most: int, show: Callable[[str], None]) -> Generation:
        """Encode a source, batch 1, and write a text that begins with `start`, which is not shown.

        Raises:
            BadInputError: the source does not fit the encoder, or the start the cache.
        """
        import numpy as np

        began = time.perf_counter()
        self.tokens.encode(source)
        seconds = time.perf_counter() - began
        record, new = generate(
            self.tokens,
            np.array(start, np.int64),
            most=most,
            stop=self.texts.stop,
            sampling=self.sampling,
            never=self.settings.get("suppress_tokens") or (),
            never_first=self.settings.get("begin_suppress_tokens") or (),
        )
        record.encoder_seconds = seconds
        for piece in self.texts.stream(new):
            show(piece)
        return record

    def speech_start(self, language: str | None = None) -> list[int]:
        """The tokens that a Whisper transcript begins with: start, language and task where it knows several, and that
        there are no timestamps.

        Raises:
            BadInputError: the model does not know the language.
        """
        return transcript_start(self.texts.tokenizer.get_vocab(), self.settings, self.start, language)


def transcript_start(
    known: Mapping[str, int], settings: Mapping[str, Any], start: Sequence[int], language: str | None = None
) -> list[int]:
    """The tokens that a Whisper transcript begins with.

    Args:
        known: the tokenizer's vocabulary.
        settings: generation_config.json.
        start: tokens that every text of the model begins with.

    Raises:
        BadInputError: the model does not know the language.
    """
    wanted = ["<|notimestamps|>"]
    if settings.get("is_multilingual"):
        wanted = [f"<|{language or 'en'}|>", "<|transcribe|>", *wanted]
    elif language not in (None, "en"):
        raise BadInputError("The model knows English only.", where="--language", allowed="en")
    missing = [token for token in wanted if token not in known]
    if missing:
        raise BadInputError(f"The tokenizer does not know {missing[0]}.", where="--language", allowed="en, de, ...")
    return [*start, *(known[token] for token in wanted)]


def speech_features(path: Path, spec: TensorSpec) -> np.ndarray:
    """A recording as Whisper's encoder takes it, float32 (1, bins, frames).

    Raises:
        BadInputError: it can't be read, or is longer than what the encoder takes.
    """
    if not path.is_file():
        raise BadInputError("There is no such recording.", where=path)
    _, bins, frames = spec.fixed_shape()
    samples = read_recording(path)
    if len(samples) > frames * HOP:
        raise BadInputError(
            f"The recording has {len(samples) / RATE:.1f} s; the model reads {frames * HOP / RATE:g} s at once.",
            where=path,
            next_step="Cut it into pieces, at pauses.",
        )
    features: np.ndarray = whisper_features(samples, bins=bins, frames=frames)[None]
    return features
