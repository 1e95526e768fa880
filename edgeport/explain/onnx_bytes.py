"""Where an ONNX file's bytes lie: the wire format of protobuf walked by hand, so that each byte has its place.

onnx.proto: ModelProto.graph = 7, GraphProto.initializer = 5, TensorProto: data_type 2, name 8, raw_data 9,
external_data 13 (key 1, value 2 of each entry). Lengths and tags: protobuf's encoding specification.
"""

from __future__ import annotations

import mmap
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from edgeport.errors import BadInputError
from edgeport.explain.document import Part
from edgeport.explain.spans import Span, cover

GRAPH, INITIALIZER = 7, 5
DATA_TYPE, NAME, RAW_DATA, EXTERNAL = 2, 8, 9, 13
FLOATS = {1, 10, 11, 16}
"""TensorProto.DataType: FLOAT, FLOAT16, DOUBLE, BFLOAT16."""
BEGINNINGS: dict[str, Part] = {"codes": "codes", "scale": "scales", "zero_point": "zero_points"}
"""How an initializer's name goes on behind its parameter's."""
VARINT, FIXED64, LENGTH, FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True)
class Initializer:
    """One stored tensor: its data lies at `start` to `stop` of the ONNX file, or of `location` beside it."""

    name: str
    data_type: int
    start: int
    stop: int
    location: str | None = None


def onnx_spans(path: Path, parameters: Collection[str]) -> dict[str, list[Span]]:
    """Every byte of an ONNX file and of the data files that it names, by file name.

    Args:
        parameters: names of the model's weights, to know them again by.

    Raises:
        BadInputError: a file is missing, damaged or cut off.
    """
    found: dict[str, list[Span]] = {path.name: []}
    for item in read_initializers(path):
        part, parameter = read_name(item.name, item.data_type in FLOATS, parameters)
        span = Span(item.start, item.stop, part, item.name, parameter)
        found.setdefault(item.location or path.name, []).append(span)
    sizes = {name: _size(path.with_name(name)) for name in found}
    return {
        name: cover(spans, 0, sizes[name], "graph" if name == path.name else "alignment")
        for name, spans in found.items()
    }


def read_initializers(path: Path) -> list[Initializer]:
    """The initializers of an ONNX file, in the file's order.

    Raises:
        BadInputError: the file is missing, or no ONNX file.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return [
                _initializer(data, *tensor)
                for graph in _messages(data, 0, len(data), GRAPH)
                for tensor in _messages(data, *graph, INITIALIZER)
            ]
    except (OSError, ValueError, IndexError) as error:
        raise BadInputError(f"The ONNX file can't be read: {error}.", where=path) from error


def read_name(name: str, floats: bool, parameters: Collection[str]) -> tuple[Part, str | None]:
    """What an initializer says and of which parameter, by the names that `edgeport.export.onnx` gives.

    Args:
        floats: it holds floating-point numbers.
    """
    plain = name.removeprefix("module.").removesuffix(".half")
    if plain in parameters:
        return "floats", plain
    # The longest: a layer's name may begin with another's.
    parameter = max((p for p in parameters if name.startswith(f"{p}.")), key=len, default=None)
    if parameter is not None:
        rest = name.removeprefix(f"{parameter}.").removeprefix("joined.").removeprefix("bias.")
        for start, part in BEGINNINGS.items():
            if rest.startswith(start):
                return part, parameter
        return ("floats" if floats else "graph"), parameter
    if name.startswith("activation_"):
        return ("scales" if name.endswith("scale") else "zero_points"), None
    if name.startswith(("edgeport.zeros_", "edgeport.int32_zeros_")):
        return "zero_points", None
    return ("floats" if floats and not name.startswith("edgeport.") else "graph"), None


def _size(path: Path) -> int:
    if not path.is_file():
        raise BadInputError("The model's data file is missing.", where=path)
    return path.stat().st_size


def _initializer(data: mmap.mmap, start: int, stop: int) -> Initializer:
    name, data_type, raw, external = "", 0, (start, start), {}
    for number, first, last in _fields(data, start, stop):
        if number == NAME:
            name = data[first:last].decode()
        elif number == DATA_TYPE:
            data_type = first
        elif number == RAW_DATA:
            raw = (first, last)
        elif number == EXTERNAL:
            pair = {key: data[a:b].decode() for key, a, b in _fields(data, first, last)}
            external[pair[1]] = pair[2]
    if not external:
        return Initializer(name, data_type, *raw)
    offset = int(external.get("offset", 0))
    return Initializer(name, data_type, offset, offset + int(external["length"]), external["location"])


def _messages(data: mmap.mmap, start: int, stop: int, wanted: int) -> Iterator[tuple[int, int]]:
    return ((first, last) for number, first, last in _fields(data, start, stop) if number == wanted)


def _fields(data: mmap.mmap, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """(number, first byte, one past the last) of each field of a message; of a varint its value stands for the first.

    Raises:
        ValueError: this is no message.
    """
    at = start
    while at < stop:
        tag, at = _varint(data, at)
        number, wire = tag >> 3, tag & 7
        if wire == VARINT:
            value, at = _varint(data, at)
            yield number, value, at
            continue
        if wire == LENGTH:
            length, at = _varint(data, at)
        elif wire in (FIXED64, FIXED32):
            length = 8 if wire == FIXED64 else 4
        else:
            raise ValueError("it is no ONNX file")
        if at + length > stop:
            raise ValueError("it is cut off")
        yield number, at, at + length
        at += length


def _varint(data: mmap.mmap, at: int) -> tuple[int, int]:
    """A whole number in base 128, low digits first, and the place behind it."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
        if shift > 63:
            raise ValueError("it is no ONNX file")
