"""A decoder language model in the Core ML reference evaluator, its cache in the model's states."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from edgeport.runtime.coreml.session import CoreMLReferenceSession
from edgeport.runtime.decoder import LOGITS, check_tokens

if TYPE_CHECKING:
    from edgeport.export.artifact import Artifact
    from edgeport.runtime.coreml.evaluate import Policy

IDS, MASK = "inputIds", "causalMask"


class CoreMLReferenceTokens:
    """See `edgeport.runtime.decoder.Tokens`: the program's arithmetic, not Apple's kernels.

    Attributes:
        name, vendor_kernels: as of `CoreMLReferenceSession`.

    Raises:
        BadInputError: the package is missing or damaged.
        MeasurementError: the program has an operator that the evaluator does not know.
    """

    name = CoreMLReferenceSession.name
    vendor_kernels = CoreMLReferenceSession.vendor_kernels

    def __init__(self, artifact: Artifact, policy: Policy | None = None) -> None:
        assert artifact.context is not None
        self.context, self.length = artifact.context, 0
        self._vocabulary = int(artifact.outputs[0].fixed_shape()[-1])
        self._session = CoreMLReferenceSession(artifact, policy)
        self._state = self._session.new_state()

    def feed(self, ids: np.ndarray) -> np.ndarray:
        """Append tokens, int64 (S,); the scores of the next one, float32 (V,). See `Tokens.feed`.

        Raises:
            MeasurementError: an operator can't be evaluated.
        """
        check_tokens(self, ids, self._vocabulary)
        total = self.length + len(ids)
        # The program reads of the mask how long it is.
        inputs = {IDS: ids[None], MASK: np.zeros((1, 1, 1, total), np.float16)}
        scores: np.ndarray = self._session.run(inputs, self._state)[LOGITS][0, -1]
        self.length = total
        return scores

    def rewind(self, length: int = 0) -> None:
        """Forget all tokens but the first `length`: what lies behind them is never read."""
        assert 0 <= length <= self.length
        self.length = length
