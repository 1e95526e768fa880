"""Weights of 2, 4 or 8 bits with a scale every few columns: MatMulNBits, and GatherBlockQuantized for embeddings.

The codes are stored once, as rows (N, K * bits / 8); the zero points as rows too, in the same packing, and left out
where they are all half the range, which is the operators' default. Embeddings read the rows as they are. Linear
layers read them through a Reshape to blocks (N, K/G, G * bits / 8), which ONNX Runtime folds when it loads the file,
as it does the Cast of float16 scales: neither costs time at a call, nor memory after loading.

The Reshape is there for one more reason. MatMulNBits at accuracy level 4 packs constant codes when it is loaded,
together with their scales. Where the codes are constant and the scales are not (a session with
graph optimizations disabled leaves the Cast in place) it packs no scales and computes nonsense (measured in
1.31.1: relative error 1). Behind a Reshape both are constant or neither is, and then it is right, though slow.

Accuracy level 4 rounds activations to symmetric int8 in blocks of G columns; level 1 computes in float32.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgeport.errors import TargetRefusesError
from edgeport.export.onnx.graph import CODES, MICROSOFT, ZERO_POINT, Writer, bias_of, gather_uses, linear_uses
from edgeport.export.onnx.packing import pack
from edgeport.formats import ActivationFormat
from edgeport.quantized import QuantizedTensor


def write_blocks(
    writer: Writer, name: str, weight: ir.Value, tensor: QuantizedTensor, activation: ActivationFormat
) -> None:
    """Replace the Linear and Embedding layers that read a weight.

    Raises:
        TargetRefusesError: something else reads it.
    """
    rows, columns, group, bits = tensor.rows, tensor.columns, tensor.group_size, tensor.bits
    linears, gathers = linear_uses(weight), gather_uses(weight)
    other = [user.op_type for user, _ in weight.uses() if user not in linears and user not in gathers]
    if other:
        raise TargetRefusesError(
            f"ONNX Runtime has no form with {bits}-bit groups for the operator {other[0]}.",
            where=name,
            allowed="weights in groups in Linear and Embedding layers",
            next_step="Exclude this weight in the recipe (`exclude`), or use int8 for it.",
        )
    codes = writer.constant(name + CODES, pack(tensor.codes.numpy(), bits))
    scale = writer.scale(name, tensor.scale.numpy(), tensor.scale_dtype)
    zeros = (
        [] if tensor.zero_point is None else [writer.constant(name + ZERO_POINT, pack(tensor.zero_point.numpy(), bits))]
    )
    if linears:
        shape = [rows, columns // group, group * bits // 8]
        target = writer.constant(f"edgeport.blocks_{'x'.join(map(str, shape))}", np.array(shape, np.int64))
        blocks = writer.of_weights("Reshape", [codes, target])
    for linear in linears:
        bias = bias_of(linear)
        inputs = [linear.inputs[0], blocks, scale, *zeros]
        if bias is not None:
            inputs = [*inputs, *[None] * (5 - len(inputs)), bias]
        output = writer.node(
            linear,
            "MatMulNBits",
            inputs,
            domain=MICROSOFT,
            K=columns,
            N=rows,
            bits=bits,
            block_size=group,
            accuracy_level=4 if activation == "dynamic_int8" else 1,
        )
        writer.replace(linear, output[0])
    for gather in gathers:
        output = writer.node(
            gather,
            "GatherBlockQuantized",
            [codes, gather.inputs[1], scale, *zeros],
            domain=MICROSOFT,
            bits=bits,
            block_size=group,
            gather_axis=0,
            quantize_axis=1,
        )
        writer.replace(gather, output[0])
