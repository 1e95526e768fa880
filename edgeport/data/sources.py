"""Inputs out of what a recipe names as its source, and which rows those are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from edgeport.data.cards import card_names, load_card
from edgeport.data.corpus import corpus_samples, read_lines
from edgeport.data.images import split_pictures
from edgeport.data.samples import CARDS, SampleRecord, Samples, prepared_pictures, samples
from edgeport.data.text import read_texts
from edgeport.errors import BadInputError
from edgeport.model.types import Model
from edgeport.packages import Progress
from edgeport.sourcing import DataSource, picture_files
from edgeport.storage import hash_file


def source_samples(
    model: Model, source: DataSource, *, count: int, seed: int = 0, progress: Progress | None = None
) -> Samples:
    """Inputs of a model out of a source, at most `count` of them, batch 1. The same files and seed give the same.

    Raises:
        BadInputError: the data can't be had, or is of another kind than the model's inputs.
    """
    if source.texts:
        return corpus_samples(model, source.texts, count=count, key=source.key, sequence=source.sequence, seed=seed)
    if source.pictures:
        return _picture_samples(model, picture_files(source), count, seed)
    card = None if source.card is None else load_card(source.card)
    return samples(model, count=count, split="calibration", seed=seed, card=card, progress=progress)


def _picture_samples(model: Model, files: list[Path], count: int, seed: int) -> Samples:
    if model.modality != "image" or model.image is None:
        raise BadInputError(
            f"{model.name} can't be tuned on pictures: "
            + ("it takes none." if model.modality != "image" else "it does not say how they are prepared."),
            where="pictures",
            allowed="image models with a preprocessor_config.json or of the zoo; a data card for every other model",
        )
    inputs, chosen, words = prepared_pictures(model, files, count, seed)
    hashes = {str(path): hash_file(path) for path in dict.fromkeys(chosen)}
    return Samples(inputs, SampleRecord("pictures", True, hashes, f"{words} of {len(files)}", None, len(inputs)))


class Recorded(Protocol):
    """A record of inputs: of the data package, or of a bundle's evidence."""

    @property
    def name(self) -> str:
        """The data card, or what else the inputs are."""
        ...

    @property
    def sha256(self) -> Mapping[str, str]:
        """Of each file."""
        ...


def rows_of_record(record: Recorded) -> frozenset[str]:
    """`rows_of` what a record names: a card's rows, or the sha256 of each file."""
    return _rows_of_card(record.name) if record.name in card_names() else frozenset(record.sha256.values())


def rows_of(source: DataSource, modality: str) -> frozenset[str]:
    """What a source shows a model, as suites compare it with their rows: texts, or the sha256 of pictures and
    recordings. A recording counts whole, whatever part of it the slice is. Files that are not there (a bundle that is
    validated elsewhere) can't be looked into."""
    if source.texts:
        files = [Path(file) for file in source.texts if Path(file).is_file()]
        return frozenset(text for file in files for text in read_lines(file, source.key))
    if source.pictures:
        there = [place for place in source.pictures if Path(place).exists()]
        return frozenset(map(hash_file, picture_files(source.model_copy(update={"pictures": there}))))
    return _rows_of_card(source.card or CARDS.get(modality))


def _rows_of_card(card: str | None) -> frozenset[str]:
    if card is None or not (card in card_names() or Path(card).is_file()):
        return frozenset()
    data = load_card(card)
    if data.kind == "text":
        return frozenset(read_texts(data, data.fetch(), "calibration"))
    if data.kind == "image":
        return frozenset(map(hash_file, split_pictures(data, data.fetch(), "calibration")))
    if data.audio is not None:
        return frozenset({data.package.members[data.audio.recording]})
    return frozenset()
