"""A suite's definition: a TOML file that says where rows come from, what is asked of them and how many are used."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from edgeport.data.cards import Slice
from edgeport.packages import PinnedPackage
from edgeport.schema import Strict, named_toml, read_toml, toml_names
from edgeport.units import MetricUnit

FOLDER = Path(__file__).parent

Kind = Literal[
    "language_modelling",
    "next_word",
    "multiple_choice",
    "text_classification",
    "similarity",
    "retrieval",
    "image_classification",
    "speech_recognition",
    "voice_activity",
    "text_recognition",
    "custom",
]
COLUMNS: dict[Kind, tuple[str, ...]] = {
    "language_modelling": ("text",),
    "next_word": ("text",),
    "multiple_choice": ("prompt", "choices", "answer"),
    "text_classification": ("text", "label"),
    "similarity": ("first", "second", "score"),
    "retrieval": ("query", "answer"),
    "image_classification": ("path", "label"),
    "speech_recognition": ("audio", "text"),
    "voice_activity": ("audio", "speech"),
    "text_recognition": ("path", "text"),
    "custom": (),
}
"""What each kind needs of a row."""

NEEDS: dict[Kind, str] = {
    "language_modelling": "a causal language model",
    "next_word": "a causal language model",
    "multiple_choice": "a causal language model",
    "text_classification": "a text encoder or a text classifier",
    "similarity": "a text encoder",
    "retrieval": "a text encoder",
    "image_classification": "an image classifier",
    "speech_recognition": "a model that writes recordings down",
    "voice_activity": "a model that tells speech from silence",
    "text_recognition": "a model that reads words off pictures",
    "custom": "a model that takes a text",
}
"""Which models a kind can be asked of."""

Reader = Literal[
    "jsonl",
    "csv",
    "images",
    "social_iqa",
    "labelled_sentences",
    "intents",
    "document_pairs",
    "dialogues",
    "passages",
    "transcribed",
    "spoken_dates",
    "speech_in_noise",
    "drawn_words",
]
FILES: tuple[Reader, ...] = ("jsonl", "csv", "images")
"""Readers of a user's own data."""


class Suite(Strict):
    """One suite.

    Attributes:
        kind: what is asked; `edgeport.validate.suites.kinds` has one file for each.
        reader: how rows are read out of the files.
        data: a user's file or folder, relative to the suite's TOML file; or
        package: the pinned package that has the files.
        columns: for each column that the kind needs, its name in the data, where it differs.
        label_pattern: regular expression on a picture's file name whose first group is its class index; without it a
            picture's folder is its class.
        labels: the class index of each picture by its file's name, in place of both.
        training: rows that a classifier on top of embeddings is fitted on; never overlaps `evaluation`.
        evaluation: rows that are measured on. Rows are shuffled once, with a fixed seed, before they are cut.
        quick: rows of a quick run: the first of `evaluation`.
        most_tokens: longer texts are cut.
        score: a function "package.module:function" for the kind "custom"; unit, higher_is_better: of what it returns.
    """

    schema_version: Literal[1] = 1
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    title: str
    kind: Kind
    licence: str | None = None
    source: str | None = None
    reader: Reader = "jsonl"
    data: str | None = None
    package: PinnedPackage | None = None
    columns: dict[str, str] = Field(default_factory=dict)
    label_pattern: str | None = None
    labels: dict[str, int] = Field(default_factory=dict)
    training: Slice | None = None
    evaluation: Slice
    quick: int = Field(default=100, ge=1)
    most_tokens: int = Field(default=128, ge=2)
    score: str | None = None
    unit: MetricUnit = "share"
    higher_is_better: bool = True

    @model_validator(mode="after")
    def _whole(self) -> Suite:
        if (self.data is None) == (self.package is None):
            raise ValueError("exactly one of 'data' and [package] says where the rows are")
        if self.data is not None and self.reader not in FILES:
            raise ValueError(f"'reader' must be one of {', '.join(FILES)} for 'data'")
        if (self.kind == "image_classification") != (self.reader == "images"):
            raise ValueError("pictures are read by the reader 'images', for the kind 'image_classification' alone")
        if (self.kind == "custom") != (self.score is not None):
            raise ValueError("'score' names the function of the kind 'custom', and is for it alone")
        unknown = sorted(set(self.columns) - set(COLUMNS[self.kind]))
        if unknown and self.kind != "custom":
            raise ValueError(
                f"'columns' has {unknown[0]!r}; the kind {self.kind!r} has {', '.join(COLUMNS[self.kind])}"
            )
        train, test = self.training, self.evaluation
        if train is not None and train.start < test.stop and test.start < train.stop:
            raise ValueError("the slices 'training' and 'evaluation' overlap")
        return self


def suite_names() -> list[str]:
    """The suites of this installation, sorted."""
    return toml_names(FOLDER)


def load_suite(reference: str) -> tuple[Suite, Path]:
    """Read a suite by name, or by the path of a TOML file.

    Returns:
        The suite, and the folder that its `data` is relative to.

    Raises:
        BadInputError: there is no such suite, or the file is wrong.
    """
    path = named_toml("suite", reference, FOLDER, where="--suite")
    return read_toml(Suite, path), path.parent
