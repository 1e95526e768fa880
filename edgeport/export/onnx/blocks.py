"""Weights of 2, 4 or 8 bits with a scale every few columns: MatMulNBits, and GatherBlockQuantized for embeddings.

The codes are stored once, as rows (N, K * bits / 8); the zero points as rows too, in the same packing, and left out
where they are all half the range, which is the operators' default. Embeddings read the rows as they are. Linear
layers read them through a Reshape to blocks (N, K/G, G * bits / 8), which ONNX Runtime folds when it loads the file,
as it does the Cast of float16 scales: neither costs time at a call, nor memory after loading.

The Reshape is there for one more reason. MatMulNBits at accuracy level 4 packs constant codes when it is loaded,
together with their scales. Where the codes are constant and the scales are not (a session with
graph optimizations disabled leaves the Cast in place) it packs no scales and computes nonsense (measured in
1.31.1: relative error 1). Behind a Reshape both are constant or neither is, and then it is right, though slow.

Accuracy level 4 rounds activations to symmetric int8 in blocks of G columns; level 1 computes in float32. Level 1
has kernels for 4 bits only and otherwise unpacks the weight at every call, 25 times slower than float32 at one row. So
8-bit blocks with float activations become a float32 weight when the file is loaded, and 2-bit ones are refused.

Measured on x86-64. On Arm with dot products ONNX Runtime hands 4-bit blocks without zero points, G a multiple of 32, to
KleidiAI (`UseKleidiAI` in its qnbitgemm_kernel_neon.cpp), which holds scales in bfloat16 and rounds activations a row
at a time; the session option `mlas.disable_kleidiai` turns that off.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgeport.errors import TargetRefusesError
from edgeport.export.onnx.graph import CODES, MICROSOFT, ZERO_POINT, Writer, bias_of, gather_uses, linear_uses
from edgeport.export.onnx.packing import pack
from edgeport.formats import ActivationFormat
from edgeport.quantized import QuantizedTensor


def _float_weight(writer: Writer, blocks: ir.Value, scale: ir.Value, zero: ir.Value | None, columns: int) -> ir.Value:
    """The float32 weight (K, N) of 8-bit blocks (N, K/G, G). ONNX Runtime folds all of it when it loads the file."""
    last = writer.constant("edgeport.last_axis", np.array([-1], np.int64))
    steps = writer.of_weights("Cast", [blocks], to=int(ir.DataType.FLOAT))
    if zero is None:
        shift = writer.constant("edgeport.half_of_8_bits", np.float32(128))
    else:
        shift = writer.of_weights("Cast", [writer.of_weights("Unsqueeze", [zero, last])], to=int(ir.DataType.FLOAT))
    steps = writer.of_weights("Sub", [steps, shift])
    values = writer.of_weights("Mul", [steps, writer.of_weights("Unsqueeze", [scale, last])])
    matrix = writer.of_weights("Reshape", [values, writer.shape([-1, columns])])
    return writer.of_weights("Transpose", [matrix], perm=[1, 0])


def _write_linears(
    writer: Writer,
    linears: list[ir.Node],
    inputs: tuple[ir.Value, ir.Value, ir.Value | None],
    tensor: QuantizedTensor,
    activation: ActivationFormat,
) -> None:
    """Replace Linear layers. `inputs`: the initializers of codes, scales and zero points."""
    rows, columns, group, bits = tensor.rows, tensor.columns, tensor.group_size, tensor.bits
    codes, scale, zero = inputs
    blocks = writer.of_weights("Reshape", [codes, writer.shape([rows, columns // group, group * bits // 8])])
    if bits == 8 and activation == "float":
        weight = _float_weight(writer, blocks, scale, zero, columns)
        for linear in linears:
            bias = bias_of(linear)
            (product,) = writer.node(linear, "MatMul", [linear.inputs[0], weight])
            if bias is not None:
                (product,) = writer.node(linear, "Add", [product, bias])
            writer.replace(linear, product)
        return
    for linear in linears:
        (product,) = writer.node(
            linear,
            "MatMulNBits",
            [linear.inputs[0], blocks, scale, zero, None, bias_of(linear)],
            domain=MICROSOFT,
            K=columns,
            N=rows,
            bits=bits,
            block_size=group,
            accuracy_level=4 if activation == "dynamic_int8" else 1,
        )
        writer.replace(linear, product)


def _check_uses(name: str, bits: int, others: list[ir.Node], *, slow: bool) -> None:
    if others:
        raise TargetRefusesError(
            f"ONNX Runtime has no form with {bits}-bit groups for the operator {others[0].op_type}.",
            where=name,
            allowed="weights in groups in Linear and Embedding layers",
            next_step="Exclude this weight in the recipe (`exclude`), or use int8 for it.",
        )
    if slow:
        raise TargetRefusesError(
            "ONNX Runtime multiplies 2-bit weights by float activations 25 times slower than float32.",
            where=name,
            allowed="2-bit Linear layers with dynamic_int8 activations; 4 and 8 bits with any",
            next_step='Put "dynamic_int8" first in the recipe\'s `activations`, or give this weight more bits.',
        )


def write_blocks(
    writer: Writer, name: str, weight: ir.Value, tensor: QuantizedTensor, activation: ActivationFormat
) -> None:
    """Replace the Linear and Embedding layers that read a weight.

    Raises:
        TargetRefusesError: something else reads it, or it has 2 bits and is multiplied by float activations.
    """
    bits, linears, gathers = tensor.bits, linear_uses(weight), gather_uses(weight)
    others = [user for user, _ in weight.uses() if user not in linears and user not in gathers]
    _check_uses(name, bits, others, slow=bits == 2 and activation == "float" and bool(linears))
    codes = writer.constant(name + CODES, pack(tensor.codes.numpy(), bits))
    scale = writer.scale(name, tensor.scale.numpy(), tensor.scale_dtype)
    zero = None
    if tensor.zero_point is not None:
        zero = writer.constant(name + ZERO_POINT, pack(tensor.zero_point.numpy(), bits))
    if linears:
        _write_linears(writer, linears, (codes, scale, zero), tensor, activation)
    for gather in gathers:
        (values,) = writer.node(
            gather,
            "GatherBlockQuantized",
            [codes, gather.inputs[1], scale, zero],
            domain=MICROSOFT,
            bits=bits,
            block_size=tensor.group_size,
            gather_axis=0,
            quantize_axis=1,
        )
        writer.replace(gather, values)
