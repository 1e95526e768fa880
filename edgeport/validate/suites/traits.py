"""What is known of a model that suites are asked of: its task, and how texts, pictures and recordings reach it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeport.data.text import open_tokenizer
from edgeport.errors import BadInputError
from edgeport.model.tokenizer import end_tokens
from edgeport.model.types import ImagePreprocessing
from edgeport.runtime.transcript import SETTINGS, transcript_start
from edgeport.storage import read_json

if TYPE_CHECKING:
    from edgeport.model.types import Model

EMBEDDING_TASKS = ("feature-extraction", "sentence-similarity")


VOICE_TASK, READING_TASK, SPEECH_TASK = "audio-frame-classification", "image-to-text", "automatic-speech-recognition"


@dataclass(frozen=True)
class Transcript:
    """How a transcript is written.

    Attributes:
        start: tokens that it begins with.
        stop: tokens that end it.
        never, never_first: tokens that are not written at all, and not as the first one.
    """

    start: tuple[int, ...]
    stop: frozenset[int]
    never: tuple[int, ...] = ()
    never_first: tuple[int, ...] = ()


@dataclass(frozen=True)
class Traits:
    """What both models have in common.

    Attributes:
        task: optimum's task name.
        tokenizer: tokenizer.json, None without one.
        labels: class names of a classifier.
        padding: id of the padding token.
        transcript: of a model that writes recordings down; None for others.
        features: shape (bins, frames) of what it is given.
    """

    task: str
    tokenizer: Path | None
    image: ImagePreprocessing | None = None
    labels: tuple[str, ...] = ()
    padding: int = 0
    transcript: Transcript | None = None
    features: tuple[int, int] = (0, 0)

    @property
    def hears_speech(self) -> bool:
        """It says of each frame of a recording how likely somebody speaks, and hands a state on to the next."""
        return self.task == VOICE_TASK

    @property
    def reads_pictures(self) -> bool:
        """It has scores of characters for the columns of a picture (CTC), the first of them of none."""
        return self.task == READING_TASK and self.image is not None and self.labels[:1] == ("",)

    @property
    def embeds(self) -> bool:
        """It gives a vector for a text."""
        return self.task in EMBEDDING_TASKS

    @property
    def predicts_tokens(self) -> bool:
        """It is a causal language model."""
        return self.task.removesuffix("-with-past") == "text-generation"

    @property
    def classifies_texts(self) -> bool:
        """It has classes of its own for texts."""
        return self.task == "text-classification"

    @property
    def classifies_pictures(self) -> bool:
        """It has classes for pictures, and says how these are prepared."""
        return self.task == "image-classification" and self.image is not None


def traits_of(model: Model) -> Traits:
    """What is known of a loaded model."""
    padding = getattr(getattr(model.module, "config", None), "pad_token_id", None)
    traits = Traits(model.task, model.assets.get("tokenizer.json"), model.image, model.labels, int(padding or 0))
    if model.task.removesuffix("-with-past") != SPEECH_TASK or traits.tokenizer is None or not _writes(model):
        return traits
    (_, bins, frames) = model.inputs[0].fixed_shape()
    return replace(traits, transcript=_transcript(model, traits.tokenizer), features=(bins, frames))


def _writes(model: Model) -> bool:
    """It takes Whisper's features, and a text that it goes on with."""
    return [spec.name for spec in model.inputs] == ["input_features", "decoder_input_ids"]


def _transcript(model: Model, tokenizer: Path) -> Transcript | None:
    """None where the tokenizer lacks the tokens that a transcript begins with."""
    path = model.assets.get(SETTINGS)
    settings: Mapping[str, Any] = read_json(path) if path is not None else {}
    config: Any = getattr(model.module, "config", None)
    begin = settings.get("decoder_start_token_id", config.decoder_start_token_id)
    known = open_tokenizer(tokenizer, 1).get_vocab()
    try:
        start = transcript_start(known, settings, (begin,))
    except BadInputError:
        return None
    return Transcript(
        start=tuple(start),
        stop=end_tokens(path, config.eos_token_id),
        never=tuple(settings.get("suppress_tokens") or ()),
        never_first=tuple(settings.get("begin_suppress_tokens") or ()),
    )
