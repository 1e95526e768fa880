"""Linear layers in integer arithmetic, with activations quantized per token while the model runs.

Each token (row) of the activation x gets its own uint8 grid over [min(lo, 0), max(hi, 0)], as XNNPACK's
dynamically quantized layers do: x[i] = s[i] * (q[i] - z[i]), s[i] = (hi[i] - lo[i]) / 255. With
int8 weights w[:, j] = c[j] * v[:, j] the layer is

    x @ w + b = s[i] * (c[j] * (q @ v)[i, j]  -  z[i] * d[j]  +  b[j] / s[i]),   d[j] = c[j] * sum_k v[k, j]

where `c * (q @ v)` is `MatMulIntegerToFloat` and the last two terms are one product of rank two,
[z, -1/s] @ [-d; -b]. One grid for the whole tensor (`DynamicQuantizeLinear`) is about 10% faster and much
coarser: on MiniLM the cosine to the original falls from .9987 to .991.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgeport.export.onnx.graph import (
    CODES,
    MICROSOFT,
    Writer,
    bias_of,
    gather_uses,
    linear_uses,
    rank,
    scale_rows,
)
from edgeport.quantized import QuantizedTensor, dequantize

LEVELS = 255.0
HIGHEST_LOW = -(2.0**-100)
"""The grid of a token reaches this far below 0 at least, so that a token of zeros has a range to divide by."""


class TokenQuantizer:
    """Quantizes each activation once, however many layers read it.

    Attributes:
        done: (codes uint8 in the activation's shape, [z, -1/s] (..., 2), s (..., 1)), by the node that reads the
            activation first; not by the activation itself, which changes when its own layer is replaced.
    """

    def __init__(self, writer: Writer) -> None:
        self.writer = writer
        self.done: dict[ir.Node, tuple[ir.Value, ir.Value, ir.Value]] = {}

    def quantize(self, x: ir.Value, columns: int) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Codes, [z, -1/s] and s of an activation (..., columns) float32."""
        for user, _ in x.uses():
            if user in self.done:
                return self.done[user]
        return self._write(x, columns)

    def _write(self, x: ir.Value, columns: int) -> tuple[ir.Value, ir.Value, ir.Value]:
        writer = self.writer
        chain: list[ir.Node] = []

        def node(op_type: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
            chain.append(ir.node(op_type, list(inputs), attributes=attributes))
            return chain[-1].outputs[0]

        last = writer.constant("edgeport.last_axis", np.array([-1], np.int64))
        zero = writer.constant("edgeport.zero", np.float32(0))
        below = writer.constant("edgeport.highest_low", np.float32(HIGHEST_LOW))
        one = writer.constant("edgeport.one", np.float32(1))
        levels = writer.constant("edgeport.minus_levels", np.float32(-LEVELS))
        step = writer.constant("edgeport.step", np.float32(1 / LEVELS))
        no_shift = writer.constant("edgeport.no_shift", np.uint8(0))
        flat = writer.constant(f"edgeport.rows_of_{columns}", np.array([-1, columns], np.int64))

        high = node("Max", node("ReduceMax", x, last, keepdims=1), zero)
        low = node("Min", node("ReduceMin", x, last, keepdims=1), below)
        spread = node("Sub", high, low)
        scale = node("Mul", spread, step)
        inverse = node("Div", levels, spread)
        shift = node("QuantizeLinear", node("Mul", low, inverse), one, no_shift)
        rows = node("Reshape", x, flat)
        codes = node("QuantizeLinear", rows, node("Reshape", scale, last), node("Reshape", shift, last), axis=0)
        codes = node("Reshape", codes, node("Shape", x))
        pair = node("Concat", node("Cast", shift, to=int(ir.DataType.FLOAT)), inverse, axis=-1)
        producer = x.producer()
        if producer is None:
            writer.graph.insert_before(writer.graph[0], chain)
        else:
            writer.graph.insert_after(producer, chain)
        self.done[chain[0]] = codes, pair, scale
        return self.done[chain[0]]


def write_int8_dynamic(quantizer: TokenQuantizer, name: str, weight: ir.Value, tensor: QuantizedTensor) -> None:
    """Replace the Linear layers that read a weight; an embedding tied to it gathers columns of the same codes."""
    writer = quantizer.writer
    codes = writer.constant(name + CODES, tensor.codes.numpy().T)
    scale = writer.scale(name, tensor.scale.numpy().reshape(-1), tensor.scale_dtype)
    one = writer.constant("edgeport.one", np.float32(1))
    no_shift = writer.constant("edgeport.no_shift", np.uint8(0))
    sums = dequantize(tensor).double().sum(1).float().numpy()
    for linear in linear_uses(weight):
        x, bias = linear.inputs[0], bias_of(linear)
        assert x is not None
        x_codes, pair, x_scale = quantizer.quantize(x, tensor.columns)
        offsets = np.zeros_like(sums)
        if bias is not None:
            assert bias.const_value is not None
            offsets = bias.const_value.numpy()
        shared = f"{name}.correction" if bias is None else f"{name}.correction.{bias.name}"
        correction = writer.constant(shared, np.stack([-sums, -offsets]))
        (product,) = writer.node(
            linear, "MatMulIntegerToFloat", [x_codes, codes, one, scale, no_shift], domain=MICROSOFT
        )
        (terms,) = writer.node(linear, "MatMul", [pair, correction])
        (unscaled,) = writer.node(linear, "Add", [product, terms])
        writer.replace(linear, writer.node(linear, "Mul", [unscaled, x_scale])[0])
    for gather in gather_uses(weight):
        ids = gather.inputs[1]
        assert ids is not None
        (columns,) = writer.node(gather, "Gather", [codes, ids], axis=1)
        order = [*range(1, rank(ids) + 1), 0]
        (rows,) = writer.node(gather, "Transpose", [columns], perm=order)
        scale_rows(writer, gather, rows, scale, ids, flat=True)
    if weight.uses():
        floats = writer.of_weights("Cast", [codes], to=int(ir.DataType.FLOAT))
        floats = writer.of_weights("Mul", [floats, scale])
        turned = writer.of_weights("Transpose", [floats], perm=[1, 0])
        weight.replace_all_uses_with(turned)
