"""A QuantizedTensor as it is stored: packed codes and what they need, and the other way.

For the weight NAME the file holds `NAME.codes` (packed, `edgeport.packing`; signed codes in two's complement),
`NAME.scale` in its own float type, and where the form has them `NAME.zero_point` (packed) and `NAME.palette`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field

from edgeport.errors import BadInputError
from edgeport.packing import pack_bits, packed_size, unpack_bits
from edgeport.quantized import QuantizedTensor, ScaleDtype
from edgeport.schema import Strict


class Form(Strict):
    """What the packed tensors of one weight mean.

    Attributes:
        format: its name in recipes and targets.
        shape: of the weight.
        bits, group_size, axis, scale_dtype: see `QuantizedTensor`.
        codes: "unsigned" for indices into a palette, "signed" otherwise.
        zero_points: each scale has one.
        palettes: how many; 0 for integers.
    """

    format: str
    shape: tuple[int, ...] = Field(min_length=2)
    bits: int = Field(ge=2, le=8)
    group_size: int = Field(ge=1)
    axis: int = Field(ge=0)
    scale_dtype: ScaleDtype
    codes: Literal["signed", "unsigned"]
    zero_points: bool
    palettes: int = Field(ge=0)

    def layout(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of each stored part.

        Raises:
            ValueError: the numbers contradict each other.
        """
        if min(self.shape) < 1 or self.axis >= len(self.shape):
            raise ValueError(f"axis {self.axis} of shape {self.shape}")
        rows, count = self.shape[self.axis], math.prod(self.shape)
        groups, rest = divmod(count // rows, self.group_size)
        if rest:
            raise ValueError(f"groups of {self.group_size} in {count // rows} columns")
        if self.palettes and rows % self.palettes:
            raise ValueError(f"{self.palettes} palettes for {rows} channels")
        if (self.codes == "unsigned") != bool(self.palettes) or (self.zero_points and self.palettes):
            raise ValueError("unsigned codes are indices into palettes, which have no zero points")
        scales: torch.dtype = getattr(torch, self.scale_dtype)
        parts = {
            "codes": (torch.uint8, (packed_size(count, self.bits),)),
            "scale": (scales, (rows, groups)),
        }
        if self.zero_points:
            parts["zero_point"] = (torch.uint8, (packed_size(rows * groups, self.bits),))
        if self.palettes:
            parts["palette"] = (scales, (self.palettes, 2**self.bits))
        return parts


def form_of(tensor: QuantizedTensor, format_name: str) -> Form:
    """The form of a weight that became `format_name`."""
    return Form(
        format=format_name,
        shape=tuple(tensor.codes.shape),
        bits=tensor.bits,
        group_size=tensor.group_size,
        axis=tensor.axis,
        scale_dtype=tensor.scale_dtype,
        codes="signed" if tensor.palette is None else "unsigned",
        zero_points=tensor.zero_point is not None,
        palettes=0 if tensor.palette is None else tensor.palette.shape[0],
    )


def _pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    return torch.from_numpy(pack_bits(codes.contiguous().view(torch.uint8).reshape(-1).numpy(), bits))


def _unpack(packed: torch.Tensor, bits: int, shape: tuple[int, ...], *, signed: bool) -> torch.Tensor:
    codes = unpack_bits(packed.numpy(), bits, math.prod(shape))
    if signed:
        # The code's uppermost bit is its sign: shift it to bit 7, and back with the sign.
        codes = (codes << (8 - bits)).view("int8") >> (8 - bits)
    return torch.from_numpy(codes).reshape(shape)


def pack_weight(tensor: QuantizedTensor) -> dict[str, torch.Tensor]:
    """The stored parts of a weight: "codes", "scale", and "zero_point", "palette" where it has them."""
    floats: torch.dtype = getattr(torch, tensor.scale_dtype)
    parts = {"codes": _pack(tensor.codes, tensor.bits), "scale": tensor.scale.to(floats)}
    if tensor.zero_point is not None:
        parts["zero_point"] = _pack(tensor.zero_point, tensor.bits)
    if tensor.palette is not None:
        parts["palette"] = tensor.palette.to(floats)
    return parts


def unpack_weight(name: str, form: Form, parts: Mapping[str, torch.Tensor]) -> QuantizedTensor:
    """Undo `pack_weight`.

    Args:
        name: the weight's, for errors.
        parts: exactly those of `form.layout()`.

    Raises:
        BadInputError: a part has another dtype or shape than the form says, a value is not finite, or a symmetric
            8-bit code is -128, which no method makes and not every kernel takes.
    """

    def bad(what: str) -> BadInputError:
        return BadInputError(f"The compressed weight is damaged: {what}.", where=name, next_step="Compress it again.")

    try:
        layout = form.layout()
    except ValueError as error:
        raise bad(str(error)) from error
    for part, (dtype, shape) in layout.items():
        found = parts[part]
        if found.dtype != dtype or tuple(found.shape) != shape:
            raise bad(f"its {part} is {found.dtype} {tuple(found.shape)}, the form says {dtype} {shape}")
        if dtype != torch.uint8 and not bool(torch.isfinite(found).all()):
            raise bad(f"its {part} is not finite")
    if not bool((parts["scale"] != 0).all()):
        raise bad("a scale is 0")
    codes = _unpack(parts["codes"], form.bits, form.shape, signed=form.codes == "signed")
    symmetric = not form.zero_points and not form.palettes
    if symmetric and form.bits == 8 and bool((codes == -128).any()):
        raise bad("a code is out of range (-128 in a symmetric 8-bit weight)")
    scale = parts["scale"].to(torch.float32)
    more: dict[str, Any] = {}
    if form.palettes:
        more["palette"] = parts["palette"].to(torch.float32)
    zero = _unpack(parts["zero_point"], form.bits, tuple(scale.shape), signed=True) if form.zero_points else None
    return QuantizedTensor(
        codes=codes,
        scale=scale,
        zero_point=zero,
        bits=form.bits,
        group_size=form.group_size,
        axis=form.axis,
        scale_dtype=form.scale_dtype,
        **more,
    )
