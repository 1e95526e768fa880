"""The rows of a suite: checked, each one once, shuffled with a fixed seed, cut into training and evaluation."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeport.data.audio import Recording
from edgeport.data.cards import Slice
from edgeport.errors import BadInputError
from edgeport.packages import Progress, fetch_package
from edgeport.storage import hash_file
from edgeport.validate.evidence import DataRecord
from edgeport.validate.suites.definition import COLUMNS, Suite
from edgeport.validate.suites.made import Row
from edgeport.validate.suites.readers import read_files

SEED = 0


@dataclass(frozen=True)
class Rows:
    """What a suite is run on.

    Attributes:
        evaluation, training: rows of the slices; no row is in both.
        record: the evaluation rows, for the evidence.
    """

    evaluation: tuple[Row, ...]
    training: tuple[Row, ...]
    record: DataRecord


def suite_files(suite: Suite, folder: Path, progress: Progress | None = None) -> list[Path]:
    """The suite's files on disk, sorted.

    Args:
        folder: that `suite.data` is relative to.

    Raises:
        BadInputError: they can't be fetched, or are not there.
    """
    if suite.package is not None:
        root = fetch_package(suite.package, progress=progress)
        return [root / member for member in sorted(suite.package.members)]
    assert suite.data is not None
    path = folder / suite.data
    if not path.exists():
        raise BadInputError("The suite's data is not there.", where=path, next_step="Correct 'data' in the suite.")
    if suite.reader == "images":
        return sorted(each for each in path.rglob("*") if each.is_file())
    return sorted(each for each in path.iterdir() if each.is_file()) if path.is_dir() else [path]


def load_rows(
    suite: Suite,
    folder: Path,
    *,
    quick: bool,
    calibration: Collection[str] = (),
    progress: Progress | None = None,
) -> Rows:
    """Read, check and cut the rows of a suite.

    Args:
        quick: only the first `suite.quick` rows of the evaluation slice.
        calibration: texts, names of pictures, or sha256 of recordings, that the artifact was calibrated on; a suite
            must not hold them.

    Raises:
        BadInputError: no rows, a column is missing or wrong, or rows are calibration data.
    """
    files = suite_files(suite, folder, progress)
    read = read_files(suite.reader, files, suite.label_pattern, suite.labels)
    beside = files[0].parent if files else folder
    rows = [_checked(suite, row, number, beside) for number, row in enumerate(read, 1)]
    rows = _distinct(rows)
    if not rows:
        raise BadInputError("The suite has no rows.", where=suite.name)
    if suite.kind != "similarity":  # its rows are pairs of the same few documents: nothing may be left out
        rows = _shuffled(rows)
    evaluation = _cut(rows, suite.evaluation)
    if not evaluation:
        raise BadInputError(
            f"The slice 'evaluation' is empty: there are {len(rows)} rows.", where=suite.name, allowed="smaller slices"
        )
    if quick and suite.kind != "similarity":
        evaluation = evaluation[: suite.quick]
    _apart(suite, evaluation, calibration)
    return Rows(tuple(evaluation), tuple(_cut(rows, suite.training)), _record(suite, files, evaluation))


def _checked(suite: Suite, row: Row, number: int, beside: Path) -> Row:
    """A row with the columns that its kind needs, under their own names and in their own types.

    Args:
        beside: the folder that paths in the data are relative to.
    """
    found: Row = dict(row) if suite.kind == "custom" else {}
    for column in (*COLUMNS[suite.kind], *(suite.columns if suite.kind == "custom" else ())):
        name = suite.columns.get(column, column)
        if name not in row or row[name] is None:
            raise BadInputError(
                f"Row {number} lacks the column {name!r}.",
                where=f"suite {suite.name}",
                allowed=sorted(str(key) for key in row),
                next_step="Name the data's own columns in [columns].",
            )
        found[column] = _typed(suite, column, row[name], number, beside)
    if row.get("language") is not None:
        # No score is made of it: `edgeport explain` slices by it.
        found.setdefault("language", str(row["language"]))
    return found


def _typed(suite: Suite, column: str, value: Any, number: int, beside: Path) -> Any:
    where = f"suite {suite.name}, row {number}, column {column}"
    if column in FILES and isinstance(value, (str, Path)):
        path = beside / value
        if not path.is_file():
            raise BadInputError(f"There is no file {str(value)!r}.", where=where, next_step="Paths are the data's own.")
        return Recording((path,)) if column == "audio" else path
    if column == "speech":
        return _intervals(value, where)
    if column == "choices":
        if not isinstance(value, list) or len(value) < 2:
            raise BadInputError("'choices' must be a list of at least two texts.", where=where)
        return [str(choice) for choice in value]
    if column == "score" or (column == "answer" and suite.kind == "multiple_choice"):
        try:
            return float(value) if column == "score" else int(value)
        except (TypeError, ValueError) as error:
            raise BadInputError(f"The value {value!r} is no number.", where=where) from error
    if column in ("text", "prompt", "first", "second", "query") and not str(value).strip():
        raise BadInputError("The text is empty.", where=where)
    return value if column in (*FILES, "label") else str(value)


FILES = ("path", "audio")
"""Columns that name a file, or hold what stands for one."""


def _intervals(value: Any, where: str) -> list[tuple[float, float]]:
    """When somebody speaks, seconds.

    Raises:
        BadInputError: it is no list of beginnings and ends in their order.
    """
    try:
        found = [(float(start), float(stop)) for start, stop in value]
    except (TypeError, ValueError) as error:
        raise BadInputError(f"{value!r} is no list of times.", where=where, allowed="[[start, stop], ...]") from error
    times = [time for interval in found for time in interval]
    if times != sorted(times) or any(time < 0 for time in times):
        raise BadInputError("The times are not in order.", where=where, allowed="[[start, stop], ...], seconds")
    return found


def check_answers(suite: Suite, rows: Sequence[Row]) -> None:
    """Refuse an answer that is none of the choices.

    Raises:
        BadInputError: naming the row.
    """
    for row in rows:
        if not 0 <= row["answer"] < len(row["choices"]):
            raise BadInputError(
                f"The answer {row['answer']} is out of range.",
                where=f"suite {suite.name}: {row['prompt'][:60]!r}",
                allowed=f"0 to {len(row['choices']) - 1}",
            )


def _distinct(rows: Sequence[Row]) -> list[Row]:
    """Each row once: a sentence that is in the data twice would be trained on and measured on."""
    found: dict[str, Row] = {}
    for row in rows:
        content = {name: value for name, value in row.items() if name not in ("label", "score", "answer")}
        found.setdefault(repr(sorted(content.items())), row)
    return list(found.values())


def _shuffled(rows: list[Row]) -> list[Row]:
    import numpy as np

    return [rows[index] for index in np.random.default_rng(SEED).permutation(len(rows))]


def _cut(rows: list[Row], part: Slice | None) -> list[Row]:
    return [] if part is None else rows[part.start : part.stop]


def _apart(suite: Suite, rows: Sequence[Row], calibration: Collection[str]) -> None:
    known = {_plain(text) for text in calibration}
    for row in rows:
        for value in row.values():
            files = value.pieces if isinstance(value, Recording) else (value,) if isinstance(value, Path) else ()
            if files:
                names = {piece.name: hash_file(piece) for piece in files} if calibration else {}
                text, seen = ", ".join(names), not known.isdisjoint(names.values())
            else:
                text, seen = str(value), _plain(str(value)) in known
            if seen:
                raise BadInputError(
                    f"The suite would be measured on what the artifact was calibrated on: {text[:60]!r}.",
                    where=f"suite {suite.name}",
                    next_step="Calibrate on other data, or take these rows out of the suite.",
                )


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def _record(suite: Suite, files: Sequence[Path], rows: Sequence[Row]) -> DataRecord:
    if suite.package is not None:
        hashes = dict(suite.package.members)
    else:
        hashes = {path.name: hash_file(path) for path in files}
    part = suite.evaluation
    words = f"suite {suite.name}, rows {part.start} to {part.start + len(rows)} after a shuffle with seed {SEED}"
    return DataRecord(name=suite.name, real=True, sha256=hashes, slice=words, licence=suite.licence, samples=len(rows))
