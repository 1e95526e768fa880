"""An encoder-decoder in ONNX Runtime: the decoder reads keys and values of the states where the encoder wrote them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from edgeport.errors import BadInputError
from edgeport.runtime.onnx_decoder import PAST, PRESENT, OnnxRuntimeTokens
from edgeport.runtime.onnxruntime import check_input, open_file

if TYPE_CHECKING:
    from edgeport.export.artifact import Artifact


class OnnxRuntimeEncodedTokens(OnnxRuntimeTokens):
    """See `edgeport.runtime.decoder.EncodedTokens`.

    Raises:
        BadInputError: a file is missing or damaged.
    """

    def __init__(self, artifact: Artifact, *, threads: int = 1) -> None:
        assert artifact.encoder is not None
        super().__init__(artifact, threads=threads)
        (self._spec,) = artifact.encoder.inputs
        self.source = self._spec.name
        self._given = [spec.name for spec in artifact.encoder.outputs]
        self._encoder = open_file(artifact, threads=threads, path=artifact.paths[0])
        self._encoded = False

    def encode(self, source: np.ndarray) -> None:
        """Run the encoder on its input, and forget all tokens. See `EncodedTokens.encode`."""
        binding = self._encoder.io_binding()
        binding.bind_cpu_input(self.source, check_input(self._spec, source))
        for name in self._given:
            binding.bind_output(name)
        self._encoder.run_with_iobinding(binding)
        for name, value in zip(self._given, binding.get_outputs(), strict=True):
            self._binding.bind_ortvalue_input(PAST + name.removeprefix(PRESENT), value)
        self._encoded = True
        self.rewind()

    def feed(self, ids: np.ndarray) -> np.ndarray:
        """Append tokens, int64 (S,); the scores of the next one, float32 (V,). See `Tokens.feed`."""
        if not self._encoded:
            raise BadInputError("Nothing was encoded yet that the tokens could be for.", where=self.source)
        return super().feed(ids)
