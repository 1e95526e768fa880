"""Where the data files that users read and extend live: beside the package in a checkout, inside it in a wheel."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent


def data_folder(name: str) -> Path:
    """The folder `targets`, `calibration` or `recipes` of this installation.

    A wheel carries them as `edgeport/_data/<name>`; in a checkout they are top-level folders.
    """
    packaged = PACKAGE / "_data" / name
    return packaged if packaged.is_dir() else PACKAGE.parent / name
