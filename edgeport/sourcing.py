"""Where the inputs come from that a recipe tunes on or trains on: a data card, or files of the user's own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import Field, model_validator

from edgeport.errors import BadInputError
from edgeport.schema import Strict

PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
TEXTS = (".txt", ".jsonl")
ALLOWED = f"a data card, {' or '.join(TEXTS)} files, or pictures ({', '.join(PICTURES)}) and folders of them"


class DataSource(Strict):
    """One source of inputs; without any of it, the data card of the model's modality."""

    card: str | None = Field(default=None, description="name or path of a data card; its calibration slice is used")
    texts: tuple[str, ...] = Field(
        default=(), description="text files with one text a line, or .jsonl files with one object a line"
    )
    key: str = Field(default="text", description="the key of the text in .jsonl files")
    pictures: tuple[str, ...] = Field(default=(), description="pictures, or folders whose pictures are all taken")
    sequence: int | None = Field(
        default=None, ge=2, description="tokens of an input made of texts; None takes the model's example length"
    )

    @property
    def named(self) -> tuple[str, ...]:
        """The sources that are given, by their options."""
        given = {"card": self.card is not None, "texts": bool(self.texts), "pictures": bool(self.pictures)}
        return tuple(name for name, there in given.items() if there)

    @model_validator(mode="after")
    def _one_source(self) -> DataSource:
        if len(self.named) > 1:
            raise ValueError(f"give one of {' and '.join(self.named)}")
        return self


def picture_files(source: DataSource) -> list[Path]:
    """The pictures, those of a folder by name.

    Raises:
        BadInputError: one is not there, or a folder has none.
    """
    found: list[Path] = []
    for value in source.pictures:
        place = Path(value)
        inside = sorted(path for path in place.rglob("*") if path.suffix.lower() in PICTURES) if place.is_dir() else []
        if not inside and not place.is_file():
            raise BadInputError("There are no pictures.", where=place, allowed=", ".join(PICTURES))
        found += inside or [place]
    return found


def source_files(source: DataSource) -> list[Path]:
    """Every file that the source reads, of cards none.

    Raises:
        BadInputError: see `picture_files`.
    """
    return [*map(Path, source.texts), *picture_files(source)]


def recognise(values: Sequence[str], where: str) -> dict[str, object]:
    """The fields of `DataSource` that stand for what was named on a command line.

    Raises:
        BadInputError: it is nothing that inputs can be made of, or several things at once.
    """
    kinds = {value: _kind(value) for value in values}
    found = set(kinds.values())
    if len(found) != 1 or (found == {"card"} and len(values) > 1) or None in found:
        wrong = [value for value, kind in kinds.items() if kind is None] or list(values)
        raise BadInputError(f"{', '.join(wrong)} is no single source of inputs.", where=where, allowed=ALLOWED)
    (kind,) = found
    return {"card": values[0]} if kind == "card" else {str(kind): tuple(values)}


def _kind(value: str) -> str | None:
    suffix = Path(value).suffix.lower()
    if Path(value).is_dir() or suffix in PICTURES:
        return "pictures"
    if suffix in TEXTS:
        return "texts"
    return "card" if suffix in ("", ".toml") else None
