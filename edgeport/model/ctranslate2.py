"""Read the tensors of a CTranslate2 `model.bin`, without CTranslate2.

Layout, after `ctranslate2/specs/model_spec.py` of OpenNMT/CTranslate2, little endian: uint32 format version,
string spec name, uint32 revision, uint32 count, then for each variable: string name, uint8 rank, uint32 sizes,
uint8 type, uint32 bytes, data; then uint32 count of aliases: string alias, string name. A string is a uint16
length and that many bytes, the last of them zero.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgeport.errors import BadInputError

FORMAT_VERSION = 6
DTYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}


@dataclass
class _Cursor:
    """A place in the file's bytes that never runs past their end."""

    data: memoryview
    offset: int = 0

    def take(self, count: int) -> memoryview:
        if count > len(self.data) - self.offset:
            raise ValueError(f"{count} bytes wanted at {self.offset}, the file ends at {len(self.data)}")
        self.offset += count
        return self.data[self.offset - count : self.offset]

    def number(self, form: str) -> int:
        value: int = struct.unpack(f"<{form}", self.take(struct.calcsize(f"<{form}")))[0]
        return value

    def string(self) -> str:
        return bytes(self.take(self.number("H"))).rstrip(b"\0").decode()


def read_ctranslate2(path: Path) -> tuple[str, dict[str, np.ndarray]]:
    """The spec's name ("WhisperSpec") and every variable by name; aliases are left out.

    Raises:
        BadInputError: the file is missing, truncated, of another version, or holds an unknown type.
    """
    if not path.is_file():
        raise BadInputError("The CTranslate2 file is missing.", where=path)
    cursor = _Cursor(memoryview(path.read_bytes()))
    try:
        version = cursor.number("I")
        if version != FORMAT_VERSION:
            raise BadInputError(f"The file has CTranslate2 format {version}.", where=path, allowed=f"{FORMAT_VERSION}")
        spec = cursor.string()
        cursor.number("I")  # revision of the spec
        variables = dict(_variable(cursor) for _ in range(cursor.number("I")))
    except (ValueError, KeyError, struct.error) as error:
        raise BadInputError(f"The CTranslate2 file is truncated or damaged: {error}.", where=path) from error
    return spec, variables


def _variable(cursor: _Cursor) -> tuple[str, np.ndarray]:
    name = cursor.string()
    shape = tuple(cursor.number("I") for _ in range(cursor.number("B")))
    dtype = np.dtype(DTYPES[cursor.number("B")])
    data = cursor.take(cursor.number("I"))
    return name, np.frombuffer(data, dtype).reshape(shape)
