"""Write each compressed weight in ONNX Runtime's native form, from its logical codes and scales.

============ ===================== ==============================================================
format       used by               written as
============ ===================== ==============================================================
int8         Linear, dynamic       codes (K, N) int8, scale (N,): integer arithmetic, see `dynamic.py`
int8         Linear, conv, static  codes (K, N), or in the weight's own shape between rounded activations: `static.py`
int8         Embedding             Gather of codes and of scales, Cast, Mul
int8         anything else         codes in the weight's own shape: Cast, Mul
(u)intB_gG   Linear, Embedding     packed codes: MatMulNBits, GatherBlockQuantized, see `blocks.py`
============ ===================== ==============================================================

Cast and Mul say what DequantizeLinear says, and ONNX Runtime folds them when it loads the file, so that
weight-only layers run as fast as float ones. It does not fold DequantizeLinear but runs it at every call, or
fuses it with a MatMul into one that rounds the activations to 8 bits as well, which nobody asked for.

Activations are quantized to uint8 and multiplied by int8 weights: that pair has the fastest
kernels on Arm (dot product) and on x86 with VNNI. On x86 without VNNI its 16-bit sums can saturate;
`OnnxRuntimeSession` then asks for the exact uint8 x uint8 kernels.

How many times faster than float32 a 768 x 3072 product is (`scripts/bench/onnx_kernels.py`; one thread, x86-64 with
VNNI; zero points cost at most a tenth of it):

========== ============ ============= ====== ========
weights    activations  bits a weight 1 row  128 rows
========== ============ ============= ====== ========
int8       dynamic_int8 8.13          1.6    2.5
int8_g32   dynamic_int8 8.50          2.8    1.3
int8_g128  dynamic_int8 8.13          4.1    1.7
int4_g16   dynamic_int8 5.00          2.1    1.1
int4_g32   dynamic_int8 4.50          3.7    1.2
int4_g128  dynamic_int8 4.13          5.0    1.6
int2_g32   dynamic_int8 2.50          3.1    0.65
int2_g128  dynamic_int8 2.13          5.0    1.3
int8       float        8.04          0.9    1.0
int8_g32   float        8.50          0.9    1.0
int4_g32   float        4.50          2.3    0.95
========== ============ ============= ====== ========

So many rows (encoders, prompts) want int8, one row (decoding) wants 4 or 8 bits in groups.

A weight that is tied is stored once: all its users read the same initializer.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from edgeport.activations import LayerRange
from edgeport.export.onnx.blocks import write_blocks
from edgeport.export.onnx.canonical import weight_nodes
from edgeport.export.onnx.dynamic import TokenQuantizer, write_int8_dynamic
from edgeport.export.onnx.forms import form_of
from edgeport.export.onnx.graph import (
    CODES,
    MICROSOFT,
    Writer,
    bias_of,
    gather_uses,
    linear_uses,
    scale_rows,
)
from edgeport.export.onnx.static import simplify_roundings, write_int8_static, write_roundings
from edgeport.export.onnx.trace import PLACEHOLDERS
from edgeport.formats import ActivationFormat
from edgeport.quantized import QuantizedTensor


def _write_int8_float(writer: Writer, name: str, weight: ir.Value, tensor: QuantizedTensor) -> None:
    """Weight-only: the codes in the weight's own shape; whatever is no Gather reads the dequantised weight."""
    codes = writer.constant(name + CODES, tensor.codes.numpy())
    scale_shape = (tensor.rows, *[1] * (tensor.codes.ndim - 1))
    scale = writer.scale(name, tensor.scale.numpy().reshape(scale_shape), tensor.scale_dtype)
    for gather in gather_uses(weight):
        ids = gather.inputs[1]
        assert ids is not None
        (rows,) = writer.node(gather, "Gather", [codes, ids], axis=0)
        scale_rows(writer, gather, rows, scale, ids, flat=False)
    if not weight.uses():
        return
    floats = writer.of_weights("Cast", [codes], to=int(ir.DataType.FLOAT))
    floats = writer.of_weights("Mul", [floats, scale])
    linears = linear_uses(weight)
    if linears:
        turned = writer.of_weights("Transpose", [floats], perm=[1, 0])
    for linear in linears:
        bias = bias_of(linear)
        (product,) = writer.node(linear, "MatMul", [linear.inputs[0], turned])
        if bias is not None:
            (product,) = writer.node(linear, "Add", [product, bias])
        writer.replace(linear, product)
    weight.replace_all_uses_with(floats)


def write_weights(
    program: ir.Model,
    quantized: Mapping[str, QuantizedTensor],
    activations: Mapping[str, ActivationFormat],
    ranges: Mapping[str, LayerRange],
) -> dict[str, str]:
    """Replace every placeholder of a canonical graph, in place.

    Args:
        ranges: of the layers whose activations are static.

    Returns:
        For each compressed weight in the graph, the name of the initializer that holds its codes.

    Raises:
        TargetRefusesError: a format or a use that ONNX Runtime has no form for.
    """
    graph = program.graph
    writer = Writer(graph)
    quantizer = TokenQuantizer(writer)
    graph.opset_imports.setdefault(MICROSOFT, 1)
    simplify_roundings(program)
    write_roundings(writer, ranges)
    stored = {}
    for name, (marker,) in weight_nodes(graph).items():
        weight, tensor = marker.outputs[0], quantized[name]
        activation = activations.get(name, "float")
        if form_of(name, tensor).written == "blocks":
            write_blocks(writer, name, weight, tensor, activation)
        elif activation == "static_int8":
            write_int8_static(writer, name, weight, tensor, ranges[name])
        elif activation == "dynamic_int8" and linear_uses(weight):
            write_int8_dynamic(quantizer, name, weight, tensor)
        else:
            _write_int8_float(writer, name, weight, tensor)
        graph.remove(marker, safe=True)
        stored[name] = name + CODES
    RemoveUnusedNodesPass()(program)
    graph.opset_imports.pop(PLACEHOLDERS, None)
    return stored
