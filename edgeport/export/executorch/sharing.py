"""Store equal bytes once: a tied embedding and head keep a single copy of their weight in the file.

An embedding is a kernel of the runtime and reads its table from the program's constants; a head is a
Linear and reads its weight from XNNPACK's named data. executorch writes each into a segment of its own.
A segment is an offset and a size (schema/program.fbs, `DataSegment`), and nothing says that two may not
overlap: where named data equals a constant, byte for byte, its segment is pointed at the constant.
"""

from __future__ import annotations

from typing import Any

SEGMENT_ALIGNMENT = 128
"""As executorch's own writer aligns segments in a file."""

LEAST_BYTES = 4096
"""Smaller duplicates are not worth an entry."""


def _pad(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


def share_segments(data: bytes) -> bytes:
    """The same program, with named data that equals a constant stored as that constant.

    Args:
        data: a .pte file; without such duplicates it comes back as it is.
    """
    from executorch.exir._serialize import _program as writer
    from executorch.exir.schema import DataSegment

    header = writer._get_extended_header(data)
    if header is None:
        return data
    program = writer._flatbuffer_to_program(data[: header.program_size])
    base = header.segment_base_offset
    segments = [data[base + s.offset : base + s.offset + s.size] for s in program.segments]
    if not program.constant_segment.offsets or not program.named_data:
        return data
    home = program.constant_segment.segment_index
    shared: dict[int, int] = {}
    for index in {entry.segment_index for entry in program.named_data}:
        for start in program.constant_segment.offsets:
            if len(segments[index]) >= LEAST_BYTES and segments[home].startswith(segments[index], start):
                shared[index] = start
    if not shared:
        return data
    end, body = 0, bytearray()
    places: list[DataSegment] = []
    for index, content in enumerate(segments):
        if index in shared:
            places.append(DataSegment(offset=-1, size=len(content)))
            continue
        body.extend(b"\0" * (end - len(body)))
        places.append(DataSegment(offset=end, size=len(content)))
        body.extend(content)
        end = _pad(end + len(content), SEGMENT_ALIGNMENT)
    for index, start in shared.items():
        places[index].offset = places[home].offset + start
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
