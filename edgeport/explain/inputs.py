"""A suite's rows as a reader sees them: what was asked, how long it is, what it has in common with others."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeport.data.audio import Recording
from edgeport.errors import EdgeportError
from edgeport.validate.evidence import TaskScore

TEXTS = ("text", "prompt", "query", "sentence", "question")
"""Columns that hold what a model is asked."""
LANGUAGES = ("language", "lang")
MOST_SHOWN = 300
"""Characters of an input that are shown."""

Length = Callable[[str], int]
"""Tokens of a text."""


@dataclass(frozen=True)
class Asked:
    """One sample of a suite.

    Attributes:
        row: its place in the evaluation slice.
        text: what was asked; of a picture or a recording its file's name.
        length: tokens; None without a text or without a tokenizer.
        label: the right answer; choices: what it was chosen from.
    """

    row: int
    text: str | None
    length: int | None = None
    label: str | None = None
    choices: tuple[str, ...] = ()
    language: str | None = None
    script: str | None = None

    @property
    def shown(self) -> tuple[str | None, bool]:
        """The text cut to `MOST_SHOWN`, and whether it was cut."""
        if self.text is None or len(self.text) <= MOST_SHOWN:
            return self.text, False
        return self.text[:MOST_SHOWN].rstrip() + "…", True

    def answer(self, given: str | None) -> str | None:
        """An answer for people: a choice's text instead of its number."""
        if given is None or not self.choices or not given.isdecimal() or int(given) >= len(self.choices):
            return given
        return self.choices[int(given)]


def asked(task: TaskScore, references: Sequence[str], length: Length | None) -> tuple[list[Asked] | None, str]:
    """The inputs of a suite's samples, in the order of its scores.

    Args:
        references: suites of the user's own, as paths of TOML files.
        length: counts tokens; None without a tokenizer.

    Returns:
        The inputs, or None and the reason why they can't be shown.
    """
    from edgeport.validate.suites.definition import load_suite
    from edgeport.validate.suites.rows import load_rows

    if task.rows is None:
        return None, "its scores belong to no rows of the suite"
    try:
        named = {load_suite(reference)[0].name: reference for reference in references}
        suite, folder = load_suite(named.get(task.suite, task.suite))
        for quick in (False, True):
            rows = load_rows(suite, folder, quick=quick)
            if rows.record == task.data:
                break
        else:
            return None, "the suite's rows are not those that were measured on"
    except EdgeportError as error:
        return None, f"its rows can't be read here: {error.what}"
    return [_asked(index, rows.evaluation[index], length) for index in task.rows], ""


def _asked(index: int, row: Mapping[str, Any], length: Length | None) -> Asked:
    heard = row.get("audio")
    files = (
        heard.pieces if isinstance(heard, Recording) else (row["path"],) if isinstance(row.get("path"), Path) else ()
    )
    if files:
        # A picture or a recording: what is written or said in it is the answer.
        name = " + ".join(f"{path.parent.name}/{path.name}" for path in files)
        language = next((str(row[key]) for key in LANGUAGES if row.get(key)), None)
        return Asked(index, name, label=_label(row) or row.get("text"), language=language)
    text = next((str(row[key]) for key in TEXTS if row.get(key) is not None), None)
    if text is None:
        return Asked(index, None, label=_label(row))
    language = next((str(row[key]) for key in LANGUAGES if row.get(key)), None)
    return Asked(
        index,
        text,
        length=None if length is None else length(text),
        label=_label(row),
        choices=tuple(row.get("choices") or ()),
        language=language,
        script=script_of(text),
    )


def _label(row: Mapping[str, Any]) -> str | None:
    """The right answer as the suite has it."""
    if row.get("choices") and isinstance(row.get("answer"), int):
        return str(row["choices"][row["answer"]])
    found = next((row[key] for key in ("label", "answer") if row.get(key) is not None), None)
    return None if found is None else str(found)


def script_of(text: str) -> str | None:
    """The script that most letters of a text are written in ("Latin", "Cyrillic", "CJK"), by their Unicode names."""
    names = Counter(unicodedata.name(letter, "?").split()[0] for letter in text if letter.isalpha())
    return None if not names else names.most_common(1)[0][0].capitalize()
