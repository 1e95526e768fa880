"""Codes of 1 to 8 bits packed densely: code i takes the bits i * b to (i + 1) * b - 1 of a little-endian bit string.

Bit j of the string is bit j % 8 of byte j // 8, so that the least significant bit comes first everywhere. The last
byte is filled up with zeros. This is edgeport's own form for storing; backends have theirs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

CHUNK = 1 << 20
"""Codes unpacked to single bits at a time; a multiple of 8, so that chunks meet on whole bytes."""


def packed_size(count: int, bits: int) -> int:
    """Bytes that `count` codes take."""
    return (count * bits + 7) // 8


def pack_bits(codes: np.ndarray, bits: int) -> np.ndarray:
    """Pack codes.

    Args:
        codes: uint8 (n,); their bits from `bits` upwards are ignored, so that two's complement can be packed too.
        bits: 1 to 8.

    Returns:
        uint8 (packed_size(n, bits),).
    """
    import numpy as np

    packed = np.zeros(packed_size(codes.size, bits), np.uint8)
    for start in range(0, codes.size, CHUNK):
        part = codes[start : start + CHUNK, None]
        single = np.unpackbits(part, axis=1, count=bits, bitorder="little")
        piece = np.packbits(single, bitorder="little")
        packed[start * bits // 8 :][: piece.size] = piece
    return packed


def unpack_bits(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Undo `pack_bits`.

    Args:
        packed: uint8 (packed_size(count, bits),).
        count: how many codes.

    Returns:
        uint8 (count,), 0 to 2**bits - 1.
    """
    import numpy as np

    codes = np.empty(count, np.uint8)
    for start in range(0, count, CHUNK):
        size = min(CHUNK, count - start)
        piece = packed[start * bits // 8 :][: packed_size(size, bits)]
        single = np.unpackbits(piece, count=size * bits, bitorder="little").reshape(size, bits)
        codes[start : start + size] = np.packbits(single, axis=1, bitorder="little")[:, 0]
    return codes
