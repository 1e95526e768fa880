"""What every layer of the original reads and gives, seen while it runs in torch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from edgeport.model.inputs import select_outputs

if TYPE_CHECKING:
    import numpy as np

    from edgeport.model.types import Model

    Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Call:
    """One call of a layer.

    Attributes:
        input: float32 of any shape; None where the layer reads no floats (an embedding).
        output: float32 of any shape.
    """

    input: np.ndarray | None
    output: np.ndarray


def run_original(model: Model, sample: Arrays, *, cached: bool) -> dict[str, np.ndarray]:
    """The original's outputs for one golden input, by name; floats as float32.

    Args:
        cached: it is a decoder that the bundle has with a cache: here it reads the whole text at once.
    """
    tensors = {name: torch.tensor(value) for name, value in sample.items()}
    more: dict[str, Any] = {"use_cache": False} if cached else {}
    with torch.inference_mode():
        result = model.module(**tensors, **more)
    found = select_outputs(result, tuple(spec.name for spec in model.outputs))
    return {name: _array(value) for name, value in found.items()}


@contextlib.contextmanager
def watched(model: Model, layers: Sequence[str]) -> Iterator[dict[str, list[Call]]]:
    """While the block runs, every call of these layers is noted, by layer, in order.

    Layers that the model lacks are left out.
    """
    modules = dict(model.module.named_modules())
    calls: dict[str, list[Call]] = {name: [] for name in layers if name in modules}
    handles = [modules[name].register_forward_hook(_note(found)) for name, found in calls.items()]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _note(calls: list[Call]) -> Any:
    def hook(_module: torch.nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        given = arguments[0] if arguments else None
        read = _array(given) if isinstance(given, torch.Tensor) and given.is_floating_point() else None
        if isinstance(output, torch.Tensor) and output.is_floating_point():
            calls.append(Call(read, _array(output)))

    return hook


def _array(value: torch.Tensor) -> np.ndarray:
    """A copy: the module may go on changing the tensor in place."""
    floats = value.to(torch.float32) if value.is_floating_point() else value
    array: np.ndarray = floats.detach().clone().numpy()
    return array


def bias_of(model: Model, layer: str) -> np.ndarray | None:
    """A layer's bias, float32 (N,), or None."""
    bias = getattr(dict(model.module.named_modules())[layer], "bias", None)
    return _array(bias) if isinstance(bias, torch.Tensor) else None
