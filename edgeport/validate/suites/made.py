"""Readers that make rows of a package's parts: dates out of spoken words, speech in noise, words in fonts.

Everything that is drawn comes from one seeded generator, so that the rows are the same each time.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from edgeport.data.audio import Recording, speech_intervals
from edgeport.data.rendered import Rendered

Row = dict[str, Any]

DAYS = ("Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday")
MONTHS = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip
DATES = 400
NOISY = 120
WORDS = 1200


def spoken_dates(files: Sequence[Path]) -> Iterator[Row]:
    """Dates and times of day as Asterisk says them: its words for days, months and numbers, one after the other."""
    folder = {path.stem: path for path in files}
    chance = random.Random(0)
    for turn in range(DATES):
        day, month, date = _below(chance, 7), _below(chance, 12), 1 + _below(chance, 31)
        hour, minute, late = 1 + _below(chance, 12), 10 + _below(chance, 50), _below(chance, 2)
        year = 2001 + _below(chance, 9)
        words = [f"day-{day}", f"mon-{month}", *_ordinal(date)]
        text = f"{DAYS[day]} {MONTHS[month]} {date}"
        if turn % 2:
            words += ["2", "thousand", str(year - 2000)]
            text += f" {year}"
        else:
            words += ["at", *_number(hour), *_number(minute), ("a-m", "p-m")[late]]
            text += f" at {hour}:{minute:02} {('am', 'pm')[late]}"
        yield {"audio": Recording(tuple(folder[word] for word in words)), "text": text}


def _number(value: int) -> list[str]:
    if value <= 20:
        return [str(value)]
    return [str(value // 10 * 10), *([str(value % 10)] if value % 10 else [])]


def _ordinal(value: int) -> list[str]:
    *tens, last = _number(value)
    return [*tens, f"h-{last}"]


def speech_in_noise(files: Sequence[Path]) -> Iterator[Row]:
    """Recordings of some ten seconds: sentences with silence between them, in noise of several strengths."""
    chance = random.Random(0)
    names = sorted(files)
    for turn in range(NOISY):
        pieces = tuple(names[_below(chance, len(names))] for _ in range(3))
        pauses = tuple(0.5 + 1.5 * chance.random() for _ in range(4))
        noisy = Recording(pieces, pauses, noise_db=(20.0, 10.0, 5.0, 0.0)[turn % 4], seed=turn)
        yield {"audio": noisy, "speech": speech_intervals(noisy.clean())}


def drawn_words(files: Sequence[Path]) -> Iterator[Row]:
    """English words of three to ten letters in the package's fonts; every fifth in capitals, every fifth a number."""
    chance = random.Random(0)
    fonts = [path for path in files if path.suffix == ".ttf"]
    (book,) = (path for path in files if path.suffix == ".txt")
    words = [word for word in book.read_text(encoding="utf-8").split() if re.fullmatch(r"[a-z]{3,10}", word)]
    for turn in range(WORDS):
        word = words[_below(chance, len(words))]
        kind = _below(chance, 5)
        text = (word.upper(), str(_below(chance, 1_000_000)), word.capitalize(), word, word)[kind]
        dark, light = _below(chance, 90), 165 + _below(chance, 90)
        ink, paper = (light, dark) if _below(chance, 4) == 0 else (dark, light)
        font = fonts[_below(chance, len(fonts))]
        drawn = Rendered(text, font, ink, paper, 8 * chance.random() - 4, 12 * chance.random(), turn)
        yield {"path": drawn, "text": text}


def _below(chance: random.Random, count: int) -> int:
    """A number below `count`; `random()` is the one method whose sequence Python keeps from version to version."""
    return int(chance.random() * count)
