"""A decoder language model in ONNX Runtime, its cache one buffer that the file reads and writes in place."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from edgeport.runtime.decoder import IDS, LOGITS, check_tokens
from edgeport.runtime.onnxruntime import open_file

if TYPE_CHECKING:
    from edgeport.export.artifact import Artifact

PAST, PRESENT = "past_key_values.", "present."
STATES = ".encoder."
"""In the names of an encoder's keys and values."""
MASK, POSITIONS = "attention_mask", "position_ids"


class OnnxRuntimeTokens:
    """See `edgeport.runtime.decoder.Tokens`.

    Raises:
        BadInputError: the file is missing or damaged.
    """

    name = "onnxruntime"
    vendor_kernels = True

    def __init__(self, artifact: Artifact, *, threads: int = 1) -> None:
        import onnxruntime

        assert artifact.context is not None
        self.context, self.length = artifact.context, 0
        self._session = open_file(artifact, threads=threads)
        self._vocabulary = int(next(spec for spec in artifact.outputs if spec.name == LOGITS).fixed_shape()[-1])
        self._positions = any(spec.name == POSITIONS for spec in artifact.inputs)
        self._binding = self._session.io_binding()
        self._ones = np.ones((1, self.context), np.int64)
        self._binding.bind_output(LOGITS)  # the first one bound is the first of get_outputs
        for spec in artifact.inputs:
            if spec.name.startswith(PAST) and STATES not in spec.name:
                heads, width = spec.fixed_shape()[1], spec.fixed_shape()[3]
                zeros = np.zeros((1, heads, self.context, width), np.dtype(spec.dtype))
                buffer = onnxruntime.OrtValue.ortvalue_from_numpy(zeros)
                self._binding.bind_ortvalue_input(spec.name, buffer)
                self._binding.bind_ortvalue_output(PRESENT + spec.name.removeprefix(PAST), buffer)

    def feed(self, ids: np.ndarray) -> np.ndarray:
        """Append tokens, int64 (S,); the scores of the next one, float32 (V,). See `Tokens.feed`."""
        check_tokens(self, ids, self._vocabulary)
        total = self.length + len(ids)
        self._binding.bind_cpu_input(IDS, np.ascontiguousarray(ids, np.int64)[None])
        self._binding.bind_cpu_input(MASK, np.ascontiguousarray(self._ones[:, :total]))
        if self._positions:
            self._binding.bind_cpu_input(POSITIONS, np.arange(self.length, total, dtype=np.int64)[None])
        self._session.run_with_iobinding(self._binding)
        self.length = total
        # A copy: the runtime writes the next call's scores to the same place.
        scores: np.ndarray = self._binding.get_outputs()[0].numpy()[0, -1].copy()
        return scores

    def rewind(self, length: int = 0) -> None:
        """Forget all tokens but the first `length`: what lies behind them is written over."""
        assert 0 <= length <= self.length
        self.length = length
