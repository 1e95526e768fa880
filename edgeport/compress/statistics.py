"""What calibration learns about the input of a layer: its second moment, shared by every method.

GPTQ, SparseGPT, AWQ and SVD-LLM all work from H = sum of x x^T over the input vectors x of a layer; its diagonal
says how much each column of the weight matters. The error that a changed weight W + D makes in the layer's
output, summed over those inputs, is tr(D H D^T).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from edgeport.errors import BadInputError


@dataclass
class Moments:
    """Sums over the input vectors of one layer.

    Attributes:
        second: (K, K) float32, sum of x x^T, of which some may count more than others.
        mean_abs: (K,) float32, sum of |x|.
        max_abs: (K,) float32, largest |x|.
        count: input vectors summed.
    """

    second: torch.Tensor
    mean_abs: torch.Tensor
    max_abs: torch.Tensor
    count: int = 0


def padded(layer: torch.nn.Conv1d | torch.nn.Conv2d, value: torch.Tensor) -> torch.Tensor:
    """A convolution's input with the layer's own padding around it: "same" and reflected ones are words or modes."""
    pad = layer._reversed_padding_repeated_twice
    if not any(pad):
        return value
    return F.pad(value, pad, mode="constant" if layer.padding_mode == "zeros" else layer.padding_mode)


def input_vectors(layer: torch.nn.Module, value: torch.Tensor) -> torch.Tensor | None:
    """A layer's input as the vectors (T, K) that each row of its weight, seen as a matrix, is multiplied with.

    None for a layer without such vectors: grouped convolutions, embeddings.
    """
    if isinstance(layer, torch.nn.Linear):
        return value.reshape(-1, value.shape[-1])
    if isinstance(layer, torch.nn.Conv1d | torch.nn.Conv2d) and layer.groups == 1:
        flat, value = isinstance(layer, torch.nn.Conv1d), padded(layer, value)
        grow = (lambda size: (1, *size)) if flat else tuple
        patches = F.unfold(
            value.unsqueeze(2) if flat else value,
            grow(layer.kernel_size),
            dilation=grow(layer.dilation),
            stride=grow(layer.stride),
        )
        return patches.transpose(1, 2).reshape(-1, patches.shape[1])
    return None


def check_input(name: str, value: torch.Tensor) -> None:
    """Refuse what a layer gets to see when it is not finite.

    Raises:
        BadInputError: naming the layer.
    """
    if not bool(torch.isfinite(value).all()):
        raise BadInputError(
            "The calibration data makes values that are not finite.",
            where=f"input of layer {name}",
            next_step="Check the checkpoint and its preprocessing; the uncompressed model overflows as well.",
        )


Weigh = Callable[[str, int], torch.Tensor | None]
"""(a layer's name, how many input vectors) -> their weights (T,) with a mean of 1; None for all alike."""


@contextmanager
def observed(
    layers: Mapping[str, torch.nn.Module], weigh: Weigh = lambda _name, _count: None
) -> Iterator[dict[str, Moments]]:
    """Inside the block every forward of the layers adds to their moments.

    Args:
        weigh: how much each vector counts in the second moment.

    Raises:
        BadInputError: an activation is not finite; the message names the layer.
    """
    moments: dict[str, Moments] = {}

    def hook(name: str) -> Any:
        def observe(layer: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
            vectors = input_vectors(layer, inputs[0].detach())
            if vectors is None:
                return
            vectors = vectors.to(torch.float32)
            check_input(name, vectors)
            columns = vectors.shape[1]
            found = moments.get(name)
            if found is None:
                found = moments[name] = Moments(
                    torch.zeros(columns, columns), torch.zeros(columns), torch.zeros(columns)
                )
            weights = weigh(name, vectors.shape[0])
            weighted = vectors if weights is None else vectors * weights[:, None]
            found.second.addmm_(weighted.T, vectors)
            size = vectors.abs()
            found.mean_abs += size.sum(0)
            found.max_abs = torch.maximum(found.max_abs, size.amax(0))
            found.count += vectors.shape[0]

        return observe

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    try:
        yield moments
    finally:
        for handle in handles:
            handle.remove()


def output_error(change: torch.Tensor, second: torch.Tensor) -> float:
    """tr(D H D^T): the summed squared error that a changed weight makes in the layer's output.

    Args:
        change: D, (N, K).
        second: H, (K, K).
    """
    return float((change @ second).mul_(change).sum())
