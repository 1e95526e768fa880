"""Bytes of activations: the most that are alive at once in one forward, counted without computing anything."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from edgeport.errors import MeasurementError, first_line
from edgeport.model.decoder import Call, StepCache, attending
from edgeport.model.types import Model

LENGTHS = (32, 64)
"""Tokens at which a decoder is counted: beyond, the count grows by as much for every token."""


class _Alive(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of every tensor that an operator makes, until the last that looks at them is gone.

    Attributes:
        most: bytes alive at once.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now, self.most = 0, 0
        self._known: dict[int, weakref.finalize[..., Any]] = {}

    def __torch_dispatch__(
        self, func: Any, _types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            for leaf in tree_leaves(result):
                if isinstance(leaf, torch.Tensor):
                    self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()
        self.now += size
        self.most = max(self.most, self.now)
        self._known[key] = weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self.now -= size
        del self._known[key]


def _counted(forward: Callable[[], object]) -> int:
    alive = _Alive()
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True), alive:
        try:
            forward()
        except Exception as error:
            raise MeasurementError(f"The module looks at values: {first_line(error)}") from error
    return alive.most


def _copy(module: torch.nn.Module) -> torch.nn.Module:
    """The structure anew over the same tensors: what the module keeps of a forward is without values, too."""
    tensors = [*module.parameters(), *module.buffers()]
    return copy.deepcopy(module, memo={id(tensor): tensor for tensor in tensors})


def _read(module: torch.nn.Module, length: int) -> int:
    """A decoder reads `length` tokens; what its attention takes inside is left out."""

    def attend(call: Call) -> torch.Tensor:
        return torch.empty_like(call.query.transpose(1, 2))

    def forward() -> object:
        ids, positions = torch.zeros(1, length, dtype=torch.int64), torch.arange(length)[None]
        with attending(module, attend):
            return module(
                input_ids=ids, position_ids=positions, past_key_values=StepCache(), use_cache=True, logits_to_keep=1
            )

    return _counted(forward)


@dataclass(frozen=True)
class Live:
    """Most bytes of activations alive at once, float32.

    Attributes:
        at_example: with the model's example inputs.
        few, more: while a decoder with a cache reads as many tokens as `LENGTHS` says.
    """

    at_example: int = 0
    few: int = 0
    more: int = 0

    def at(self, tokens: int) -> int:
        """While a decoder reads `tokens` tokens."""
        short, long = LENGTHS
        return max(self.few + (self.more - self.few) * (tokens - short) // (long - short), 0)


def live_bytes(model: Model) -> Live:
    """Count one call of the module, weights left out.

    Raises:
        MeasurementError: the module looks at values, of which there are none here.
    """
    module = _copy(model.module)
    if model.decoder is None:
        return Live(at_example=_counted(lambda: module(**dict(model.example))))
    few, more = (_read(module, length) for length in LENGTHS)
    return Live(few=few, more=more)
