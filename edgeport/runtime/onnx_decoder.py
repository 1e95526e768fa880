"""A decoder language model in ONNX Runtime, its cache one buffer that the file reads and writes in place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgeport.model.types import Axis
from edgeport.runtime.decoder import IDS, LOGITS, check_tokens
from edgeport.runtime.onnxruntime import open_file

if TYPE_CHECKING:
    from edgeport.export.artifact import Artifact

PAST, PRESENT = "past_key_values.", "present."
STATES = ".encoder."
"""In the names of an encoder's keys and values."""
MASK, POSITIONS = "attention_mask", "position_ids"


@dataclass(frozen=True)
class _Window:
    """A buffer that keeps the latest tokens only: GroupQueryAttention with `sliding_window_cache`.

    Attributes:
        places: tokens that it holds at most.
        window: tokens that are always kept.
    """

    places: int
    window: int

    def kept(self, total: int) -> int:
        """Tokens in it after `total` were fed (ContribOperators.md, 1.31: L of T). Places are freed many at a time."""
        freed = self.places - self.window + 1
        return total if total <= self.places else total - freed * -(-(total - self.places) // freed)

    def can_rewind(self, total: int, length: int) -> bool:
        """What it held after `length` tokens still lies in it after `total`."""
        return self.kept(length) == self.kept(total) - (total - length)


class OnnxRuntimeTokens:
    """See `edgeport.runtime.decoder.Tokens`.

    Where a layer drops what its window has passed, tokens that were forgotten can't always be taken back: the text is
    then read again with the next call.

    Attributes:
        cache_bytes: of the buffers.

    Raises:
        BadInputError: the file is missing or damaged.
    """

    name = "onnxruntime"
    vendor_kernels = True

    def __init__(self, artifact: Artifact, *, threads: int = 1) -> None:
        import onnxruntime

        assert artifact.context is not None
        self.context, self.length = artifact.context, 0
        self._session = open_file(artifact, threads=threads, growing=True)
        self._vocabulary = int(next(spec for spec in artifact.outputs if spec.name == LOGITS).fixed_shape()[-1])
        self._positions = any(spec.name == POSITIONS for spec in artifact.inputs)
        self._binding = self._session.io_binding()
        self._ones = np.ones((1, self.context), np.int64)
        # Scores and cache lie in memory of ours: asking the binding for its outputs takes as long as a layer.
        self._scores = np.zeros((1, 1, self._vocabulary), np.float32)
        self._binding.bind_ortvalue_output(LOGITS, onnxruntime.OrtValue.ortvalue_from_numpy(self._scores))
        self._fed = np.zeros(self.context, np.int64)
        self._gone = False
        windows = artifact.facts.get("windows", {})
        self._windows = []
        self.cache_bytes = 0
        for spec in artifact.inputs:
            if spec.name.startswith(PAST) and STATES not in spec.name:
                places = spec.shape[2].maximum if isinstance(spec.shape[2], Axis) else spec.shape[2]
                if spec.name in windows:
                    self._windows.append(_Window(places, windows[spec.name]))
                shape = [places if at == 2 else size for at, size in enumerate(spec.fixed_shape())]
                zeros = np.zeros(shape, np.dtype(spec.dtype))
                self.cache_bytes += zeros.nbytes
                buffer = onnxruntime.OrtValue.ortvalue_from_numpy(zeros)
                self._binding.bind_ortvalue_input(spec.name, buffer)
                self._binding.bind_ortvalue_output(PRESENT + spec.name.removeprefix(PAST), buffer)

    def feed(self, ids: np.ndarray) -> np.ndarray:
        """Append tokens, int64 (S,); the scores of the next one, float32 (V,). See `Tokens.feed`."""
        check_tokens(self, ids, self._vocabulary)
        total = self.length + len(ids)
        self._fed[self.length : total] = ids
        if self._gone:
            ids, self.length, self._gone = self._fed[:total], 0, False
        self._binding.bind_cpu_input(IDS, np.ascontiguousarray(ids, np.int64)[None])
        self._binding.bind_cpu_input(MASK, np.ascontiguousarray(self._ones[:, :total]))
        if self._positions:
            self._binding.bind_cpu_input(POSITIONS, np.arange(self.length, total, dtype=np.int64)[None])
        self._session.run_with_iobinding(self._binding)
        self.length = total
        # A copy: the runtime writes the next call's scores to the same place.
        scores: np.ndarray = self._scores[0, -1].copy()
        return scores

    def rewind(self, length: int = 0) -> None:
        """Forget all tokens but the first `length`: what lies behind them is written over."""
        assert 0 <= length <= self.length
        kept = all(window.can_rewind(self.length, length) for window in self._windows)
        self._gone = length > 0 and (self._gone or not kept)
        self.length = length


class GrowingTokens:
    """The form in standard operators, whose cache comes out of each call one buffer longer. See
    `edgeport.runtime.decoder.Tokens`.

    Raises:
        BadInputError: the file is missing or damaged.
    """

    name = "onnxruntime"
    vendor_kernels = True

    def __init__(self, artifact: Artifact, *, threads: int = 1) -> None:
        assert artifact.context is not None
        self.context, self.length = artifact.context, 0
        self._session = open_file(artifact, threads=threads, growing=True)
        self._vocabulary = int(next(spec for spec in artifact.outputs if spec.name == LOGITS).fixed_shape()[-1])
        self._past = {}
        for spec in artifact.inputs:
            if spec.name.startswith(PAST):
                _, heads, _, width = spec.fixed_shape()
                self._past[spec.name] = np.zeros((1, heads, 0, width), np.dtype(spec.dtype))
        self._outputs = [LOGITS, *(PRESENT + name.removeprefix(PAST) for name in self._past)]

    def feed(self, ids: np.ndarray) -> np.ndarray:
        """Append tokens, int64 (S,); the scores of the next one, float32 (V,). See `Tokens.feed`."""
        check_tokens(self, ids, self._vocabulary)
        total = self.length + len(ids)
        given = {
            IDS: np.ascontiguousarray(ids, np.int64)[None],
            MASK: np.ones((1, total), np.int64),
            POSITIONS: np.arange(self.length, total, dtype=np.int64)[None],
        }
        past = {name: np.ascontiguousarray(held[:, :, : self.length]) for name, held in self._past.items()}
        answer, *present = self._session.run(self._outputs, {**given, **past})
        self._past = dict(zip(self._past, present, strict=True))
        self.length = total
        scores: np.ndarray = answer[0, -1]
        return scores

    def rewind(self, length: int = 0) -> None:
        """Forget all tokens but the first `length`: the next call is given no others."""
        assert 0 <= length <= self.length
        self.length = length
