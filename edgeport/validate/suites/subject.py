"""A model to be asked: the original in torch, or the artifact in its runtime, through the same code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np

from edgeport.data.audio import HOP, RATE, SPEECH_FRAME, whisper_features
from edgeport.data.images import open_image, preprocess_image
from edgeport.data.text import open_tokenizer
from edgeport.errors import BadInputError
from edgeport.model.types import Axis, TensorSpec
from edgeport.runtime.generate import generate
from edgeport.runtime.session import open_session, open_tokens
from edgeport.validate.outputs import SENTENCE_EMBEDDING, with_derived
from edgeport.validate.suites.traits import Traits, traits_of

if TYPE_CHECKING:
    from PIL.Image import Image
    from tokenizers import Tokenizer

    from edgeport.export.artifact import Artifact
    from edgeport.model.types import Model
    from edgeport.runtime.decoder import EncodedTokens, Tokens
    from edgeport.runtime.session import Session


@dataclass(frozen=True)
class Prediction:
    """How a model predicts the tokens of a text's end.

    Attributes:
        logs: log-probability of each token, nats, float64 (n,).
        likeliest: the token that it thinks likeliest in each place, int64 (n,).
        vocabulary: tokens that it chooses from.
        certainty: the probability of the likeliest token in the first place.
    """

    logs: np.ndarray
    likeliest: np.ndarray
    vocabulary: int
    certainty: float


@dataclass(frozen=True)
class Subject:
    """One of the two models.

    Attributes:
        session: answers whole inputs; None for a decoder with a cache, which `tokens` is.
        inputs: as the model or the file has them.
        lengths: the lengths that a text may be padded to, ascending; empty where it may have its own.
    """

    traits: Traits
    session: Session | None
    tokens: Tokens | None
    inputs: tuple[TensorSpec, ...]
    lengths: tuple[int, ...] = ()
    opened: dict[int, Tokenizer] = field(default_factory=dict, repr=False)

    def tokenizer(self, most: int) -> Tokenizer:
        """The tokenizer, cutting at `most` tokens.

        Raises:
            BadInputError: there is none, or it can't be read.
        """
        if self.traits.tokenizer is None:
            raise BadInputError("The model has no tokenizer.json, so that it can't be asked about texts.")
        if most not in self.opened:
            self.opened[most] = open_tokenizer(self.traits.tokenizer, most)
        return self.opened[most]

    def most_tokens(self, wanted: int) -> int:
        """The most tokens of a text: what is wanted, or as many as the model takes.

        Raises:
            BadInputError: it is to write recordings down, and has no cache.
        """
        if self.tokens is not None:
            return min(wanted, self.tokens.context)
        if self.lengths:
            return min(wanted, self.lengths[-1])
        if self.traits.transcript is not None:
            raise BadInputError(
                "The file was exported without a cache: it writes nothing down.",
                where="--suite",
                next_step="Export it again, without --task.",
            )
        return min([wanted, *(size.maximum for size in self.inputs[0].shape[1:] if isinstance(size, Axis))])

    def run_text(self, text: str, most: int) -> dict[str, np.ndarray]:
        """The outputs for one text, with the `sentence_embedding` where the task has one."""
        encoding = self.tokenizer(most).encode(text)
        return self._run(encoding.ids, encoding.attention_mask, encoding.type_ids)

    def embed(self, text: str, most: int) -> np.ndarray:
        """The text's vector, float32 (H,), of length 1."""
        vector: np.ndarray = self.run_text(text, most)[SENTENCE_EMBEDDING][0]
        return vector

    def class_scores(self, text: str, most: int) -> np.ndarray:
        """Scores of a text's classes, float32 (C,)."""
        scores: np.ndarray = self.run_text(text, most)["logits"][0]
        return scores

    def picture_scores(self, path: Path) -> np.ndarray:
        """Scores of the classes, float32 (C,).

        Raises:
            BadInputError: the file is no picture.
        """
        assert self.traits.image is not None
        assert self.session is not None
        values = preprocess_image(open_image(path), self.traits.image)
        outputs = self.session.run({self.inputs[0].name: values})
        scores: np.ndarray = next(iter(outputs.values()))[0]
        return scores

    def characters(self, picture: Image) -> str:
        """What is written on a picture: the likeliest of each column, each run of equal ones once (CTC, best path)."""
        assert self.traits.image is not None
        assert self.session is not None
        outputs = self.session.run({self.inputs[0].name: preprocess_image(picture, self.traits.image)})
        scores = next(iter(outputs.values()))[0]
        if not np.isfinite(scores).all():
            return ""
        best = scores.argmax(axis=1).tolist()
        kept = [best[index] for index in range(len(best)) if index == 0 or best[index] != best[index - 1]]
        return "".join(self.traits.labels[index] for index in kept)

    def speech(self, samples: np.ndarray) -> np.ndarray:
        """How likely somebody speaks in each frame, float32 (frames,); an incomplete last frame is left out.

        Args:
            samples: float32 (samples,), at 16 kHz.
        """
        assert self.session is not None
        sound, state = self.inputs
        (_, length), state_shape = sound.fixed_shape(), state.fixed_shape()
        padded = np.concatenate([np.zeros(length - SPEECH_FRAME, np.float32), samples])
        held = np.zeros(state_shape, np.float32)
        found = []
        for begin in range(0, len(samples) - SPEECH_FRAME + 1, SPEECH_FRAME):
            outputs = self.session.run({sound.name: padded[None, begin : begin + length], state.name: held})
            probability, held = outputs.values()
            found.append(probability.reshape(-1)[0])
        return np.asarray(found, np.float32)

    def transcribe(self, samples: np.ndarray, most: int) -> str:
        """What is said in a recording.

        Args:
            samples: float32 (samples,), at 16 kHz.
            most: new tokens at most.

        Raises:
            BadInputError: the recording is longer than what the model takes.
        """
        how = self.traits.transcript
        assert how is not None
        bins, frames = self.traits.features
        if len(samples) > frames * HOP:
            raise BadInputError(
                f"A recording has {len(samples) / RATE:.1f} s; the model reads {frames * HOP / RATE:g} s at once.",
                where="--suite",
                next_step="Cut it into pieces, at pauses.",
            )
        encoded = cast("EncodedTokens", self.tokens)
        encoded.encode(whisper_features(samples, bins=bins, frames=frames)[None])
        _, new = generate(
            encoded,
            np.asarray(how.start, np.int64),
            most=most - len(how.start),
            stop=how.stop,
            never=how.never,
            never_first=how.never_first,
        )
        text: str = self.tokenizer(most).decode(list(new), skip_special_tokens=True)
        return text

    def predictions(self, prefix: Sequence[int], ends: Sequence[Sequence[int]]) -> list[Prediction]:
        """How each token of each end is predicted, after the same prefix.

        Args:
            prefix: token ids, one at least; ends: one id at least each.
        """
        from scipy.special import log_softmax  # type: ignore[import-untyped]

        found = []
        for end, logits in zip(ends, self.continuations(prefix, ends), strict=True):
            logs = log_softmax(logits.astype(np.float64), axis=1)
            wanted, certainty = logs[np.arange(len(end)), end], float(np.exp(logs[0].max()))
            found.append(Prediction(wanted, logits.argmax(axis=1), logits.shape[1], certainty))
        return found

    def continuations(self, prefix: Sequence[int], ends: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """The scores from which each token of each end is predicted, after the same prefix.

        Args:
            prefix: token ids, one at least; ends: one id at least each.

        Returns:
            For each end logits, float32 (tokens of the end, V).
        """
        if self.tokens is None:
            return [self._scores([*prefix, *end])[len(prefix) - 1 : len(prefix) + len(end) - 1] for end in ends]
        self.tokens.rewind()
        first = self.tokens.feed(np.asarray(prefix, np.int64)).copy()
        found = []
        for end in ends:
            self.tokens.rewind(len(prefix))
            rest = [self.tokens.feed(np.asarray([token], np.int64)).copy() for token in end[:-1]]
            found.append(np.stack([first, *rest]))
        return found

    def _scores(self, ids: Sequence[int]) -> np.ndarray:
        outputs = self._run(ids, [1] * len(ids), [0] * len(ids))
        scores: np.ndarray = outputs["logits"][0]
        return scores

    def _run(self, ids: Sequence[int], mask: Sequence[int], kinds: Sequence[int]) -> dict[str, np.ndarray]:
        assert self.session is not None
        size = next((length for length in self.lengths if length >= len(ids)), len(ids))
        arrays: Mapping[str, np.ndarray] = {
            "input_ids": _row(ids, size, self.traits.padding),
            "attention_mask": _row(mask, size, 0),
            "token_type_ids": _row(kinds, size, 0),
        }
        unknown = [spec.name for spec in self.inputs if spec.name not in arrays]
        if unknown:
            raise BadInputError("The model takes more than a text.", where=", ".join(unknown), allowed=sorted(arrays))
        inputs = {spec.name: arrays[spec.name] for spec in self.inputs}
        return with_derived(self.session.run(inputs), inputs, self.traits.task)


def _row(values: Sequence[int], size: int, fill: int) -> np.ndarray:
    return np.asarray([[*values, *[fill] * (size - len(values))]], np.int64)


def of_model(model: Model) -> Subject:
    """The original in PyTorch; a decoder without its cache."""
    from edgeport.runtime.torch import TorchEncodedTokens, TorchSession

    traits = traits_of(model)
    if traits.transcript is not None:
        return Subject(traits, None, TorchEncodedTokens(model), model.inputs)
    return Subject(traits, TorchSession(model), None, model.inputs)


def of_artifact(artifact: Artifact, traits: Traits, *, lengths: tuple[int, ...] = (), threads: int = 1) -> Subject:
    """The shipped file in its runtime; a decoder through its cache.

    Args:
        lengths: sizes of the sequence that the file was enumerated for; a fixed one is read off its inputs.

    Raises:
        BadInputError: the file is missing or damaged.
    """
    if artifact.context is not None:
        return Subject(traits, None, open_tokens(artifact, threads=threads), artifact.inputs)
    shape = artifact.inputs[0].shape
    if not lengths and len(shape) == 2 and isinstance(shape[1], int):
        lengths = (shape[1],)
    return Subject(traits, open_session(artifact, threads=threads), None, artifact.inputs, tuple(sorted(lengths)))
