"""Sums from which a layer's error follows, over samples that come one at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


@dataclass
class Sums:
    """Sums over all samples: squares of the difference, of both sides, and their product."""

    difference: float = 0.0
    reference: float = 0.0
    found: float = 0.0
    product: float = 0.0
    worst: float = 0.0

    def add(self, found: np.ndarray, reference: np.ndarray) -> None:
        """One sample, two float arrays of one shape."""
        import numpy as np

        a, b = found.astype(np.float64).reshape(-1), reference.astype(np.float64).reshape(-1)
        difference, square = float((a - b) @ (a - b)), float(b @ b)
        self.difference += difference
        self.reference += square
        self.found += float(a @ a)
        self.product += float(a @ b)
        self.worst = max(self.worst, _relative(difference, square))

    @property
    def relative(self) -> float:
        """||found - reference|| / ||reference||."""
        return _relative(self.difference, self.reference)

    @property
    def snr_db(self) -> float | None:
        """Signal to noise, decibels; None without noise."""
        if self.difference == 0 or self.reference == 0:
            return None
        return 10 * math.log10(self.reference / self.difference)

    @property
    def cosine(self) -> float:
        """Of everything as one vector."""
        norm = math.sqrt(self.found * self.reference)
        return self.product / norm if norm > 0 else float(self.difference == 0)


def _relative(difference: float, reference: float) -> float:
    """Of an output of zeros any difference is all of it."""
    if reference == 0:
        return 0.0 if difference == 0 else 1.0
    return math.sqrt(difference / reference)


def aligned(found: np.ndarray, reference: np.ndarray, mask: np.ndarray | None) -> tuple[np.ndarray, np.ndarray] | None:
    """Two values of a layer as rows of equal number, padding left out; None where they are no such thing.

    A file may hold a layer's rows without their batch, or the last of them only (a decoder's scores).

    Args:
        mask: (B, S), 0 on padding.
    """
    import numpy as np

    if found.ndim == 0 or reference.ndim == 0:
        return None
    if found.shape == reference.shape and found.ndim == 4:
        return found, reference
    width = reference.shape[-1]
    if found.size % width or reference.size % width:
        return None
    a, b = found.reshape(-1, width), reference.reshape(-1, width)
    if len(a) != len(b) and found.ndim == 4:
        return None
    if mask is not None and len(a) == len(b) == mask.size:
        valid = np.asarray(mask).reshape(-1) != 0
        return a[valid], b[valid]
    last = min(len(a), len(b))
    return a[-last:], b[-last:]
