"""The original model as a Session: eager PyTorch, the reference that every artifact is compared with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from edgeport.errors import BadInputError
from edgeport.model.inputs import select_outputs
from edgeport.model.types import SCORED, Axis, Model, TensorSpec
from edgeport.runtime.decoder import check_tokens

if TYPE_CHECKING:
    import numpy as np


class TorchSession:
    """Runs `model.module` as it is, in inference mode, on the processor."""

    name = "torch"
    vendor_kernels = True

    def __init__(self, model: Model) -> None:
        self.model = model

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run once.

        Args:
            inputs: every input by name, in the shapes of `model.inputs`.

        Returns:
            Every output of `model.outputs` by name; floating point as float32.

        Raises:
            BadInputError: an input is missing or unknown, or its shape or dtype does not fit.
        """
        specs = {spec.name: spec for spec in self.model.inputs}
        if set(inputs) != set(specs):
            raise BadInputError(
                "The inputs' names don't fit the model.", where=", ".join(sorted(inputs)), allowed=sorted(specs)
            )
        tensors = {name: as_tensor(specs[name], value) for name, value in inputs.items()}
        with torch.inference_mode():
            if self.model.decoder is None:
                result = self.model.module(**tensors)
            elif self.model.decoder.cross:
                result = {"logits": self.model.module(**tensors, use_cache=False).logits[:, -SCORED:]}
            else:
                # Without a cache: what the cached file is compared with.
                result = self.model.module(**tensors, use_cache=False, logits_to_keep=SCORED)
        found = select_outputs(result, tuple(spec.name for spec in self.model.outputs))
        return {name: (t.to(torch.float32) if t.is_floating_point() else t).numpy() for name, t in found.items()}


class TorchEncodedTokens:
    """An encoder-decoder that reads all tokens again for each new one: the reference of what is written with a cache.

    See `edgeport.runtime.decoder.EncodedTokens`.
    """

    name = "torch"
    vendor_kernels = True

    def __init__(self, model: Model) -> None:
        source, target = model.inputs
        self.source = source.name
        longest = target.shape[1]
        self.context = longest.maximum if isinstance(longest, Axis) else longest
        self.module: Any = model.module
        self._spec = source
        self._ids: list[int] = []
        self.length = 0
        self._states: Any = None

    def encode(self, source: np.ndarray) -> None:
        """Run the encoder on its input, and forget all tokens. See `EncodedTokens.encode`."""
        with torch.inference_mode():
            self._states = self.module.get_encoder()(as_tensor(self._spec, source))
        self.rewind()

    def rewind(self, length: int = 0) -> None:
        """Forget all tokens but the first `length`."""
        del self._ids[length:]
        self.length = len(self._ids)

    def feed(self, ids: np.ndarray) -> np.ndarray:
        """Append tokens, int64 (S,); the scores of the next one, float32 (V,). See `Tokens.feed`."""
        if self._states is None:
            raise BadInputError("Nothing was encoded yet that the tokens could be for.", where=self.source)
        check_tokens(self, ids, self.module.config.vocab_size)
        self._ids += ids.tolist()
        self.length = len(self._ids)
        with torch.inference_mode():
            result = self.module(
                encoder_outputs=self._states, decoder_input_ids=torch.tensor([self._ids]), use_cache=False
            )
        scores: np.ndarray = result.logits[0, -1].to(torch.float32).numpy()
        return scores


def as_tensor(spec: TensorSpec, value: np.ndarray) -> torch.Tensor:
    """An array as the tensor that an input takes.

    Raises:
        BadInputError: the shape is not the spec's, or the dtype can't be cast without loss of kind.
    """
    sizes = [(size.minimum, size.maximum) if isinstance(size, Axis) else (size, size) for size in spec.shape]
    fits = value.ndim == len(sizes) and all(low <= n <= high for n, (low, high) in zip(value.shape, sizes, strict=True))
    if not fits:
        raise BadInputError(
            f"The input has the shape {value.shape}.",
            where=spec.name,
            allowed=", ".join(str(low) if low == high else f"{low} to {high}" for low, high in sizes),
        )
    dtype: torch.dtype = getattr(torch, spec.dtype)
    tensor = torch.tensor(value)
    if tensor.is_floating_point() and not dtype.is_floating_point:
        raise BadInputError(f"The input is {value.dtype}.", where=spec.name, allowed=spec.dtype)
    return tensor.to(dtype)
