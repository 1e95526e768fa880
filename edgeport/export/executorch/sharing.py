"""Store equal bytes once: a tied embedding and head keep a single copy of their weight in the file.

An embedding is a kernel of the runtime and reads its table from the program's constants; a head is a
Linear and reads its weight from XNNPACK's named data. executorch writes each into a segment of its own.
A segment is an offset and a size (schema/program.fbs, `DataSegment`), and nothing says that two may not
overlap: where named data equals a constant, byte for byte, its segment is pointed at the constant.
"""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

from edgeport.storage import write_bytes

SEGMENT_ALIGNMENT = 128
"""As executorch's own writer aligns segments in a file."""

LEAST_BYTES = 4096
"""Smaller duplicates are not worth an entry."""


def _pad(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


def share_segments(path: Path) -> None:
    """Store the named data of a .pte file that equals one of its constants as that constant, in place.

    A program without such duplicates is left as it is. The file is mapped, not read: it is as large as the model.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        smaller = _shared(data)
    if smaller is not None:
        write_bytes(path, smaller)


def _shared(data: mmap.mmap) -> bytes | None:
    """The smaller program, or None when nothing in it is stored twice."""
    from executorch.exir._serialize import _program as writer
    from executorch.exir.schema import DataSegment

    header = writer._get_extended_header(data[: 8 + writer._ExtendedHeader.EXPECTED_LENGTH])
    if header is None:
        return None
    program = writer._flatbuffer_to_program(data[: header.program_size])
    if not program.constant_segment.offsets or not program.named_data:
        return None
    starts = [header.segment_base_offset + segment.offset for segment in program.segments]
    home = program.constant_segment.segment_index
    shared: dict[int, int] = {}
    for index in sorted({entry.segment_index for entry in program.named_data}):
        size = program.segments[index].size
        if size < LEAST_BYTES:
            continue
        content = data[starts[index] : starts[index] + size]
        for offset in program.constant_segment.offsets:
            first = starts[home] + offset
            # The first bytes tell most of them apart without a copy of the rest.
            if data[first : first + 64] == content[:64] and data[first : first + size] == content:
                shared[index] = offset
    if not shared:
        return None
    end, body = 0, bytearray()
    places: list[DataSegment] = []
    for index, segment in enumerate(program.segments):
        if index in shared:
            places.append(DataSegment(offset=-1, size=segment.size))
            continue
        body.extend(b"\0" * (end - len(body)))
        places.append(DataSegment(offset=end, size=segment.size))
        body.extend(data[starts[index] : starts[index] + segment.size])
        end = _pad(end + segment.size, SEGMENT_ALIGNMENT)
    for index, offset in shared.items():
        places[index].offset = places[home].offset + offset
    program.segments = places
    return _join(writer, program, bytes(body))


def _join(writer: Any, program: Any, body: bytes) -> bytes:
    """Program and segments as one file, as executorch's `serialize_pte_binary` lays it out."""
    result = writer._program_to_flatbuffer(program, constant_tensor_alignment=writer.ALIGNMENT)
    length = _pad(writer._ExtendedHeader.EXPECTED_LENGTH, result.max_alignment)
    size = length + len(result.data)
    base = _pad(size, SEGMENT_ALIGNMENT)
    header = writer._ExtendedHeader(program_size=size, segment_base_offset=base, segment_data_size=len(body))
    head: bytes = writer._insert_flatbuffer_header(
        flatbuffer_data=result.data,
        magic_regex=r"ET[0-9a-zA-Z][0-9a-zA-Z]",
        header_data=writer.pad_to(header.to_bytes(), length),
    )
    return head.ljust(base, b"\0") + body
