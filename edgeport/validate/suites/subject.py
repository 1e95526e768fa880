"""A model to be asked: the original in torch, or the artifact in its runtime, through the same code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgeport.data.images import open_image, preprocess_image
from edgeport.data.text import open_tokenizer
from edgeport.errors import BadInputError
from edgeport.model.types import Axis, ImagePreprocessing, TensorSpec
from edgeport.runtime.session import open_session, open_tokens
from edgeport.validate.outputs import SENTENCE_EMBEDDING, with_derived

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from edgeport.export.artifact import Artifact
    from edgeport.model.types import Model
    from edgeport.runtime.decoder import Tokens
    from edgeport.runtime.session import Session

EMBEDDING_TASKS = ("feature-extraction", "sentence-similarity")


@dataclass(frozen=True)
class Traits:
    """What both models have in common.

    Attributes:
        task: optimum's task name.
        tokenizer: tokenizer.json, None without one.
        labels: class names of a classifier.
        padding: id of the padding token.
    """

    task: str
    tokenizer: Path | None
    image: ImagePreprocessing | None = None
    labels: tuple[str, ...] = ()
    padding: int = 0

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
        """The most tokens of a text: what is wanted, or as many as the model takes."""
        if self.tokens is not None:
            return min(wanted, self.tokens.context)
        if self.lengths:
            return min(wanted, self.lengths[-1])
        return min(wanted, *(size.maximum for size in self.inputs[0].shape[1:] if isinstance(size, Axis)))

    def run_text(self, text: str, most: int) -> dict[str, np.ndarray]:
        """The outputs for one text, with the `sentence_embedding` where the task has one."""
        encoding = self.tokenizer(most).encode(text)
        return self._run(encoding.ids, encoding.attention_mask, encoding.type_ids)

    def embed(self, text: str, most: int) -> np.ndarray:
        """The text's vector, float32 (H,), of length 1."""
        vector: np.ndarray = self.run_text(text, most)[SENTENCE_EMBEDDING][0]
        return vector

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
    from edgeport.runtime.torch import TorchSession

    return Subject(traits_of(model), TorchSession(model), None, model.inputs)


def traits_of(model: Model) -> Traits:
    """What is known of a loaded model."""
    padding = getattr(getattr(model.module, "config", None), "pad_token_id", None)
    return Traits(model.task, model.assets.get("tokenizer.json"), model.image, model.labels, int(padding or 0))


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
