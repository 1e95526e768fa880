"""What the original answered, kept: a model is asked once, however many files are made of it and compared with it."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeport.errors import BadInputError
from edgeport.storage import hash_bytes, hash_file, hash_value
from edgeport.validate.suites.subject import Prediction, Subject
from edgeport.validate.suites.traits import Traits

if TYPE_CHECKING:
    from PIL.Image import Image
    from tokenizers import Tokenizer

ANSWERS = "answers.npz"


class Remembered:
    """A Subject that gives answers it has given before, and keeps those that are new.

    An answer is kept under the hash of the question: the method, and the content of its arguments.

    Args:
        most: the most tokens of a text, of this model and of the one that it is compared with.
        answers: kept so far; the new ones are added.
    """

    def __init__(self, subject: Subject, most: int, answers: dict[str, np.ndarray]) -> None:
        self.subject, self.most, self.answers = subject, most, answers

    @property
    def traits(self) -> Traits:
        """See `Subject`."""
        return self.subject.traits

    def tokenizer(self, most: int) -> Tokenizer:
        """See `Subject.tokenizer`."""
        return self.subject.tokenizer(most)

    def most_tokens(self, wanted: int) -> int:
        """The most tokens of a text: what is wanted, or as many as both models take."""
        return min(wanted, self.most)

    def run_text(self, text: str, most: int) -> dict[str, np.ndarray]:
        """See `Subject.run_text`; not kept, as outputs may be large."""
        return self.subject.run_text(text, most)

    def embed(self, text: str, most: int) -> np.ndarray:
        """See `Subject.embed`."""
        return self._ask("embed", text, most)

    def class_scores(self, text: str, most: int) -> np.ndarray:
        """See `Subject.class_scores`."""
        return self._ask("class_scores", text, most)

    def picture_scores(self, path: Path) -> np.ndarray:
        """See `Subject.picture_scores`."""
        return self._ask("picture_scores", path)

    def characters(self, picture: Image) -> str:
        """See `Subject.characters`."""
        return str(self._ask("characters", picture))

    def speech(self, samples: np.ndarray) -> np.ndarray:
        """See `Subject.speech`."""
        return self._ask("speech", samples)

    def transcribe(self, samples: np.ndarray, most: int) -> str:
        """See `Subject.transcribe`."""
        return str(self._ask("transcribe", samples, most))

    def predictions(self, prefix: Sequence[int], ends: Sequence[Sequence[int]]) -> list[Prediction]:
        """See `Subject.predictions`."""
        found = []
        for end in ends:
            packed = self._ask("_packed", list(prefix), list(end))
            likeliest, vocabulary = packed[1].astype(np.int64), int(packed[2, 0])
            found.append(Prediction(packed[0], likeliest, vocabulary, float(packed[3, 0])))
        return found

    def _packed(self, prefix: list[int], end: list[int]) -> np.ndarray:
        """A prediction as one array, float64 (4, n), which holds token ids exactly."""
        (each,) = self.subject.predictions(prefix, [end])
        same = (np.full(len(end), float(value)) for value in (each.vocabulary, each.certainty))
        return np.stack([each.logs, each.likeliest.astype(np.float64), *same])

    def _ask(self, method: str, *arguments: Any) -> np.ndarray:
        key = hash_value([method, *map(_content, arguments)])
        if key not in self.answers:
            asked = getattr(self if method.startswith("_") else self.subject, method)
            self.answers[key] = np.asarray(asked(*arguments))
        return self.answers[key]


Asker = Subject | Remembered


def _content(argument: Any) -> Any:
    """What a question's argument holds, for its hash."""
    if isinstance(argument, Path):
        return hash_file(argument)
    if isinstance(argument, np.ndarray):
        return hash_bytes(np.ascontiguousarray(argument).tobytes())
    if hasattr(argument, "tobytes"):  # a picture
        return [argument.size, argument.mode, hash_bytes(argument.tobytes())]
    return argument


def write_answers(answers: Mapping[str, np.ndarray], path: Path) -> None:
    """Keep answers in a file."""
    np.savez(path, **{key: answers[key] for key in sorted(answers)})  # type: ignore[arg-type]


def read_answers(path: Path) -> dict[str, np.ndarray]:
    """Answers out of a file.

    Raises:
        BadInputError: it is missing or damaged.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as kept:
            return dict(kept)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise BadInputError(f"The kept answers can't be read: {error}.", where=path.name) from error
