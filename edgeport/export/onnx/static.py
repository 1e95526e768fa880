"""Layers whose activations are int8 on grids fixed beforehand: QuantizeLinear and DequantizeLinear around them.

While a model is traced each rounding is an `edgeport::Quantized` node. Here the graph is first put into the form in
which chains of convolutions stay in integers (clamps that a grid already makes are dropped, zero padding moves into
its convolution, a tensor is rounded once), then each rounding becomes a pair of operators, and each weight codes
behind a DequantizeLinear. ONNX Runtime fuses the pairs and a convolution into QLinearConv when it loads the file.
Linear layers are written as what it would make of their pairs, MatMulIntegerToFloat, because it does not do so for
every rank and bias. Activations are uint8 (codes + 128) and weights int8, as in `native.py`.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from edgeport.activations import ActivationGrid, LayerRange
from edgeport.export.onnx.canonical import is_operator
from edgeport.export.onnx.graph import CODES, MICROSOFT, Writer, bias_of, linear_uses
from edgeport.export.onnx.trace import PLACEHOLDERS
from edgeport.quantized import QuantizedTensor

OFFSET = 128
"""From int8 to uint8."""


def _roundings(graph: ir.Graph) -> list[ir.Node]:
    return [node for node in graph if is_operator(node, "Quantized", PLACEHOLDERS)]


def _grid(node: ir.Node) -> ActivationGrid:
    return ActivationGrid(node.attributes.get_float("scale", 0.0), node.attributes.get_int("zero_point", 0))


def _constant(value: ir.Value | None) -> np.ndarray | None:
    return None if value is None or value.const_value is None else value.const_value.numpy()


def _bypass(node: ir.Node, graph: ir.Graph) -> None:
    """Remove a node and let its first input answer for its output."""
    source, output = node.inputs[0], node.outputs[0]
    assert source is not None
    output.replace_all_uses_with(source)
    graph.remove(node, safe=True)


def _clamp(node: ir.Node) -> tuple[float, float] | None:
    """The bounds of a Relu, or of a Clip between constants."""
    if is_operator(node, "Relu"):
        return 0.0, float("inf")
    if not is_operator(node, "Clip"):
        return None
    bounds = []
    for index, open_end in ((1, -float("inf")), (2, float("inf"))):
        value = node.inputs[index] if len(node.inputs) > index else None
        array = _constant(value)
        if value is not None and array is None:
            return None
        bounds.append(open_end if array is None else float(array))
    return bounds[0], bounds[1]


def _drop_clamps(graph: ir.Graph) -> None:
    """Remove clamps of rounded tensors that lie within the bounds as they are."""
    for rounding in _roundings(graph):
        for user, _ in tuple(rounding.outputs[0].uses()):
            bounds = _clamp(user)
            if bounds is not None and _grid(rounding).within(*bounds) and not user.outputs[0].is_graph_output():
                _bypass(user, graph)


def _zero_padding(node: ir.Node) -> list[int] | None:
    """The padding of a Pad with zeros: [top, left, bottom, right], or as many as there are space dimensions."""
    if not is_operator(node, "Pad") or node.attributes.get_string("mode", "constant") != "constant":
        return None
    fill = _constant(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] is not None else np.zeros(())
    pads = _constant(node.inputs[1])
    if fill is None or pads is None or float(fill) != 0 or (len(node.inputs) > 3 and node.inputs[3] is not None):
        return None
    begin, end = np.split(pads, 2)
    if begin[:2].any() or end[:2].any() or (pads < 0).any():
        return None
    return [int(size) for size in (*begin[2:], *end[2:])]


def _round_before_padding(graph: ir.Graph) -> None:
    """Let `Quantized(Pad(x))` be `Pad(Quantized(x))`, which is the same: 0 is on every grid."""
    for rounding in _roundings(graph):
        pad = rounding.inputs[0].producer() if rounding.inputs[0] is not None else None
        if pad is None or _zero_padding(pad) is None or len(pad.outputs[0].uses()) > 1:
            continue
        x = pad.inputs[0]
        assert x is not None
        rounding.outputs[0].replace_all_uses_with(pad.outputs[0])
        rounding.replace_input_with(0, x)
        pad.replace_input_with(0, rounding.outputs[0])
        graph.remove(rounding)
        graph.insert_before(pad, rounding)


def _round_once(graph: ir.Graph) -> None:
    """Remove roundings of tensors that are on the same grid already, also behind a padding with zeros."""
    for rounding in _roundings(graph):
        source = rounding.inputs[0].producer() if rounding.inputs[0] is not None else None
        while source is not None and _zero_padding(source) is not None:
            source = source.inputs[0].producer() if source.inputs[0] is not None else None
        same = (
            source is not None and is_operator(source, "Quantized", PLACEHOLDERS) and _grid(source) == _grid(rounding)
        )
        if same and not rounding.outputs[0].is_graph_output():
            _bypass(rounding, graph)


def _fold_padding(graph: ir.Graph) -> None:
    """Move zero padding of rounded tensors into the convolutions that read it."""
    for pad in [node for node in graph if _zero_padding(node) is not None]:
        added = _zero_padding(pad)
        source = pad.inputs[0].producer() if pad.inputs[0] is not None else None
        if added is None or source is None or not is_operator(source, "Quantized", PLACEHOLDERS):
            continue
        for user, index in tuple(pad.outputs[0].uses()):
            if (
                index == 0
                and is_operator(user, "Conv")
                and user.attributes.get_string("auto_pad", "NOTSET") == "NOTSET"
            ):
                own = list(user.attributes.get_ints("pads", [0] * len(added)))
                user.attributes["pads"] = ir.AttrInt64s("pads", [a + b for a, b in zip(own, added, strict=True)])
                user.replace_input_with(0, source.outputs[0])


def simplify_roundings(program: ir.Model) -> None:
    """Bring the roundings of a canonical graph into the form that ONNX Runtime fuses, in place."""
    graph = program.graph
    _drop_clamps(graph)
    _round_once(graph)
    _round_before_padding(graph)
    _fold_padding(graph)
    RemoveUnusedNodesPass()(program)


PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "Linear", "MatMul")


def _is_float_product(node: ir.Node | None, static: Collection[str]) -> bool:
    """A layer whose weight is no static one's."""
    if node is None or node.op_type not in PRODUCTS:
        return False
    marker = node.inputs[1].producer() if node.inputs[1] is not None else None
    return marker is None or marker.attributes.get_string("name", "") not in static


def _between_roundings(rounding: ir.Node, static: Collection[str]) -> bool:
    """The rounded tensor comes, through a clamp or not, from a float layer that reads a rounded tensor."""
    source = rounding.inputs[0].producer() if rounding.inputs[0] is not None else None
    if source is not None and _clamp(source) is not None:
        source = source.inputs[0].producer() if source.inputs[0] is not None else None
    if source is None or not _is_float_product(source, static):
        return False
    before = source.inputs[0].producer() if source.inputs[0] is not None else None
    return before is not None and before.op_type in ("Quantized", "DequantizeLinear")


def write_roundings(writer: Writer, static: Collection[str]) -> None:
    """Replace every `edgeport::Quantized` by QuantizeLinear and DequantizeLinear; a tensor is quantized once a grid.

    Around a layer that stays float ONNX Runtime would take such a pair on both sides as leave to round its weight
    too, with one scale for all of it (`WeightBiasQuantization`; seen in 1.31.1). A Sum of one tensor prevents that.

    Args:
        static: names of the weights whose layers are static.
    """
    done: dict[tuple[ir.Value, ActivationGrid], ir.Value] = {}
    for node in _roundings(writer.graph):
        source, grid = node.inputs[0], _grid(node)
        assert source is not None
        if (source, grid) not in done:
            index, codes = len(done), source
            if _between_roundings(node, static):
                (codes,) = writer.node(node, "Sum", [codes])
            scale = writer.constant(f"activation_{index}.scale", np.float32(grid.scale))
            zero = writer.constant(f"activation_{index}.zero_point", np.uint8(grid.zero_point + OFFSET))
            (codes,) = writer.node(node, "QuantizeLinear", [codes, scale, zero])
            (done[source, grid],) = writer.node(node, "DequantizeLinear", [codes, scale, zero])
        writer.replace(node, done[source, grid])


def _write_linear(writer: Writer, linear: ir.Node, codes: ir.Value, scale: ir.Value) -> None:
    """One Linear layer over the codes (K, N) of its weight."""
    x = linear.inputs[0]
    rounding = None if x is None else x.producer()
    assert rounding is not None, "the input of a static layer is rounded"
    x_codes, x_scale, x_zero = rounding.inputs
    inputs = [x_codes, codes, x_scale, scale, x_zero, None, bias_of(linear)]
    writer.replace(linear, writer.node(linear, "MatMulIntegerToFloat", inputs, domain=MICROSOFT)[0])


def _write_bias(writer: Writer, conv: ir.Node, name: str, scales: np.ndarray, grid: ActivationGrid) -> None:
    """The bias of a convolution in int32, in steps of the input's scale times each channel's (N,)."""
    bias = _constant(conv.inputs[2]) if len(conv.inputs) > 2 else None
    if bias is None:
        return
    steps = (np.float32(grid.scale) * scales).astype(np.float32)
    codes = writer.constant(f"{name}.bias.codes", np.round(bias.astype(np.float64) / steps).astype(np.int32))
    step = writer.constant(f"{name}.bias.scale", steps)
    zero = writer.constant(f"edgeport.int32_zeros_{len(steps)}", np.zeros(len(steps), np.int32))
    conv.replace_input_with(2, writer.of_weights("DequantizeLinear", [codes, step, zero], axis=0))


def write_int8_static(writer: Writer, name: str, weight: ir.Value, tensor: QuantizedTensor, found: LayerRange) -> None:
    """Replace the Linear layers, or the weights of the convolutions, that read a weight; roundings are written."""
    scales = tensor.scale.numpy().reshape(-1)
    scale = writer.scale(name, scales, tensor.scale_dtype)
    linears = linear_uses(weight)
    if linears:
        codes = writer.constant(name + CODES, tensor.codes.numpy().T)
        for linear in linears:
            _write_linear(writer, linear, codes, scale)
        return
    codes = writer.constant(name + CODES, tensor.codes.numpy())
    zero = writer.constant(f"edgeport.zeros_{tensor.rows}", np.zeros(tensor.rows, np.int8))
    for conv in [user for user, index in weight.uses() if index == 1 and is_operator(user, "Conv")]:
        _write_bias(writer, conv, name, scales, found.input)
    weight.replace_all_uses_with(writer.of_weights("DequantizeLinear", [codes, scale, zero], axis=0))
