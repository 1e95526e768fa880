"""Named arrays of many calls in one safetensors file: "<call>/<tensor>", so that any language can read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


def save_vectors(path: Path, calls: Sequence[Mapping[str, np.ndarray]]) -> None:
    """Write one entry a tensor and call, in a fixed order."""
    import numpy as np
    from safetensors.numpy import save_file

    flat = {
        f"{index:04d}/{name}": np.ascontiguousarray(array)
        for index, call in enumerate(calls)
        for name, array in sorted(call.items())
    }
    save_file(flat, path)


def load_vectors(path: Path) -> list[dict[str, np.ndarray]]:
    """Undo `save_vectors`."""
    from safetensors.numpy import load_file

    calls: dict[int, dict[str, np.ndarray]] = {}
    for key, array in load_file(path).items():
        index, name = key.split("/", 1)
        calls.setdefault(int(index), {})[name] = array
    return [calls[index] for index in sorted(calls)]
