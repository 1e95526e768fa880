"""Codes narrower than a byte, packed as `MatMulNBits` and `GatherBlockQuantized` define it.

Operator definitions: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md. A code is stored
with half its range added (0 becomes 8 in 4 bits), the first of a byte in the lowest bits.
"""

from __future__ import annotations

import numpy as np


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes -2**(bits-1) ... 2**(bits-1)-1 (..., K) int8 as bytes (..., ceil(K * bits / 8)) uint8.

    `bits` is 2, 4 or 8. Bits of the last byte that hold no code are 0.
    """
    per_byte = 8 // bits
    shifted = (codes.astype(np.int16) + 2 ** (bits - 1)).astype(np.uint8)
    room = -shifted.shape[-1] % per_byte
    if room:
        shifted = np.concatenate([shifted, np.zeros((*shifted.shape[:-1], room), np.uint8)], -1)
    packed: np.ndarray = shifted[..., 0::per_byte].copy()
    for index in range(1, per_byte):
        packed |= shifted[..., index::per_byte] << (index * bits)
    return packed


def unpack(packed: np.ndarray, bits: int, columns: int) -> np.ndarray:
    """Undo `pack`: the first `columns` codes of each row, int8."""
    per_byte = 8 // bits
    codes = np.empty((*packed.shape[:-1], packed.shape[-1] * per_byte), np.int8)
    for index in range(per_byte):
        stored = (packed >> (index * bits)) & (2**bits - 1)
        codes[..., index::per_byte] = (stored.astype(np.int16) - 2 ** (bits - 1)).astype(np.int8)
    return np.ascontiguousarray(codes[..., :columns])
