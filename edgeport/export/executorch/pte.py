"""What a .pte file really holds: its quantized weights, its operators, its memory plan.

The file is parsed from its bytes (executorch's schema/program.fbs and
backends/xnnpack/serialization/schema.fbs); nothing that lowering remembers is used.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgeport.errors import BadInputError
from edgeport.export.executorch.quiet import load_libraries
from edgeport.quantized import QuantizedTensor

EMBEDDINGS = {"quantized_decomposed::embedding_byte": 8, "quantized_decomposed::embedding_4bit": 4}
"""Kernels that read quantized rows, and the width of their codes."""

QUANTIZED_TYPES = {"xnn_datatype_qcint8": 8, "xnn_datatype_qbint4": 4}
"""XNNPACK's types of quantized weights, and the width of their codes."""

INT8_ACTIVATIONS = ("xnn_datatype_qdint8", "xnn_datatype_qint8")
"""XNNPACK's types of activations that are quantized on the fly, and on fixed grids."""


@dataclass(frozen=True)
class XnnpackPayload:
    """One delegate: its serialised graph, and the bytes that it names."""

    graph: Mapping[str, Any]
    constants: Mapping[str, bytes]

    def constant(self, index: int) -> bytes:
        """The bytes of one constant, by its index in the graph's table."""
        return self.constants[self.graph["constant_data"][index]["named_key"]]


def read_program(path: Path) -> Any:
    """Parse a .pte file into executorch's `PTEFile`, with every segment in its place.

    Raises:
        BadInputError: it is missing, or no ExecuTorch program.
    """
    load_libraries()
    from executorch.exir._serialize._program import deserialize_pte_binary

    try:
        # A view: each segment would be a copy otherwise.
        return deserialize_pte_binary(memoryview(path.read_bytes()))
    except OSError as error:
        raise BadInputError(f"The file can't be read: {error.strerror}.", where=path) from error
    except Exception as error:
        raise BadInputError("The file is no ExecuTorch program, or it is damaged.", where=path) from error


def operators(program: Any) -> list[str]:
    """The kernels that the program calls outside of its delegates, "namespace::name.overload", sorted."""
    operators = [op for plan in program.execution_plan for op in plan.operators]
    return sorted({f"{op.name}.{op.overload}" if op.overload else op.name for op in operators})


def planned_bytes(program: Any) -> int:
    """Bytes of the memory arenas that the methods ask for. A delegate's own workspace is not in it."""
    return int(sum(sum(plan.non_const_buffer_sizes) for plan in program.execution_plan))


def delegate_data(program: Any, backend: str) -> list[bytes]:
    """The payloads of every delegate of a backend, in the program's order, method after method."""
    return [
        bytes(program.backend_delegate_data[delegate.processed.index].data)
        for plan in program.execution_plan
        for delegate in plan.delegates
        if delegate.id == backend
    ]


def _decode_graph(payload: bytes) -> Mapping[str, Any]:
    """An XNNPACK payload's flatbuffer as JSON values."""
    from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import XNNHeader, _get_schema_bytes
    from executorch.exir._serialize._flatbuffer import _flatc_decompile

    header = XNNHeader.from_bytes(payload[: XNNHeader.EXPECTED_LENGTH])
    start = header.flatbuffer_offset
    with tempfile.TemporaryDirectory() as folder:
        binary, schema = Path(folder, "graph.bin"), Path(folder, "schema.fbs")
        binary.write_bytes(payload[start : start + header.flatbuffer_size])
        schema.write_bytes(_get_schema_bytes())
        _flatc_decompile(folder, str(schema), str(binary), ["--raw-binary"])
        # flatc writes the bounds of an open clamp as bare words that are not JSON.
        text = re.sub(r"(?<=: )(-?)inf\b", r"\1Infinity", Path(folder, "graph.json").read_text())
        graph: Mapping[str, Any] = json.loads(re.sub(r"(?<=: )-?nan\b", "NaN", text))
    return graph


def xnnpack_payloads(file: Any) -> list[XnnpackPayload]:
    """The XNNPACK delegates of a parsed file."""
    named = file.named_data
    constants = {key: named.buffers[entry.buffer_index] for key, entry in named.pte_data.items()} if named else {}
    return [
        XnnpackPayload(_decode_graph(payload), constants) for payload in delegate_data(file.program, "XnnpackBackend")
    ]


def _scales(data: bytes, dtype: type[np.generic] | str, rows: int) -> torch.Tensor:
    """Stored scales as float32 (rows, groups)."""
    if dtype == "bfloat16":
        values = (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32)
    else:
        values = np.frombuffer(data, dtype).astype(np.float32)
    return torch.from_numpy(values.copy()).reshape(rows, -1)


def unpack_nibbles(data: bytes, rows: int, *, even_is_high: bool) -> torch.Tensor:
    """4-bit codes, stored plus 8 and two in a byte, as int8 (rows, K)."""
    packed = np.frombuffer(data, np.uint8).reshape(rows, -1)
    high, low = packed >> 4, packed & 15
    even, odd = (high, low) if even_is_high else (low, high)
    codes = np.stack([even, odd], axis=-1).reshape(rows, -1).astype(np.int16) - 8
    return torch.from_numpy(codes.astype(np.int8))


def _xnnpack_weight(payload: XnnpackPayload, value: Mapping[str, Any]) -> QuantizedTensor | None:
    """The quantized weight that one XNNPACK value holds, or None. Convolution kernels come as (N, C, H, W).

    They are stored as (N, H, W, C), those of depthwise convolutions as (1, H, W, N) with a scale for each of the last.
    """
    tensor, params = value["tensor_value"], value.get("quant_params")
    bits = QUANTIZED_TYPES.get(tensor["datatype"])
    if bits is None or not tensor["constant_buffer_idx"] or params is None:
        return None
    dims = tensor["dims"]
    data = payload.constant(tensor["constant_buffer_idx"])
    if bits == 4:
        codes = unpack_nibbles(data, dims[0], even_is_high=False)
    else:
        codes = torch.from_numpy(np.frombuffer(data, np.int8).copy()).reshape(dims)
    depthwise = len(dims) == 4 and params.get("channel_dim", 0) == 3
    if len(dims) == 4:
        codes = codes.permute((3, 0, 1, 2) if depthwise else (0, 3, 1, 2)).contiguous()
    dtype = "bfloat16" if bits == 4 else "float32"
    scale = _scales(payload.constant(params["scale_buffer_idx"]), dtype, codes.shape[0])
    columns = codes.numel() // codes.shape[0]
    return QuantizedTensor(
        codes, scale, None, bits, columns // scale.shape[1], scale_dtype="bfloat16" if bits == 4 else "float32"
    )


def _constant(program: Any, plan: Any, index: int) -> tuple[bytes, Sequence[int], int]:
    """Bytes, shape and executorch scalar type of a constant tensor, by its index among a plan's values."""
    tensor = plan.values[index].val
    return program.constant_buffer[tensor.data_buffer_idx].storage, tensor.sizes, int(tensor.scalar_type)


def _embedding_weight(file: Any, plan: Any, arguments: Sequence[int], bits: int) -> QuantizedTensor:
    """The table that an embedding kernel is called with.

    A 4-bit table that is also a head's weight, byte for byte, is in the head's order (`native.pack_table`).
    """
    program = file.program
    data, shape, _ = _constant(program, plan, arguments[0])
    scale_data, scale_shape, scale_type = _constant(program, plan, arguments[1])
    # A buffer carries padding up to the next one.
    data = data[: int(np.prod(shape))]
    half = scale_type == 5  # ScalarType.HALF
    scale_data = scale_data[: int(np.prod(scale_shape)) * (2 if half else 4)]
    rows = shape[0]
    if bits == 4:
        tied = file.named_data is not None and data in file.named_data.buffers
        codes = unpack_nibbles(data, rows, even_is_high=not tied)
    else:
        codes = torch.from_numpy(np.frombuffer(data, np.int8).copy()).reshape(rows, -1)
    scale = _scales(scale_data, np.float16 if half else np.float32, rows)
    return QuantizedTensor(
        codes,
        scale,
        None,
        bits,
        codes.shape[1] // scale.shape[1],
        scale_dtype="float16" if half else "float32",
    )


def stored_weights(file: Any) -> Iterator[tuple[str, QuantizedTensor]]:
    """Every quantized weight in a parsed file, under a name that says where it lies.

    `kernel/7` is the 7th instruction of the program, an embedding; `xnnpack/0/17` value 17 of delegate 0. A kernel's
    method stands before it where it is not `forward`, `encoder/kernel/7`; delegates are counted on.
    """
    for plan in file.program.execution_plan:
        method = "" if plan.name == "forward" else f"{plan.name}/"
        for index, instruction in enumerate(plan.chains[0].instructions):
            call = instruction.instr_args
            bits = EMBEDDINGS.get(plan.operators[call.op_index].name) if hasattr(call, "op_index") else None
            if bits is not None:
                yield f"{method}kernel/{index}", _embedding_weight(file, plan, call.args, bits)
    for number, payload in enumerate(xnnpack_payloads(file)):
        for index, entry in enumerate(payload.graph["xvalues"]):
            value = entry["xvalue_union"]
            weight = _xnnpack_weight(payload, value) if "tensor_value" in value else None
            if weight is not None:
                yield f"xnnpack/{number}/{index}", weight


def products_with_float_activations(file: Any) -> list[str]:
    """Places of quantized weights that XNNPACK multiplies by activations which are not int8: it computes them wrongly.

    Places are named as in `stored_weights`.
    """
    wrong = []
    for number, payload in enumerate(xnnpack_payloads(file)):
        types = {
            (tensor := entry["xvalue_union"].get("tensor_value", entry["xvalue_union"]))["id_out"]: tensor["datatype"]
            for entry in payload.graph["xvalues"]
        }
        for entry in payload.graph["xnodes"]:
            node = entry["xnode_union"]
            if types.get(node.get("filter_id")) in QUANTIZED_TYPES and types[node["input1_id"]] not in INT8_ACTIVATIONS:
                wrong.append(f"xnnpack/{number}/{node['filter_id']}")
    return wrong
