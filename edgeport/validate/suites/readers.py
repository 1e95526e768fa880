"""Rows out of files, as they lie in packages and as users write them. A row maps a column's name to its value."""

from __future__ import annotations

import csv
import itertools
import json
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from edgeport.errors import BadInputError
from edgeport.sourcing import PICTURES
from edgeport.validate.suites.definition import Reader
from edgeport.validate.suites.made import Row, drawn_words, speech_in_noise, spoken_dates


def read_files(
    reader: Reader, files: Sequence[Path], label_pattern: str | None = None, labels: Mapping[str, int] | None = None
) -> list[Row]:
    """All rows, in the order of the files.

    Args:
        files: sorted.

    Raises:
        BadInputError: a file is missing, or is not what the reader expects.
    """
    try:
        if reader == "images":
            return images(files, label_pattern, labels)
        if reader in MAKERS:
            return list(MAKERS[reader](files))
        return [row for path in files for row in READERS[reader](path)]
    except (OSError, UnicodeDecodeError, ValueError, KeyError, IndexError, TypeError, csv.Error) as error:
        raise BadInputError(
            f"The rows can't be read by {reader!r}: {error}.", where=", ".join(path.name for path in files)
        ) from error


def jsonl(path: Path) -> Iterator[Row]:
    """One JSON object a line."""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError(f"line {number} is no JSON object")
            yield row


def table(path: Path) -> Iterator[Row]:
    """Comma-separated values whose first line names the columns."""
    with path.open(encoding="utf-8", newline="") as file:
        yield from csv.DictReader(file)


def images(files: Sequence[Path], label_pattern: str | None, labels: Mapping[str, int] | None = None) -> list[Row]:
    """Pictures; the class is given by name, is in the file's name, or is its folder's place among sorted siblings."""
    pictures = [path for path in files if path.suffix.lower() in PICTURES]
    if labels:
        unknown = sorted(path.name for path in pictures if path.name not in labels)
        if unknown:
            raise ValueError(f"'labels' lacks {unknown[0]}")
        return [{"path": path, "label": labels[path.name]} for path in pictures]
    if label_pattern is None:
        classes = sorted({path.parent.name for path in pictures})
        return [{"path": path, "label": classes.index(path.parent.name)} for path in pictures]
    rows = []
    for path in pictures:
        match = re.fullmatch(label_pattern, path.name)
        if match is None:
            raise ValueError(f"{path.name} does not match 'label_pattern'")
        rows.append({"path": path, "label": int(match[1])})
    return rows


def social_iqa(path: Path) -> Iterator[Row]:
    """Social IQa as the package evals has it: "context question? A: one; B: two; C: three." and the letter."""
    for row in jsonl(path):
        text = row["input"][-1]["content"]
        found = re.fullmatch(r"(.*?) A: (.*?); B: (.*?); C: (.*?)\.?", text, re.DOTALL)
        if found is None:
            raise ValueError(f"{text!r} has no three answers")
        yield {"prompt": found[1], "choices": [found[2], found[3], found[4]], "answer": "ABC".index(row["ideal"])}


def labelled_sentences(path: Path) -> Iterator[Row]:
    """A JSON list of {"text", "class"}, as the package sentiment keeps its sentences."""
    for row in json.loads(path.read_text(encoding="utf-8")):
        if row["text"].strip():
            yield {"text": row["text"].strip(), "label": int(row["class"])}


def document_pairs(path: Path) -> Iterator[Row]:
    """The Lee corpus: one document a line in lee.cor, and beside it the matrix of mean human similarities."""
    if path.suffix != ".cor":
        return
    documents = path.read_text(encoding="latin-1").splitlines()
    matrix = [line.split() for line in path.with_name("similarities0-1.txt").read_text().splitlines()]
    for first, second in itertools.combinations(range(len(documents)), 2):
        # The upper triangle has the ratings.
        yield {"first": documents[first], "second": documents[second], "score": float(matrix[first][second])}


def dialogues(path: Path) -> Iterator[Row]:
    """ChatterBot's corpus: YAML lists of turns; the first two turns of each are a message and its reply."""
    import yaml

    for turns in yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]:
        if len(turns) >= 2 and all(isinstance(turn, str) and turn.strip() for turn in turns[:2]):
            yield {"query": turns[0].strip(), "answer": turns[1].strip()}


def passages(path: Path) -> Iterator[Row]:
    """Passages of English web pages and encyclopedia articles: whole sentences, together 60 words or a few more."""
    for row in jsonl(path):
        if row["type"] not in ("wikipedia", "openwebtext", "c4"):
            continue
        words: list[str] = []
        for sentence in re.split(r"(?<=[a-z][.!?]) +", " ".join(row["text"].split())):
            words += sentence.split()
            if len(words) >= PASSAGE_WORDS:
                yield {"text": " ".join(words)}
                words = []


PASSAGE_WORDS = 60


def transcribed(path: Path) -> Iterator[Row]:
    """A file "transcription" as CMU Sphinx has it: words in "<s> ... </s>", then the recording's name in brackets."""
    if not path.name.endswith("transcription"):
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        found = re.fullmatch(r"(?:<s>)?\s*(.*?)\s*(?:</s>)?\s*\((\S+)\)", line.strip())
        if found is None:
            raise ValueError(f"{line!r} names no recording")
        yield {"audio": path.with_name(f"{found[2]}.wav"), "text": found[1]}


def intents(path: Path) -> Iterator[Row]:
    """Sentences of Home Assistant's intents, expanded from their templates: the first few of each.

    A template has (alternatives|...), [options], <rules> and {slots}; a slot takes the values that the list names.
    """
    book = json.loads(path.read_text(encoding="utf-8"))
    rules, lists = book["expansion_rules"], book["lists"]
    for label, intent in sorted(book["intents"].items()):
        seen: set[str] = set()
        for group in intent["data"]:
            local = {**rules, **group.get("expansion_rules", {})}
            slots = {**lists, **group.get("lists", {})}
            for template in group["sentences"]:
                for sentence in _spread(template, local, slots):
                    text = " ".join(sentence.split())
                    if text and text not in seen:
                        seen.add(text)
                        yield {"text": text, "label": label}


EXPANSIONS = 6
"""Sentences made of one template."""


def _spread(template: str, rules: Mapping[str, str], slots: Mapping[str, Any]) -> list[str]:
    """Some sentences of a template: each takes other alternatives than the ones before."""
    return [_expand(template, random.Random(turn), rules, slots, 0) for turn in range(EXPANSIONS)]


def _expand(
    template: str, chance: random.Random, rules: Mapping[str, str], slots: Mapping[str, Any], depth: int
) -> str:
    """One sentence; alternatives are chosen innermost first."""
    if depth > 20:
        raise ValueError(f"the rules of {template!r} name each other")

    def rule(match: re.Match[str]) -> str:
        return _expand(rules[match[1]], chance, rules, slots, depth + 1)

    text = re.sub(r"<([^<>]+)>", rule, template)

    def choose(match: re.Match[str]) -> str:
        inside = match[2].split("|")
        options = [*inside, ""] if match[1] == "[" else inside
        return options[_below(chance, len(options))]

    pattern = re.compile(r"([\[(])([^\[\]()]*)[\])]")
    while pattern.search(text):
        text = pattern.sub(choose, text)

    def fill(match: re.Match[str]) -> str:
        return _expand(_value(match[1], chance, slots), chance, rules, slots, depth + 1)

    return re.sub(r"\{([^{}]+)\}", fill, text)


def _below(chance: random.Random, count: int) -> int:
    """A number below `count`; `random()` is the one method whose sequence Python keeps from version to version."""
    return int(chance.random() * count)


WILD = ("kitchen", "hallway lamp", "office", "garden", "bedroom", "front door")
"""What stands where any words may."""


def _value(slot: str, chance: random.Random, slots: Mapping[str, Any]) -> str:
    """A value of a slot, itself a template."""
    known = slots.get(slot.partition(":")[0], {})
    if "values" in known:
        value = known["values"][_below(chance, len(known["values"]))]
        return value if isinstance(value, str) else str(value["in"])
    if "range" in known:
        start, stop = int(known["range"]["from"]), int(known["range"]["to"])
        return str(start + _below(chance, stop - start + 1))
    return WILD[_below(chance, len(WILD))]


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    "jsonl": jsonl,
    "csv": table,
    "social_iqa": social_iqa,
    "labelled_sentences": labelled_sentences,
    "intents": intents,
    "document_pairs": document_pairs,
    "dialogues": dialogues,
    "passages": passages,
    "transcribed": transcribed,
}
"""Readers of one file at a time."""

MAKERS: dict[str, Callable[[Sequence[Path]], Iterator[Row]]] = {
    "spoken_dates": spoken_dates,
    "speech_in_noise": speech_in_noise,
    "drawn_words": drawn_words,
}
"""Readers of all files at once."""
