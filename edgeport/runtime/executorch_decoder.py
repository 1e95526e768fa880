"""A decoder language model in ExecuTorch's runtime, its cache inside the loaded program."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from edgeport.errors import MeasurementError
from edgeport.export.executorch.quiet import load_attention
from edgeport.model.types import Axis
from edgeport.runtime.decoder import check_tokens
from edgeport.runtime.executorch import load_method

if TYPE_CHECKING:
    from edgeport.export.artifact import Artifact


class ExecuTorchTokens:
    """See `edgeport.runtime.decoder.Tokens`.

    The program takes a limited number of tokens a call: longer texts are fed in pieces.

    Raises:
        BadInputError: the file is missing or damaged.
    """

    name = "executorch"
    vendor_kernels = True

    def __init__(self, artifact: Artifact, *, threads: int = 1) -> None:
        assert artifact.context is not None
        load_attention()
        self.context, self.length = artifact.context, 0
        self.cache_bytes = int(artifact.facts["cache_bytes"])
        self._room: int | None = artifact.facts.get("forgets")
        self._farthest = 0
        self._fed = np.zeros(self.context, np.int64)
        self._gone = False
        sequence = artifact.inputs[0].shape[1]
        self._most = sequence.maximum if isinstance(sequence, Axis) else sequence
        self._vocabulary = int(artifact.outputs[0].fixed_shape()[-1])
        self._path = artifact.path
        self._method: Any = load_method(artifact.path, threads)

    def feed(self, ids: np.ndarray) -> np.ndarray:
        """Append tokens, int64 (S,); the scores of the next one, float32 (V,). See `Tokens.feed`.

        Raises:
            MeasurementError: the runtime stopped.
        """
        import torch

        check_tokens(self, ids, self._vocabulary)
        total = self.length + len(ids)
        self._fed[self.length : total] = ids
        if self._gone:
            ids, self.length, self._farthest, self._gone = self._fed[:total], 0, 0, False
        self._farthest = max(self._farthest, total)
        row = torch.from_numpy(np.ascontiguousarray(ids, np.int64))[None]
        for piece in torch.split(row, self._most, dim=1):
            try:
                (scores,) = self._method.execute([piece.contiguous(), torch.tensor([self.length])])
            except RuntimeError as error:
                raise MeasurementError(f"The ExecuTorch runtime stopped: {error}", where=self._path) from error
            self.length += piece.shape[1]
        # A copy: the runtime owns the memory of its outputs and reuses it.
        result: np.ndarray = scores.numpy()[0].copy()
        return result

    def rewind(self, length: int = 0) -> None:
        """Forget all tokens but the first `length`: what lies behind them is never read.

        Layers that keep their windows alone may have written over what comes into sight again: the text is then read
        anew with the next call.
        """
        assert 0 <= length <= self.length
        gone = self._room is not None and self._farthest - length > self._room
        self._gone = length > 0 and (self._gone or gone)
        self._farthest = self._farthest if length else 0
        self.length = length
