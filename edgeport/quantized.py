"""QuantizedTensor: the one logical form of a compressed weight.

A method (round to nearest, GPTQ, ...) makes one; a compressed layer computes with exactly its
dequantised numbers; every exporter writes exactly its codes and scales in the backend's native form.
The test that keeps this honest reads the shipped file and compares it with this tensor bit for bit.

The arithmetic is `value = scale * (code - zero_point)` in float32, after Jacob et al. 2018
(https://arxiv.org/abs/1712.05877), eq. 1.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

ScaleDtype = Literal["float32", "float16", "bfloat16"]


@dataclass(frozen=True)
class QuantizedTensor:
    """Integer codes and scales of one weight.

    The weight is seen as a matrix of shape (N, K): N is the length of `axis` (moved to the front),
    K the product of the rest. Each row is cut into groups of `group_size` columns; one scale serves one group.

    Attributes:
        codes: int8 tensor in the weight's own shape; -2**(bits-1)+1 ... 2**(bits-1)-1 when symmetric.
        scale: float32 tensor, shape (N, K // group_size); every value is representable in `scale_dtype`.
        zero_point: int8 tensor in `scale`'s shape, or None when symmetric (zero point 0).
        bits: code width, 2 to 8.
        group_size: columns a scale serves; K when one scale serves a whole channel (per_channel).
        axis: the channel axis of the weight (0 for Linear, Embedding and Conv).
        scale_dtype: the float type in which the backend stores a scale.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor | None
    bits: int
    group_size: int
    axis: int = 0
    scale_dtype: ScaleDtype = "float32"

    @property
    def rows(self) -> int:
        """N, the number of channels."""
        rows: int = self.codes.shape[self.axis]
        return rows

    @property
    def columns(self) -> int:
        """K, the weights of one channel."""
        return int(self.codes.numel()) // self.rows

    @property
    def per_channel(self) -> bool:
        """One scale serves a whole channel."""
        return self.group_size == self.columns

    @property
    def symmetric(self) -> bool:
        """No zero point."""
        return self.zero_point is None

    def storage_bytes(self) -> int:
        """Bytes of packed codes, scales and zero points, as a backend that stores this form densely needs."""
        codes = (self.codes.numel() * self.bits + 7) // 8
        width = 4 if self.scale_dtype == "float32" else 2
        zero = 0 if self.zero_point is None else (self.scale.numel() * self.bits + 7) // 8
        return codes + self.scale.numel() * width + zero


def digest(tensor: QuantizedTensor) -> str:
    """sha256 of codes, scales and zero points with their shapes: equal digests mean equal weights, bit for bit."""
    state = hashlib.sha256(f"{tensor.bits} {tensor.group_size} {tensor.axis}".encode())
    for part in (tensor.codes, tensor.scale, tensor.zero_point):
        if part is not None:
            state.update(f"{tuple(part.shape)} {part.dtype}".encode())
            state.update(part.contiguous().numpy().tobytes())
    return state.hexdigest()


def round_scale(scale: torch.Tensor, dtype: ScaleDtype) -> torch.Tensor:
    """The nearest scales that `dtype` can hold, returned as float32. Same shape."""
    import torch

    return scale.to(getattr(torch, dtype)).to(torch.float32)


def as_matrix(weight: torch.Tensor, axis: int = 0) -> torch.Tensor:
    """A weight as (N, K): `axis` first, the rest flattened."""
    return weight.movedim(axis, 0).reshape(weight.shape[axis], -1)


def from_matrix(matrix: torch.Tensor, shape: torch.Size, axis: int = 0) -> torch.Tensor:
    """Undo `as_matrix` for a weight of the given shape."""
    moved = [shape[axis], *[size for index, size in enumerate(shape) if index != axis]]
    return matrix.reshape(moved).movedim(0, axis).contiguous()


def quantize_with_scale(
    weight: torch.Tensor,
    scale: torch.Tensor,
    *,
    bits: int,
    group_size: int,
    axis: int = 0,
    scale_dtype: ScaleDtype = "float32",
) -> QuantizedTensor:
    """Round a weight to the nearest codes of a symmetric grid that is already chosen.

    Args:
        weight: float tensor of any shape.
        scale: shape (N, K // group_size), positive.
    """
    import torch

    limit = 2 ** (bits - 1) - 1
    scale = round_scale(scale, scale_dtype)
    matrix = as_matrix(weight.detach().to(torch.float32), axis)
    grouped = matrix.reshape(matrix.shape[0], -1, group_size)
    codes = torch.clamp(torch.round(grouped / scale.unsqueeze(-1)), -limit, limit).to(torch.int8)
    return QuantizedTensor(
        codes=from_matrix(codes.reshape(matrix.shape), weight.shape, axis),
        scale=scale,
        zero_point=None,
        bits=bits,
        group_size=group_size,
        axis=axis,
        scale_dtype=scale_dtype,
    )


def dequantize(tensor: QuantizedTensor) -> torch.Tensor:
    """The float32 weight, in its own shape, that the codes stand for: scale * (code - zero_point)."""
    import torch

    matrix = as_matrix(tensor.codes, tensor.axis).to(torch.float32)
    grouped = matrix.reshape(tensor.rows, -1, tensor.group_size)
    if tensor.zero_point is not None:
        grouped = grouped - tensor.zero_point.to(torch.float32).unsqueeze(-1)
    values = grouped * tensor.scale.unsqueeze(-1)
    return from_matrix(values.reshape(matrix.shape), tensor.codes.shape, tensor.axis)
