"""The values of a MIL program: element types, tensor types, packed bits, immediate values.

The type numbers and the field that holds each type are those of coremltools' `MIL.proto`; sub-byte elements are
packed from the least significant bit upward, an element may cross a byte.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from edgeport import packing
from edgeport.errors import BadInputError


@dataclass(frozen=True)
class ElementType:
    """One MIL element type.

    Attributes:
        name: "fp16", "fp32", "int32", "int4", "bool", "string", ... as MIL's own text form has it.
        bits: stored bits an element; 0 for strings.
        array: the numpy dtype that holds it unpacked (int4 in int8, uint1..uint6 in uint8, bfloat16 in float32).
    """

    name: str
    bits: int
    array: str

    @property
    def is_float(self) -> bool:
        """A floating-point type."""
        return self.name in ("fp16", "fp32", "fp64", "bfloat16")

    @property
    def is_signed(self) -> bool:
        """Codes of this integer type can be negative."""
        return self.name.startswith("int")


ELEMENT_TYPES = {
    1: ElementType("bool", 8, "bool"),
    2: ElementType("string", 0, "str"),
    10: ElementType("fp16", 16, "float16"),
    11: ElementType("fp32", 32, "float32"),
    12: ElementType("fp64", 64, "float64"),
    13: ElementType("bfloat16", 16, "float32"),
    21: ElementType("int8", 8, "int8"),
    22: ElementType("int16", 16, "int16"),
    23: ElementType("int32", 32, "int32"),
    24: ElementType("int64", 64, "int64"),
    25: ElementType("int4", 4, "int8"),
    31: ElementType("uint8", 8, "uint8"),
    32: ElementType("uint16", 16, "uint16"),
    33: ElementType("uint32", 32, "uint32"),
    34: ElementType("uint64", 64, "uint64"),
    35: ElementType("uint4", 4, "uint8"),
    36: ElementType("uint2", 2, "uint8"),
    37: ElementType("uint1", 1, "uint8"),
    38: ElementType("uint6", 6, "uint8"),
    39: ElementType("uint3", 3, "uint8"),
}


@dataclass(frozen=True)
class TensorType:
    """Element type and shape; a size that varies from call to call is None, and so is a shape of unknown rank."""

    element: ElementType
    shape: tuple[int | None, ...] | None

    @property
    def count(self) -> int:
        """Elements of a fully known shape."""
        if self.shape is None or None in self.shape:
            raise BadInputError("A stored constant has no fixed shape.", where=str(self.shape))
        return math.prod(cast("tuple[int, ...]", self.shape))


def parse_element_type(number: int) -> ElementType:
    """The element type with this `MIL.proto` number.

    Raises:
        BadInputError: the number is none that is known here.
    """
    if number not in ELEMENT_TYPES:
        raise BadInputError(
            f"The program uses an element type that can't be read (MIL data type {number}).",
            allowed=sorted(kind.name for kind in ELEMENT_TYPES.values()),
        )
    return ELEMENT_TYPES[number]


def parse_type(proto: Any) -> TensorType | None:
    """A `ValueType` message as a TensorType; a state's is its tensor's; None for lists, tuples, dictionaries."""
    kind = proto.WhichOneof("type")
    if kind == "stateType":
        return parse_type(proto.stateType.wrappedType)
    if kind != "tensorType":
        return None
    tensor = proto.tensorType
    sizes: list[int | None] = []
    for dimension in tensor.dimensions:
        if dimension.WhichOneof("dimension") == "constant":
            sizes.append(int(dimension.constant.size))
        elif dimension.unknown.variadic:
            return TensorType(parse_element_type(tensor.dataType), None)
        else:
            sizes.append(None)
    return TensorType(parse_element_type(tensor.dataType), tuple(sizes))


def unpack_bits(packed: np.ndarray, bits: int, count: int, *, signed: bool) -> np.ndarray:
    """The elements that bytes hold, least significant bit first.

    Args:
        packed: uint8, shape (ceil(count * bits / 8),).
        bits: width of an element, 1 to 8.
        signed: elements are two's complement.

    Returns:
        int8 (signed) or uint8, shape (count,).

    Raises:
        BadInputError: there are fewer bytes than `count` elements need.
    """
    if packed.size * 8 < count * bits:
        raise BadInputError(f"{packed.size} bytes can't hold {count} elements of {bits} bits.")
    if bits == 4:  # the common case, ten times faster than single bits
        codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(-1)[:count]
    else:
        codes = packing.unpack_bits(packed, bits, count)
    if not signed:
        return codes
    shift = 8 - bits
    return (codes << shift).view(np.int8) >> shift


def decode_bytes(raw: np.ndarray, element: ElementType, count: int) -> np.ndarray:
    """Bytes as an array of `count` elements of a stored type, flat; a view of the bytes where nothing is packed.

    Raises:
        BadInputError: the bytes are not as many as the type needs.
    """
    if element.bits < 8:
        return unpack_bits(raw, element.bits, count, signed=element.is_signed)
    if raw.size != count * element.bits // 8:
        raise BadInputError(f"{count} elements of {element.name} need other than {raw.size} bytes.")
    if element.name == "bfloat16":
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return raw.view(element.array)


def decode_immediate(proto: Any, kind: TensorType) -> np.ndarray:
    """The array that a `TensorValue` message holds, in the type's shape.

    Raises:
        BadInputError: the message holds another number of elements than the type says.
    """
    field = proto.WhichOneof("value")
    values = getattr(proto, field).values if field else b""
    count = kind.count
    if field == "bytes":
        flat = decode_bytes(np.frombuffer(values, np.uint8), kind.element, count)
    else:
        dtype = object if kind.element.name == "string" else kind.element.array
        if len(values) != count:
            raise BadInputError(f"A constant holds {len(values)} elements where its type has {count}.")
        try:
            flat = np.array(list(values), dtype=dtype)
        except (OverflowError, ValueError) as error:
            raise BadInputError(f"A constant's values don't fit {kind.element.name}: {error}.") from error
    return flat.reshape(cast("tuple[int, ...]", kind.shape))
