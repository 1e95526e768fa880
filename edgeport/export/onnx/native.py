"""Write each compressed weight in ONNX Runtime's native form, from its logical codes and scales.

========== =================== ==================================================================
format     used by             written as
========== =================== ==================================================================
int8       Linear, dynamic     codes (K, N) int8, scale (N,): integer arithmetic, see `dynamic.py`
int8       Embedding           Gather of codes and of scales, Cast, Mul
int8       anything else       codes in the weight's own shape: Cast, Mul
int4_gG    Linear              blocks (N, K/G, G/2) uint8, scale (N, K/G): MatMulNBits
int4_gG    Embedding           the same bytes: GatherBlockQuantized
========== =================== ==================================================================

Cast and Mul say what DequantizeLinear says, and ONNX Runtime folds them when it loads the file, so that
weight-only layers run as fast as float ones. It does not fold DequantizeLinear but runs it at every call, or
fuses it with a MatMul into one that rounds the activations to 8 bits as well, which nobody asked for.

Activations are quantized to uint8 and multiplied by int8 weights: that pair has the fastest
kernels on Arm (dot product) and on x86 with VNNI. On x86 without VNNI its 16-bit sums can saturate;
`OnnxRuntimeSession` then asks for the exact uint8 x uint8 kernels.

The codes of int4 are stored with 8 added, low nibble first, as `MatMulNBits` defines them. A weight that
is tied is stored once: all its users read the same initializer.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from edgeport.errors import TargetRefusesError
from edgeport.export.onnx.canonical import weight_nodes
from edgeport.export.onnx.dynamic import TokenQuantizer, write_int8_dynamic
from edgeport.export.onnx.graph import (
    CODES,
    MICROSOFT,
    SCALE,
    Writer,
    bias_of,
    gather_uses,
    linear_uses,
    scale_rows,
)
from edgeport.export.onnx.trace import PLACEHOLDERS
from edgeport.formats import ActivationFormat
from edgeport.quantized import QuantizedTensor


def _write_int8_float(writer: Writer, name: str, weight: ir.Value, tensor: QuantizedTensor) -> None:
    """Weight-only: the codes in the weight's own shape; whatever is no Gather reads the dequantised weight."""
    codes = writer.constant(name + CODES, tensor.codes.numpy())
    scale_shape = (tensor.rows, *[1] * (tensor.codes.ndim - 1))
    scale = writer.constant(name + SCALE, tensor.scale.numpy().reshape(scale_shape))
    for gather in gather_uses(weight):
        ids = gather.inputs[1]
        assert ids is not None
        (rows,) = writer.node(gather, "Gather", [codes, ids], axis=0)
        scale_rows(writer, gather, rows, scale, ids)
    if not weight.uses():
        return
    (floats,) = writer.node(writer.graph[0], "Cast", [codes], to=int(ir.DataType.FLOAT))
    (floats,) = writer.node(writer.graph[1], "Mul", [floats, scale])
    linears = linear_uses(weight)
    if linears:
        (turned,) = writer.node(writer.graph[2], "Transpose", [floats], perm=[1, 0])
    for linear in linears:
        bias = bias_of(linear)
        (product,) = writer.node(linear, "MatMul", [linear.inputs[0], turned])
        if bias is not None:
            (product,) = writer.node(linear, "Add", [product, bias])
        writer.replace(linear, product)
    weight.replace_all_uses_with(floats)


def pack_nibbles(codes: np.ndarray) -> np.ndarray:
    """Codes -8..7 (..., K) int8 as bytes (..., K/2) uint8: each plus 8, the even column in the low half."""
    shifted = (codes.astype(np.int16) + 8).astype(np.uint8)
    packed: np.ndarray = shifted[..., 0::2] | (shifted[..., 1::2] << 4)
    return packed


def _write_int4(
    writer: Writer, name: str, weight: ir.Value, tensor: QuantizedTensor, activation: ActivationFormat
) -> None:
    """Blocks along K for MatMulNBits; an embedding gathers from the same bytes, seen as rows."""
    rows, columns, group = tensor.rows, tensor.columns, tensor.group_size
    linears, gathers = linear_uses(weight), gather_uses(weight)
    other = [user.op_type for user, _ in weight.uses() if user not in linears and user not in gathers]
    if other:
        raise TargetRefusesError(
            f"ONNX Runtime has no 4-bit form for the operator {other[0]}.",
            where=name,
            allowed="4-bit weights in Linear and Embedding layers",
            next_step="Exclude this weight in the recipe (`exclude`), or use int8 for it.",
        )
    packed = pack_nibbles(tensor.codes.numpy())
    shape = (rows, columns // group, group // 2) if linears else (rows, columns // 2)
    codes = writer.constant(name + CODES, packed.reshape(shape))
    scale = writer.constant(name + SCALE, tensor.scale.numpy())
    for linear in linears:
        bias = bias_of(linear)
        inputs = [linear.inputs[0], codes, scale]
        if bias is not None:
            inputs += [None, None, bias]
        output = writer.node(
            linear,
            "MatMulNBits",
            inputs,
            domain=MICROSOFT,
            K=columns,
            N=rows,
            bits=4,
            block_size=group,
            accuracy_level=4 if activation == "dynamic_int8" else 1,
        )
        writer.replace(linear, output[0])
    if gathers:
        data = codes
        if linears:
            flat = writer.constant(f"{name}.rows_shape", np.array([rows, columns // 2], np.int64))
            (data,) = writer.node(writer.graph[0], "Reshape", [codes, flat])
    for gather in gathers:
        output = writer.node(
            gather,
            "GatherBlockQuantized",
            [data, gather.inputs[1], scale],
            domain=MICROSOFT,
            bits=4,
            block_size=group,
            gather_axis=0,
            quantize_axis=1,
        )
        writer.replace(gather, output[0])


def write_weights(
    program: ir.Model, quantized: Mapping[str, QuantizedTensor], activations: Mapping[str, ActivationFormat]
) -> dict[str, str]:
    """Replace every placeholder of a canonical graph, in place.

    Returns:
        For each compressed weight in the graph, the name of the initializer that holds its codes.

    Raises:
        TargetRefusesError: a format or a use that ONNX Runtime has no form for.
    """
    graph = program.graph
    writer = Writer(graph)
    quantizer = TokenQuantizer(writer)
    graph.opset_imports.setdefault(MICROSOFT, 1)
    stored = {}
    for name, (marker,) in weight_nodes(graph).items():
        weight, tensor = marker.outputs[0], quantized[name]
        activation = activations.get(name, "float")
        if tensor.symmetric and tensor.axis == 0 and tensor.bits == 8 and tensor.per_channel:
            if activation == "dynamic_int8" and linear_uses(weight):
                write_int8_dynamic(quantizer, name, weight, tensor)
            else:
                _write_int8_float(writer, name, weight, tensor)
        elif tensor.symmetric and tensor.axis == 0 and tensor.bits == 4 and tensor.group_size in (16, 32, 64, 128, 256):
            _write_int4(writer, name, weight, tensor, activation)
        else:
            raise TargetRefusesError(
                f"ONNX Runtime has no native form for {tensor.bits}-bit weights in groups of {tensor.group_size}"
                f"{'' if tensor.symmetric else ' with zero points'}.",
                where=name,
                allowed="int8 (one scale a channel), int4_g16, int4_g32, int4_g64, int4_g128, int4_g256; symmetric",
                next_step="Choose another format in the recipe.",
            )
        graph.remove(marker, safe=True)
        stored[name] = name + CODES
    RemoveUnusedNodesPass()(program)
    graph.opset_imports.pop(PLACEHOLDERS, None)
    return stored
