"""Reductions, sorting and cumulative sums (coremltools `reduction.py`, `tensor_operation.py`)."""

from __future__ import annotations

from collections.abc import Callable

import torch

from edgeport.runtime.coreml.ops.arguments import Operator, Operators, Tensor, axes_of, flag, integer

Reduction = Callable[[Tensor, list[int], bool], Tensor]


def reduction(function: Reduction) -> Operator:
    """A reduction over `axes` (all of them when absent) from a function of (x, axes, keep_dims)."""

    def reduce(x: Tensor, axes: Tensor | None = None, keep_dims: Tensor | bool = False) -> Tensor:
        return function(x, axes_of(axes, x.ndim), flag(keep_dims))

    return reduce


def product(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    """Product over several axes; torch has it for one."""
    for axis in sorted(axes, reverse=True):
        x = torch.prod(x, dim=axis, keepdim=keep)
    return x


def reduce_argmax(
    x: Tensor, axis: Tensor | int = -1, keep_dims: Tensor | bool = False, output_dtype: str = "int32"
) -> Tensor:
    """Index of the largest value along an axis."""
    return torch.argmax(x, dim=integer(axis), keepdim=flag(keep_dims))


def reduce_argmin(
    x: Tensor, axis: Tensor | int = -1, keep_dims: Tensor | bool = False, output_dtype: str = "int32"
) -> Tensor:
    """Index of the smallest value along an axis."""
    return torch.argmin(x, dim=integer(axis), keepdim=flag(keep_dims))


def argsort(x: Tensor, axis: Tensor | int = -1, ascending: Tensor | bool = False) -> Tensor:
    """Indices that sort an axis, the largest first unless `ascending`."""
    return torch.argsort(x, dim=integer(axis), descending=not flag(ascending), stable=True)


def topk(
    x: Tensor,
    k: Tensor | int = 1,
    axis: Tensor | int = -1,
    ascending: Tensor | bool = False,
    sort: Tensor | bool = True,
    return_indices: Tensor | bool = True,
    output_indices_dtype: str = "int32",
) -> tuple[Tensor, ...]:
    """The k largest (smallest when `ascending`) values of an axis, sorted, and their indices; k = -1 takes all."""
    dim = integer(axis)
    count = integer(k) if integer(k) >= 0 else x.shape[dim]
    values, indices = torch.topk(x, count, dim=dim, largest=not flag(ascending))
    return (values, indices) if flag(return_indices) else (values,)


def cumsum(
    x: Tensor, axis: Tensor | int = 0, exclusive: Tensor | bool = False, reverse: Tensor | bool = False
) -> Tensor:
    """Running sum along an axis; `exclusive` leaves the element itself out, `reverse` starts at the end."""
    dim = integer(axis)
    values = torch.flip(x, [dim]) if flag(reverse) else x
    total = torch.cumsum(values, dim)
    if flag(exclusive):
        total = total - values
    return torch.flip(total, [dim]) if flag(reverse) else total


OPERATORS: Operators = {
    "argsort": argsort,
    "cumsum": cumsum,
    "reduce_argmax": reduce_argmax,
    "reduce_argmin": reduce_argmin,
    "reduce_l1_norm": reduction(lambda x, axes, keep: torch.sum(torch.abs(x), axes, keep)),
    "reduce_l2_norm": reduction(lambda x, axes, keep: torch.sqrt(torch.sum(x * x, axes, keep))),
    "reduce_log_sum": reduction(lambda x, axes, keep: torch.log(torch.sum(x, axes, keep))),
    "reduce_log_sum_exp": reduction(torch.logsumexp),
    "reduce_max": reduction(torch.amax),
    "reduce_mean": reduction(torch.mean),
    "reduce_min": reduction(torch.amin),
    "reduce_prod": reduction(product),
    "reduce_sum": reduction(torch.sum),
    "reduce_sum_square": reduction(lambda x, axes, keep: torch.sum(x * x, axes, keep)),
    "topk": topk,
}
