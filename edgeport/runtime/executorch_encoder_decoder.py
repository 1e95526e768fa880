"""An encoder-decoder in ExecuTorch's runtime: two methods of one program, called as its own runner for speech does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from edgeport.errors import BadInputError, MeasurementError
from edgeport.export.executorch.encoder_decoder import DECODER, ENCODER
from edgeport.export.executorch.quiet import load_attention
from edgeport.model.types import Axis
from edgeport.runtime.decoder import check_tokens
from edgeport.runtime.executorch import check_input, load_methods

if TYPE_CHECKING:
    from edgeport.export.artifact import Artifact


class ExecuTorchEncodedTokens:
    """See `edgeport.runtime.decoder.EncodedTokens`.

    A call takes a limited number of tokens, and no more than there are states: longer texts are fed in pieces.

    Raises:
        BadInputError: the file is missing or damaged.
    """

    name = "executorch"
    vendor_kernels = True

    def __init__(self, artifact: Artifact, *, threads: int = 1) -> None:
        assert artifact.context is not None
        assert artifact.encoder is not None
        load_attention()
        self.context, self.length = artifact.context, 0
        (self._spec,) = artifact.encoder.inputs
        self.source = self._spec.name
        sequence = artifact.inputs[0].shape[1]
        self._most = sequence.maximum if isinstance(sequence, Axis) else sequence
        self._vocabulary = int(artifact.outputs[0].fixed_shape()[-1])
        self._path = artifact.path
        self._encoder, self._decoder = load_methods(artifact.path, threads, (ENCODER, DECODER))
        self._states: Any = None

    def encode(self, source: np.ndarray) -> None:
        """Run the encoder on its input, and forget all tokens. See `EncodedTokens.encode`.

        Raises:
            MeasurementError: the runtime stopped.
        """
        import torch

        value = torch.from_numpy(check_input(self._spec, np.asarray(source)))
        # The runtime owns the memory of its outputs and reuses it at the next call.
        self._states = self._run(self._encoder, [value]).clone()
        self.rewind()

    def feed(self, ids: np.ndarray) -> np.ndarray:
        """Append tokens, int64 (S,); the scores of the next one, float32 (V,). See `Tokens.feed`.

        Raises:
            MeasurementError: the runtime stopped.
        """
        import torch

        if self._states is None:
            raise BadInputError("Nothing was encoded yet that the tokens could be for.", where=self.source)
        check_tokens(self, ids, self._vocabulary)
        row = torch.from_numpy(np.ascontiguousarray(ids, np.int64))[None]
        for piece in torch.split(row, min(self._most, self._states.shape[1]), dim=1):
            scores = self._run(self._decoder, [piece.contiguous(), self._states, torch.tensor([self.length])])
            self.length += piece.shape[1]
        result: np.ndarray = scores.numpy()[0].copy()
        return result

    def rewind(self, length: int = 0) -> None:
        """Forget all tokens but the first `length`: what lies behind them is never read."""
        assert 0 <= length <= self.length
        self.length = length

    def _run(self, method: Any, values: list[Any]) -> Any:
        try:
            (result,) = method.execute(values)
        except RuntimeError as error:
            raise MeasurementError(f"The ExecuTorch runtime stopped: {error}", where=self._path) from error
        return result
