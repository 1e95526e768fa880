"""Error rates of texts: edits to get from what was written to what is right, by word or by character."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Any


def edits(found: Sequence[str], wanted: Sequence[str]) -> int:
    """The fewest insertions, deletions and substitutions that turn one sequence into the other (Levenshtein 1966)."""
    above = list(range(len(wanted) + 1))
    for row, left in enumerate(found, 1):
        line = [row]
        for column, right in enumerate(wanted, 1):
            line.append(min(above[column] + 1, line[-1] + 1, above[column - 1] + (left != right)))
        above = line
    return above[-1]


def words(text: str) -> list[str]:
    """A text's words as Whisper's authors compare them (Radford et al. 2022, appendix C): lower case, no punctuation,
    numbers as digits, contractions in full. Ordinals are their numbers ("21st" is "21"), and every digit is a word, so
    that it does not matter how a model groups them ("5 5", "55")."""
    plain = re.sub(r"\b(\d+)(st|nd|rd|th)\b", r"\1", _normalizer()(text))
    return re.sub(r"(\d)(?=\d)", r"\1 ", plain).split()


@cache
def _normalizer() -> Any:
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

    return EnglishTextNormalizer({})
