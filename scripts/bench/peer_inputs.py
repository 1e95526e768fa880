"""The inputs that quality.py stores for tools in interpreters of their own."""

from __future__ import annotations

import numpy as np


def read(path: str) -> list[dict[str, np.ndarray]]:
    """The inputs as quality.py stores them."""
    rows: dict[int, dict[str, np.ndarray]] = {}
    with np.load(path) as stored:
        for key in stored.files:
            index, _, name = key.partition("/")
            rows.setdefault(int(index), {})[name] = stored[key]
    return [rows[index] for index in sorted(rows)]
