"""Texts of a card, and their tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgeport.data.cards import Card, Split
from edgeport.errors import BadInputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def read_texts(card: Card, files: Sequence[Path], split: Split) -> list[str]:
    """The texts of a slice that are long enough; row i of every file comes before row i + 1 of any.

    Raises:
        BadInputError: a file is not JSON lines, or lacks the card's key.
    """
    assert card.text is not None
    part = card.slice(split)
    columns = []
    for path in files:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()[part.start : part.stop]
            columns.append([str(json.loads(line)[card.text.key]).strip() for line in lines])
        except (UnicodeDecodeError, json.JSONDecodeError, KeyError) as error:
            raise BadInputError(f"The data is not what card {card.name!r} says: {error!r}.", where=path.name) from error
    texts = [text for row in zip(*columns, strict=False) for text in row]
    return [text for text in texts if len(text) >= card.text.least_characters]


def open_tokenizer(path: Path, length: int) -> Tokenizer:
    """A tokenizer that truncates to `length` tokens, special tokens included, and does not pad.

    Raises:
        BadInputError: the file can't be read.
    """
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more specific
        raise BadInputError(f"The tokenizer can't be read: {error}.", where=path) from error
    tokenizer.no_padding()  # files often carry padding and truncation of their own
    tokenizer.enable_truncation(length)
    return tokenizer


def text_between(transcript: Path, start: float, stop: float) -> str:
    """The words that a NIST STM transcript has between two times, seconds; segments are taken whole.

    A line is: recording, channel, speaker, begin, end, words.
    """
    words = []
    for line in transcript.read_text(encoding="utf-8").splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and not line.startswith(";;") and start <= (float(fields[3]) + float(fields[4])) / 2 < stop:
            words.append(fields[5])
    return " ".join(words)
