"""QuantizedTensor: the one logical form of a compressed weight.

A method (round to nearest, GPTQ, ...) makes one; a compressed layer computes with exactly its
dequantised numbers; every exporter writes exactly its codes and scales in the backend's native form.
The test that keeps this honest reads the shipped file and compares it with this tensor bit for bit.

The arithmetic is `value = scale * (code - zero_point)` in float32, after Jacob et al. 2018
(https://arxiv.org/abs/1712.05877), eq. 1; with a palette it is `value = scale * palette[code]`.
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
    """Codes and scales of one weight.

    The weight is seen as a matrix of shape (N, K): N is the length of `axis` (moved to the front),
    K the product of the rest. Each row is cut into groups of `group_size` columns; one scale serves one group.

    Attributes:
        codes: in the weight's own shape. int8, -2**(bits-1) ... 2**(bits-1)-1 (never -128 in symmetric 8-bit
            weights: kernels may not take it); with a palette uint8, 0 ... 2**bits-1.
        scale: float32 tensor, shape (N, K // group_size); every value is representable in `scale_dtype`.
        zero_point: int8 tensor in `scale`'s shape and the codes' range, or None when symmetric (zero point 0).
        bits: code width, 2 to 8.
        group_size: columns a scale serves; K when one scale serves a whole channel (per_channel).
        axis: the channel axis of the weight (0 for Linear, Embedding and Conv).
        scale_dtype: the float type in which the backend stores a scale.
        palette: float32 tensor, shape (P, 2**bits), values representable in `scale_dtype`, or None. The first
            N // P channels look their codes up in the first row, and so on. P divides N.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor | None
    bits: int
    group_size: int
    axis: int = 0
    scale_dtype: ScaleDtype = "float32"
    palette: torch.Tensor | None = None

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
        """An integer form without zero points."""
        return self.zero_point is None and self.palette is None

    def storage_bytes(self) -> int:
        """Bytes of packed codes with what they need, as a backend that stores this form densely needs.

        The scales of a palette's form are all 1 unless a method uses them, and 1 is not stored.
        """
        codes = (self.codes.numel() * self.bits + 7) // 8
        width = 4 if self.scale_dtype == "float32" else 2
        if self.palette is not None:
            scaled = bool((self.scale != 1).any())
            return codes + self.palette.numel() * width + scaled * self.scale.numel() * width
        zero = 0 if self.zero_point is None else (self.scale.numel() * self.bits + 7) // 8
        return codes + self.scale.numel() * width + zero


def digest(tensor: QuantizedTensor) -> str:
    """sha256 of codes, scales, zero points and palettes with their shapes: equal digests mean equal weights."""
    state = hashlib.sha256(f"{tensor.bits} {tensor.group_size} {tensor.axis}".encode())
    for part in (tensor.codes, tensor.scale, tensor.zero_point, tensor.palette):
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


def code_range(bits: int, *, symmetric: bool) -> tuple[int, int]:
    """Least and greatest code. Symmetric 8-bit weights leave -128 out: kernels that add pairs of products of
    8-bit numbers in 16 bits (XNNPACK, ONNX Runtime on some processors) count on it."""
    half = 2 ** (bits - 1)
    return (-half + 1 if symmetric and bits == 8 else -half), half - 1


def quantize_with_scale(
    weight: torch.Tensor,
    scale: torch.Tensor,
    *,
    bits: int,
    group_size: int,
    axis: int = 0,
    scale_dtype: ScaleDtype = "float32",
    zero_point: torch.Tensor | None = None,
) -> QuantizedTensor:
    """Round a weight to the nearest codes of a grid that is already chosen.

    Args:
        weight: float tensor of any shape.
        scale: shape (N, K // group_size), not zero.
        zero_point: int8 in `scale`'s shape, or None for a symmetric grid.
    """
    import torch

    lowest, highest = code_range(bits, symmetric=zero_point is None)
    scale = round_scale(scale, scale_dtype)
    matrix = as_matrix(weight.detach().to(torch.float32), axis)
    steps = torch.round(matrix.reshape(matrix.shape[0], -1, group_size) / scale.unsqueeze(-1))
    if zero_point is not None:
        steps = steps + zero_point.to(torch.float32).unsqueeze(-1)
    codes = torch.clamp(steps, lowest, highest).to(torch.int8)
    return QuantizedTensor(
        codes=from_matrix(codes.reshape(matrix.shape), weight.shape, axis),
        scale=scale,
        zero_point=zero_point,
        bits=bits,
        group_size=group_size,
        axis=axis,
        scale_dtype=scale_dtype,
    )


def dequantize(tensor: QuantizedTensor) -> torch.Tensor:
    """The float32 weight, in its own shape, that the codes stand for."""
    import torch

    matrix = as_matrix(tensor.codes, tensor.axis)
    if tensor.palette is not None:
        indices = matrix.reshape(tensor.palette.shape[0], -1).to(torch.int64)
        steps = tensor.palette.gather(1, indices).reshape(matrix.shape)
    else:
        steps = matrix.to(torch.float32)
    grouped = steps.reshape(tensor.rows, -1, tensor.group_size)
    if tensor.zero_point is not None:
        grouped = grouped.sub_(tensor.zero_point.to(torch.float32).unsqueeze(-1))
    # In place: the largest weight of a model, twice, is what compression holds at its peak.
    values = grouped.mul_(tensor.scale.unsqueeze(-1))
    return from_matrix(values.reshape(matrix.shape), tensor.codes.shape, tensor.axis)
