"""Session: a loaded artifact (or the original torch model) that answers named arrays with named arrays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

from edgeport.errors import BadInputError
from edgeport.model.types import SCORED

if TYPE_CHECKING:
    import numpy as np

    from edgeport.export.artifact import Artifact
    from edgeport.runtime.decoder import EncodedTokens, Tokens

    Arrays = Mapping[str, np.ndarray]


class Session(Protocol):
    """What every runtime offers.

    Attributes:
        name: "torch", "onnxruntime", "executorch" or "coreml-reference".
        vendor_kernels: the arithmetic is the shipped runtime's own; False for a reference evaluator,
            whose time says nothing about a device.
    """

    name: str
    vendor_kernels: bool

    def run(self, inputs: Arrays) -> dict[str, np.ndarray]:
        """Run once.

        Args:
            inputs: every input of the artifact by name; values are cast to the dtype the file takes
                when that loses nothing (int64 to int32 within range), refused otherwise.

        Returns:
            Every output by name, in the model's output names.

        Raises:
            BadInputError: an input is missing, unknown, or its shape does not fit.
        """


def open_session(artifact: Artifact, *, threads: int = 1) -> Session:
    """Load an artifact in its runtime.

    Args:
        threads: intra-op threads, where the runtime has them.

    Raises:
        BadInputError: the file is missing or damaged.
    """
    if artifact.encoder is not None:
        from edgeport.runtime.decoder import EncoderDecoderSession

        return EncoderDecoderSession(open_encoded(artifact, threads=threads), scored=SCORED)
    if artifact.context is not None:
        from edgeport.runtime.decoder import DecoderSession

        return DecoderSession(open_tokens(artifact, threads=threads), scored=SCORED)
    if artifact.runtime == "onnxruntime":
        from edgeport.runtime.onnxruntime import OnnxRuntimeSession

        return OnnxRuntimeSession(artifact, threads=threads)
    if artifact.runtime == "executorch":
        from edgeport.runtime.executorch import open_executorch

        return open_executorch(artifact, threads=threads)
    from edgeport.runtime.coreml.session import CoreMLReferenceSession

    return CoreMLReferenceSession(artifact)


def open_tokens(artifact: Artifact, *, threads: int = 1) -> Tokens:
    """Load a decoder language model with its cache.

    Args:
        threads: intra-op threads, where the runtime has them.

    Raises:
        BadInputError: the artifact has no cache, or the file is missing or damaged.
    """
    _check_cache(artifact)
    if artifact.encoder is not None:
        return open_encoded(artifact, threads=threads)
    if artifact.runtime == "executorch":
        from edgeport.runtime.executorch_decoder import ExecuTorchTokens

        return ExecuTorchTokens(artifact, threads=threads)
    if artifact.runtime == "coreml":
        from edgeport.runtime.coreml.decoder import CoreMLReferenceTokens

        return CoreMLReferenceTokens(artifact)
    from edgeport.runtime.onnx_decoder import GrowingTokens, OnnxRuntimeTokens

    if artifact.facts.get("attention") == "standard":
        return GrowingTokens(artifact, threads=threads)
    return OnnxRuntimeTokens(artifact, threads=threads)


def open_encoded(artifact: Artifact, *, threads: int = 1) -> EncodedTokens:
    """Load an encoder-decoder with its decoder's cache.

    Args:
        threads: intra-op threads, where the runtime has them.

    Raises:
        BadInputError: the artifact has no encoder or no cache, or a file is missing or damaged.
    """
    _check_cache(artifact)
    if artifact.encoder is None:
        raise BadInputError("The model is a decoder alone: there is nothing to encode.", where=artifact.entry)
    if artifact.runtime == "executorch":
        from edgeport.runtime.executorch_encoder_decoder import ExecuTorchEncodedTokens

        return ExecuTorchEncodedTokens(artifact, threads=threads)
    from edgeport.runtime.onnx_encoder_decoder import OnnxRuntimeEncodedTokens

    return OnnxRuntimeEncodedTokens(artifact, threads=threads)


def _check_cache(artifact: Artifact) -> None:
    if artifact.context is None:
        raise BadInputError(
            "The model was exported without a cache: it scores texts and generates none.",
            where=artifact.entry,
            next_step="Export it again, without --task.",
        )
