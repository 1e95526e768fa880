"""Write an ONNX graph to one file, a weight at a time.

`onnx.save` holds a model's weights three times: in the graph, in the protobuf message, and in the bytes
of that message. A protobuf message may come in pieces, though: "parsing the concatenation of two encoded
messages gives the same result as merging them" (protobuf encoding specification, "Last One Wins"). So the
graph is written first and every initializer is appended as a message of its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import onnx
import onnx_ir as ir

FILE = "model.onnx"
PROTOBUF_LIMIT = 2**31 - 2**20
"""Bytes that one protobuf message can hold, less room for the graph itself."""


def save(program: ir.Model, out: Path, file_name: str = FILE) -> None:
    """Write an ONNX file, with the weights beside it in `<file_name>.data` when they pass protobuf's 2 GB."""
    initializers = program.graph.initializers
    size = sum(value.const_value.nbytes for value in initializers.values() if value.const_value is not None)
    if size >= PROTOBUF_LIMIT:
        ir.save(program, out / file_name, external_data=f"{file_name}.data")
        return
    weights = dict(initializers)
    initializers.clear()
    try:
        graph = ir.to_proto(program).SerializeToString(deterministic=True)
    finally:
        initializers.update(weights)
    with (out / file_name).open("wb") as file:
        file.write(graph)
        for name, value in weights.items():
            if value.const_value is not None:
                tensor = ir.to_proto(value.const_value)
                # The name that counts is the value's: fusions leave tensors without one.
                tensor.name = name
                _append(file, tensor)


def _append(file: BinaryIO, tensor: onnx.TensorProto) -> None:
    """Write ModelProto(graph=GraphProto(initializer=[tensor])), the tensor's raw data last and uncopied."""
    raw = tensor.raw_data
    tensor.ClearField("raw_data")
    head = tensor.SerializeToString(deterministic=True)
    if raw:
        head += _length_field(onnx.TensorProto.RAW_DATA_FIELD_NUMBER, len(raw))
    in_graph = _length_field(onnx.GraphProto.INITIALIZER_FIELD_NUMBER, len(head) + len(raw))
    in_model = _length_field(onnx.ModelProto.GRAPH_FIELD_NUMBER, len(in_graph) + len(head) + len(raw))
    file.write(in_model + in_graph + head)
    file.write(raw)


def _length_field(number: int, length: int) -> bytes:
    """The start of a length-delimited field (wire type 2): its tag and its length, both as varints."""
    return _varint(number << 3 | 2) + _varint(length)


def _varint(value: int) -> bytes:
    """A whole number in base 128, low digits first, the high bit set on all but the last."""
    digits = []
    while value > 127:
        digits.append(value & 127 | 128)
        value >>= 7
    return bytes([*digits, value])
