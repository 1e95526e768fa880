"""Float weights that a file stores under no name: known again by the original's very values.

Exporters turn a Linear's weight to (K, N), put a convolution's channels last, join weights that read the same input,
store them in float16, or name them by a hash.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgeport.explain.shipped import Shipped
from edgeport.explain.spans import Span

if TYPE_CHECKING:
    import torch

SMALLEST = 256
"""Bytes: shorter runs are left without a name."""


def name_spans(path: Path, spans: list[Span], shipped: Shipped, state: Mapping[str, torch.Tensor]) -> list[Span]:
    """The spans of a file, with the parameter of each nameless run of floats that is one of the original's weights.

    Of joined weights the first one's name is told.
    """
    compressed = shipped.artifact.weights
    weights = {
        name: state[name].detach().numpy() for name in shipped.groups if name in state and name not in compressed
    }
    if not any(_nameless(span) for span in spans) or not weights:
        return spans
    data = np.memmap(path, dtype=np.uint8, mode="r")
    found = []
    for span in spans:
        if _nameless(span):
            stored = data[span.start : span.stop].tobytes()
            span = replace(span, parameter=_alone(stored, weights) or _joined(stored, weights))
        found.append(span)
    return found


def _alone(stored: bytes, weights: Mapping[str, np.ndarray]) -> str | None:
    """The weight that a run of bytes is, in one of its forms."""
    for name, weight in weights.items():
        # Sizes first: few weights have one in common.
        if len(stored) in (4 * weight.size, 2 * weight.size) and any(
            form.nbytes == len(stored) and form.tobytes() == stored for form in _forms(weight)
        ):
            return name
    return None


def _nameless(span: Span) -> bool:
    return span.part == "floats" and span.parameter is None and span.size >= SMALLEST


def _forms(weight: np.ndarray) -> Iterator[np.ndarray]:
    """The ways in which a weight may lie in a file."""
    for array in (weight, weight.astype(np.float16)):
        yield array
        if array.ndim == 2:
            yield np.ascontiguousarray(array.T)
        elif array.ndim == 4:
            yield np.ascontiguousarray(array.transpose(0, 2, 3, 1))
            yield np.ascontiguousarray(array.transpose(1, 2, 3, 0))


def _joined(stored: bytes, weights: Mapping[str, np.ndarray]) -> str | None:
    """The weight (N, K) whose turned columns a matrix (K, N + ...) begins with."""
    for dtype in (np.float32, np.float16):
        values = np.frombuffer(stored, dtype) if len(stored) % np.dtype(dtype).itemsize == 0 else None
        for name, weight in weights.items():
            if values is None or weight.ndim != 2 or values.size % weight.shape[1]:
                continue
            matrix = values.reshape(weight.shape[1], -1)
            width = weight.shape[0]
            turned = weight.T.astype(dtype)
            if (
                matrix.shape[1] > width
                and np.array_equal(matrix[0, :width], turned[0])
                and np.array_equal(matrix[:, :width], turned)
            ):
                return name
    return None
