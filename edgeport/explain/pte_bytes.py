"""Where the bytes of a .pte file lie: its program, and the segments behind it.

executorch's schema/program.fbs: a segment is a delegate's payload, the constants of the program's own kernels, or one
piece of named data, which an XNNPACK payload refers to by key. A Core ML delegate's payload is a package, told file by
file.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from edgeport.errors import BadInputError
from edgeport.explain.document import Part
from edgeport.explain.package_bytes import package_spans
from edgeport.explain.spans import Span, cover
from edgeport.export.executorch.folder import file_regions, unflatten_folder
from edgeport.export.executorch.pte import EMBEDDINGS, QUANTIZED_TYPES, read_program, xnnpack_payloads
from edgeport.export.executorch.shell import BACKEND, PACKAGE

WIDTHS = {0: 1, 1: 1, 2: 2, 3: 4, 4: 8, 5: 2, 6: 4, 7: 8, 11: 1, 15: 2, 27: 2, 28: 4, 29: 8}
"""Bytes of one number, by executorch's ScalarType."""
FLOAT_TYPES = {5, 6, 7, 15}
TABLE: tuple[Part, Part] = ("codes", "scales")
"""The first arguments of an embedding kernel."""


def pte_spans(path: Path, weights: Mapping[str, str], parameters: tuple[str, ...]) -> list[Span]:
    """Every byte of a .pte file.

    Args:
        weights: for each compressed parameter, its places in the file, as `edgeport.export.executorch.pte` names them;
            of a Core ML program the constants' names.
        parameters: names of all of the model's weights.

    Raises:
        BadInputError: the file is missing or damaged.
    """
    # Read as a whole first: that refuses what is no program.
    whole = read_program(path)
    from executorch.exir._serialize._program import _flatbuffer_to_program, _get_extended_header
    from executorch.exir.schema import DataLocation

    data = path.read_bytes()
    header = _get_extended_header(data)
    if header is None or header.segment_base_offset == 0:
        return cover([], 0, len(data), "graph")
    program = _flatbuffer_to_program(data[: header.program_size])
    base = header.segment_base_offset
    segments = [(base + segment.offset, segment.size) for segment in program.segments]
    spans = [Span(0, header.program_size, "graph")]
    for plan in program.execution_plan:
        for delegate in plan.delegates:
            if delegate.processed.location != DataLocation.SEGMENT:
                continue
            start, size = segments[delegate.processed.index]
            if delegate.id == BACKEND:
                spans += _package(data[start : start + size], start, weights, parameters)
            else:
                spans.append(Span(start, start + size, "graph"))
    spans += _constants(program, segments, _kernel_places(weights))
    named = {entry.key: segments[entry.segment_index] for entry in program.named_data or ()}
    spans += _named(whole, named, weights)
    return cover(spans, 0, len(data), "alignment")


def _package(payload: bytes, start: int, weights: Mapping[str, str], parameters: tuple[str, ...]) -> Iterator[Span]:
    """The files of a package inside a payload, which lies at `start`; what is around them lists them."""
    regions = file_regions(payload)
    with tempfile.TemporaryDirectory() as folder:
        unflatten_folder(payload, Path(folder))
        found = package_spans(Path(folder) / PACKAGE, weights, parameters)
    inner = [
        span.moved(regions[f"{PACKAGE}/{name}"][0])
        for name, spans in found.items()
        if regions[f"{PACKAGE}/{name}"][1]
        for span in spans
    ]
    yield from (span.moved(start) for span in cover(inner, 0, len(payload), "metadata"))


def _kernel_places(weights: Mapping[str, str]) -> dict[tuple[str, int], str]:
    """(method, instruction) of each embedding kernel, with its parameter."""
    found = {}
    for parameter, places in weights.items():
        for place in places.split(" + "):
            parts = place.split("/")
            if len(parts) >= 2 and parts[-2] == "kernel":
                found["/".join(parts[:-2]) or "forward", int(parts[-1])] = parameter
    return found


def _constants(program: Any, segments: list[tuple[int, int]], places: Mapping[tuple[str, int], str]) -> Iterator[Span]:
    """The constants that the program's own kernels read; those of an embedding kernel with their parameter."""
    segment = program.constant_segment
    if segment is None or not segment.offsets:
        return
    base, _ = segments[segment.segment_index]
    known: dict[int, tuple[Part, str | None]] = {}
    for plan in program.execution_plan:
        for index, instruction in enumerate(plan.chains[0].instructions):
            call = instruction.instr_args
            parameter = places.get((plan.name, index))
            if (
                parameter is None
                or not hasattr(call, "op_index")
                or plan.operators[call.op_index].name not in EMBEDDINGS
            ):
                continue
            for argument, part in zip(call.args[:2], TABLE, strict=True):
                known[plan.values[argument].val.data_buffer_idx] = part, parameter
    found: dict[int, int] = {}
    for plan in program.execution_plan:
        for tensor in (value.val for value in plan.values):
            buffer = getattr(tensor, "data_buffer_idx", 0)
            if not buffer or getattr(tensor, "allocation_info", None) is not None:
                continue
            scalar = int(tensor.scalar_type)
            if scalar not in WIDTHS:
                raise BadInputError(f"The program has a constant of ExecuTorch's scalar type {scalar}.")
            known.setdefault(buffer, ("floats" if scalar in FLOAT_TYPES else "graph", None))
            # Views of one buffer: the largest has all of its bytes.
            found[buffer] = max(found.get(buffer, 0), math.prod(tensor.sizes) * WIDTHS[scalar])
    for buffer, size in found.items():
        start = base + segment.offsets[buffer]
        yield Span(start, start + size, known[buffer][0], f"constant {buffer}", known[buffer][1])


def _named(whole: Any, named: Mapping[str, tuple[int, int]], weights: Mapping[str, str]) -> Iterator[Span]:
    """Named data: codes, scales and floats of the XNNPACK delegates that refer to it."""
    parameters = {place: name for name, places in weights.items() for place in places.split(" + ")}
    told: dict[str, tuple[Part, str | None]] = {}
    for number, payload in enumerate(xnnpack_payloads(whole) if named else ()):
        keys = [entry["named_key"] for entry in payload.graph["constant_data"]]
        for index, entry in enumerate(payload.graph["xvalues"]):
            union = entry["xvalue_union"]
            tensor = union.get("tensor_value", union)
            parameter = parameters.get(f"xnnpack/{number}/{index}")
            quantized = tensor["datatype"] in QUANTIZED_TYPES
            if tensor["constant_buffer_idx"]:
                told.setdefault(keys[tensor["constant_buffer_idx"]], ("codes" if quantized else "floats", parameter))
            scales = (union.get("quant_params") or {}).get("scale_buffer_idx")
            if scales:
                told.setdefault(keys[scales], ("scales", parameter))
    for key, (start, size) in named.items():
        part, parameter = told.get(key, ("floats", None))
        yield Span(start, start + size, part, key, parameter)
