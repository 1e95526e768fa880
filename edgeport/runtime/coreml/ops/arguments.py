"""Parameters of operators as Python numbers.

Every operator function takes its parameters by their MIL names: tensors as torch tensors (floats in float32
whatever the program declares), strings as str, variadic parameters as tuples. Absent optional parameters are None
or the operator's documented default.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch

Tensor: TypeAlias = torch.Tensor
Operator = Callable[..., Tensor | tuple[Tensor, ...]]
Operators = Mapping[str, Operator]


def integers(values: Tensor | None) -> list[int]:
    """A vector (or a scalar) as a list; empty for None."""
    return [] if values is None else [int(value) for value in values.reshape(-1).tolist()]


def integer(value: Tensor | int) -> int:
    """A scalar, or a vector of one."""
    return int(value)


def flag(value: Tensor | bool) -> bool:
    """A boolean scalar."""
    return bool(value)


def axes_of(axes: Tensor | None, rank: int) -> list[int]:
    """Axes counted from the front; all of them for None."""
    return list(range(rank)) if axes is None else [axis % rank for axis in integers(axes)]


def along(values: Tensor, axis: int, rank: int) -> Tensor:
    """A vector shaped to broadcast along one axis of a tensor of the given rank."""
    shape = [1] * rank
    shape[axis] = -1
    return values.reshape(shape)
