"""weight.bin: Core ML's blob storage format, version 2.

A 64-byte header (count: uint32, version: uint32, reserved), then blobs. A program names a blob by the offset of its
64-byte metadata record: sentinel 0xDEADBEEF: uint32, element type: uint32, size in bytes: uint64, offset of the
data: uint64, padding in bits: uint64, reserved. Little endian; data starts at multiples of 64
(coremltools, `mlmodel/src/MILBlob/Blob/StorageFormat.hpp`).
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

from edgeport.errors import BadInputError
from edgeport.mlpackage.values import ElementType, decode_bytes

HEADER = struct.Struct("<II56x")
RECORD = struct.Struct("<IIQQQ32x")
SENTINEL = 0xDEADBEEF
VERSION = 2
# `BlobDataType` of StorageFormat.hpp, by the MIL name of the element.
STORED_TYPES = {
    1: "fp16",
    2: "fp32",
    3: "uint8",
    4: "int8",
    5: "bfloat16",
    6: "int16",
    7: "uint16",
    8: "int4",
    9: "uint1",
    10: "uint2",
    11: "uint4",
    12: "uint3",
    13: "uint6",
    14: "int32",
    15: "uint32",
}


class BlobFile:
    """One weight file, memory-mapped.

    The mapping is copy-on-write: arrays are writable views (torch asks for that) and the file never changes.
    """

    def __init__(self, path: Path) -> None:
        """Map a file and check its header.

        Raises:
            BadInputError: the file is missing, too short, or of another version.
        """
        self.path = path
        try:
            self._bytes = np.memmap(path, dtype=np.uint8, mode="c")
        except (OSError, ValueError) as error:  # numpy raises ValueError for an empty file
            raise BadInputError(f"The weight file can't be read: {error}.", where=path) from error
        if self._bytes.size < HEADER.size:
            raise BadInputError("The weight file is truncated: it is shorter than its header.", where=path)
        _, version = HEADER.unpack(self._bytes[: HEADER.size].tobytes())
        if version != VERSION:
            raise BadInputError(f"The weight file has blob format version {version}.", where=path, allowed=str(VERSION))

    def read(self, offset: int, element: ElementType, count: int) -> np.ndarray:
        """The flat array whose metadata record starts at `offset`; a view where nothing is packed.

        Args:
            offset: bytes from the start of the file.
            element: the type that the program declares.
            count: elements that the program declares.

        Raises:
            BadInputError: the record or its data lies outside the file, or is not what the program declares.
        """
        where = f"{self.path} at byte {offset}"
        if offset + RECORD.size > self._bytes.size:
            raise BadInputError(
                "The weight file is truncated or the program damaged: a blob record lies outside it.", where=where
            )
        sentinel, stored, size, start, _ = RECORD.unpack(self._bytes[offset : offset + RECORD.size].tobytes())
        if sentinel != SENTINEL:
            raise BadInputError("The weight file is damaged: there is no blob record here.", where=where)
        if STORED_TYPES.get(stored) != element.name:
            raise BadInputError(
                f"The weight file holds {STORED_TYPES.get(stored, f'type {stored}')} where the program "
                f"declares {element.name}.",
                where=where,
            )
        if start + size > self._bytes.size:
            raise BadInputError("The weight file is truncated: a blob's data reaches past its end.", where=where)
        if size != (count * element.bits + 7) // 8:
            raise BadInputError(
                f"A blob has {size} bytes where the program declares {count} elements of {element.name}.", where=where
            )
        return decode_bytes(np.asarray(self._bytes[start : start + size]), element, count)
