"""Put the one table of an ORT-format file that comes in random order into a fixed order.

ONNX Runtime writes the types that kernels are looked up by (`KernelTypeStrResolver` in its flatbuffers
schema, onnxruntime/core/flatbuffers/schema/ort.fbs) by walking a hash table, whose order differs from run to
run. The same table is built again here, sorted, and set at the end of the file; its old place is zeroed.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import flatbuffers  # type: ignore[import-untyped]

from edgeport.storage import write_bytes

RESOLVER_FIELD = 10
"""Place of the resolver in the vtable of `InferenceSession`."""

ALIGNMENT = 16
MOST_PADDING = 8
"""Bytes between neighbours in a flatbuffer at most, for alignment."""

_Argument = tuple[int, int]
_Span = tuple[int, int]
_Entry = tuple[bytes, list[tuple[bytes, list[_Argument]]]]


def _entries(resolver: Any) -> list[_Entry]:
    """(operator, [(type's name, [(input or output, index)])]), sorted by operator and name."""
    found = []
    for i in range(resolver.OpKernelTypeStrArgsLength()):
        operator = resolver.OpKernelTypeStrArgs(i)
        types = []
        for j in range(operator.KernelTypeStrArgsLength()):
            named = operator.KernelTypeStrArgs(j)
            arguments = [(named.Args(k).ArgType(), named.Args(k).Index()) for k in range(named.ArgsLength())]
            types.append((named.KernelTypeStr(), arguments))
        found.append((operator.OpId(), sorted(types)))
    return sorted(found)


def _vector(builder: flatbuffers.Builder, offsets: list[int]) -> int:
    builder.StartVector(4, len(offsets), 4)
    for offset in reversed(offsets):
        builder.PrependUOffsetTRelative(offset)
    return int(builder.EndVector())


def _build(entries: list[_Entry]) -> tuple[bytes, int]:
    """The table as a flatbuffer of its own, and the position of its root in it."""
    from onnxruntime.tools.ort_format_model.ort_flatbuffers_py.fbs import (
        ArgTypeAndIndex,
        KernelTypeStrArgsEntry,
        KernelTypeStrResolver,
        OpIdKernelTypeStrArgsEntry,
    )

    builder = flatbuffers.Builder(4096)
    operators = []
    for operator, types in entries:
        named = []
        for name, arguments in types:
            places = []
            for kind, index in arguments:
                ArgTypeAndIndex.Start(builder)
                ArgTypeAndIndex.AddArgType(builder, kind)
                ArgTypeAndIndex.AddIndex(builder, index)
                places.append(ArgTypeAndIndex.End(builder))
            text, vector = builder.CreateString(name), _vector(builder, places)
            KernelTypeStrArgsEntry.Start(builder)
            KernelTypeStrArgsEntry.AddKernelTypeStr(builder, text)
            KernelTypeStrArgsEntry.AddArgs(builder, vector)
            named.append(KernelTypeStrArgsEntry.End(builder))
        text, vector = builder.CreateString(operator), _vector(builder, named)
        OpIdKernelTypeStrArgsEntry.Start(builder)
        OpIdKernelTypeStrArgsEntry.AddOpId(builder, text)
        OpIdKernelTypeStrArgsEntry.AddKernelTypeStrArgs(builder, vector)
        operators.append(OpIdKernelTypeStrArgsEntry.End(builder))
    vector = _vector(builder, operators)
    KernelTypeStrResolver.Start(builder)
    KernelTypeStrResolver.AddOpKernelTypeStrArgs(builder, vector)
    builder.Finish(KernelTypeStrResolver.End(builder))
    blob = bytes(builder.Output())
    return blob, struct.unpack_from("<I", blob)[0]


def _table_spans(table: Any) -> Iterator[_Span]:
    """A table's own fields, and its vtable."""
    vtable = table.Pos - struct.unpack_from("<i", table.Bytes, table.Pos)[0]
    width, fields = struct.unpack_from("<HH", table.Bytes, vtable)
    yield vtable, vtable + width
    yield table.Pos, table.Pos + fields


def _spans(resolver: Any) -> Iterator[_Span]:
    """First byte and one past the last of everything the resolver reaches, in no order."""

    def string(table: Any, field: int) -> _Span:
        start = table.Indirect(table.Pos + table.Offset(field))
        return start, int(start + 4 + struct.unpack_from("<I", table.Bytes, start)[0] + 1)

    def vector(table: Any, field: int) -> _Span:
        start = int(table.Vector(table.Offset(field)))
        return start - 4, start + 4 * table.VectorLen(table.Offset(field))

    yield from _table_spans(resolver._tab)
    yield vector(resolver._tab, 4)
    for i in range(resolver.OpKernelTypeStrArgsLength()):
        operator = resolver.OpKernelTypeStrArgs(i)
        yield from (*_table_spans(operator._tab), string(operator._tab, 4), vector(operator._tab, 6))
        for j in range(operator.KernelTypeStrArgsLength()):
            named = operator.KernelTypeStrArgs(j)
            yield from (*_table_spans(named._tab), string(named._tab, 4), vector(named._tab, 6))
            for k in range(named.ArgsLength()):
                yield from _table_spans(named.Args(k)._tab)


def _own_end(start: int, spans: Iterable[_Span]) -> int:
    """Where the resolver's own bytes end, which begin at `start` and leave no gap but for alignment.

    What it shares with the rest of the file lies beyond: strings and vtables that the model had before it.
    """
    end = start
    for first, last in sorted(spans):
        if first > end + MOST_PADDING:
            break
        end = max(end, last)
    return end


def fix_order(path: Path) -> None:
    """Rewrite an ORT-format file so that the same model gives the same bytes."""
    from onnxruntime.tools.ort_format_model.ort_flatbuffers_py.fbs.InferenceSession import InferenceSession

    data = bytearray(path.read_bytes())
    session = InferenceSession.GetRootAs(data, 0)
    root, resolver = session._tab, session.KernelTypeStrResolver()
    blob, position = _build(_entries(resolver))
    # A flatbuffer is written from its end to its start: between the root, written last, and the first byte
    # past the resolver lies the resolver alone.
    start = max(last for _, last in _table_spans(root))
    end = _own_end(start, _spans(resolver))
    data[start:end] = bytes(end - start)
    data.extend(bytes(-len(data) % ALIGNMENT))
    slot = root.Pos + root.Offset(RESOLVER_FIELD)
    struct.pack_into("<I", data, slot, len(data) + position - slot)
    write_bytes(path, bytes(data) + blob)
