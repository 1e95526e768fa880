"""The layers of an ONNX graph: which operators compute them, and which values are what they read and give.

The forms in which layers stand in a file are those that `edgeport.export.onnx` writes. Outputs are taken behind what
ONNX Runtime fuses with a layer when it loads the file (clamps, roundings, biases), so that naming them as outputs of
the graph keeps nothing apart.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from edgeport.explain.document import Missing
from edgeport.explain.shipped import Shipped
from edgeport.explain.watch import Place, Value, layers_of, of_kind

if TYPE_CHECKING:
    import torch

LOOKUPS = ("Gather", "GatherBlockQuantized")
PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul", "MatMulIntegerToFloat", "MatMulNBits", "FusedMatMul")
Columns = tuple[int, int] | None
SMALLEST = 64
"""Floats with fewer values are not looked for among the original's."""


def find_places(
    graph: ir.Graph, shipped: Shipped, state: Mapping[str, torch.Tensor]
) -> tuple[list[Place], list[Missing]]:
    """Where the layers of a graph are, in its order, and those that are not found."""
    order = {node: index for index, node in enumerate(graph)}
    constants = _constants(graph)
    stored = _stored(shipped.artifact.weights, graph) | name_floats(graph, shipped, state)
    users = layers_of(shipped)
    found: list[tuple[int, Place]] = []
    for parameter, (value, rows) in stored.items():
        if parameter not in users:
            continue
        nodes = sorted(_readers(value, constants), key=lambda item: order[item[0]])
        for lookup in (True, False):
            layers = of_kind(users[parameter], shipped.records[parameter].kinds, lookup=lookup)
            wanted = [item for item in nodes if (item[0].op_type in LOOKUPS) == lookup]
            for index, (node, at) in enumerate(wanted):
                if not layers:
                    continue
                # A module that is called several times is one layer with several calls.
                layer = layers[min(index, len(layers) - 1)]
                call = max(0, index - len(layers) + 1)
                output = replace(_output(node, constants), columns=rows)
                found.append((order[node], Place(layer, parameter, call, output, _input(node, at), not lookup)))
    known = {place.parameter for _, place in found}
    why = "no operator of the file reads its weight under a name or with values that the original has"
    missing = [Missing(layer=users[name][0], why=why) for name in users if name not in known]
    return [place for _, place in sorted(found, key=lambda item: item[0])], missing


def _stored(weights: Mapping[str, str], graph: ir.Graph) -> dict[str, tuple[ir.Value, Columns]]:
    """The initializers of compressed weights, and the output columns that are each one's."""
    found = {}
    for parameter, place in weights.items():
        match = re.fullmatch(r"(.*)\[(\d+):(\d+)\]", place)
        name, rows = (place, None) if match is None else (match[1], (int(match[2]), int(match[3])))
        if name in graph.initializers:
            found[parameter] = graph.initializers[name], rows
    return found


def name_floats(
    graph: ir.Graph, shipped: Shipped, state: Mapping[str, torch.Tensor]
) -> dict[str, tuple[ir.Value, Columns]]:
    """Float weights by their parameters: under their own names, or with the very values of the original's.

    The exporter turns a Linear's weight to (K, N), and joins several that read one input side by side.
    """
    wanted = {name: state[name] for name in shipped.groups if name not in shipped.artifact.weights and name in state}
    found: dict[str, tuple[ir.Value, Columns]] = {}
    others = []
    for value in graph.initializers.values():
        if value.const_value is None or value.dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16):
            continue
        name = (value.name or "").removeprefix("module.").removesuffix(".half")
        if name in wanted:
            found[name] = value, None
        elif value.const_value.size >= SMALLEST and len(value.const_value.shape) == 2:
            others.append(value)
    for value in others:
        assert value.const_value is not None
        array = value.const_value.numpy()
        for name, tensor in wanted.items():
            weight = tensor.detach().numpy()
            if name in found or weight.ndim != 2 or weight.shape[1] != array.shape[0]:
                continue
            turned = weight.T.astype(array.dtype)
            width = turned.shape[1]
            # A first look at one row finds the place; the rest proves it.
            for start in range(0, array.shape[1] - width + 1, width):
                stop = start + width
                if np.array_equal(array[0, start:stop], turned[0]) and np.array_equal(array[:, start:stop], turned):
                    found[name] = value, None if width == array.shape[1] else (start, stop)
                    break
    return found


def _constants(graph: ir.Graph) -> frozenset[ir.Value]:
    """Values that follow from initializers alone, these included."""
    found = {value for value in graph.initializers.values() if value.const_value is not None}
    for node in graph:
        inputs = [value for value in node.inputs if value is not None]
        if node.op_type == "Constant" or (inputs and all(value in found for value in inputs)):
            found.update(node.outputs)
    return frozenset(found)


def _readers(value: ir.Value, constants: frozenset[ir.Value]) -> list[tuple[ir.Node, int]]:
    """The first operators that bring a stored weight together with an activation, and at which input."""
    found = []
    for node, index in value.uses():
        if node.outputs[0] in constants:
            for output in node.outputs:
                found += _readers(output, constants)
        elif node.op_type in LOOKUPS + PRODUCTS:
            found.append((node, index))
    return found


def _only_user(value: ir.Value) -> ir.Node | None:
    users = [node for node, _ in value.uses()]
    return users[0] if len(users) == 1 and not value.is_graph_output() else None


def _output(node: ir.Node, constants: frozenset[ir.Value]) -> Value:
    """What the layer gives: behind the operators that belong to its form in the file."""
    value = node.outputs[0]
    if node.op_type == "MatMulIntegerToFloat":
        value = _behind_correction(value)
    elif node.op_type == "Gather":
        value = _behind_scales(value)
    user = _only_user(value)
    if node.op_type in ("MatMul", "Gemm") and user is not None and user.op_type == "Add":
        other = next((item for item in user.inputs if item is not value), None)
        value = user.outputs[0] if other in constants else value
        user = _only_user(value)
    low, high = float("-inf"), float("inf")
    if user is not None and node.op_type == "Conv" and user.op_type in ("Relu", "Clip"):
        bounds = _bounds(user)
        if bounds is not None:
            (low, high), value = bounds, user.outputs[0]
            user = _only_user(value)
    if user is not None and node.op_type == "Conv" and user.op_type == "QuantizeLinear":
        grid = _grid(user)
        if grid is not None:
            return _on_grid(user.outputs[0], *grid, low, high)
    return Value(value.name or "", low=low, high=high)


def _behind_correction(value: ir.Value) -> ir.Value:
    """Dynamic int8: the product, plus the terms of zero points and bias, times the rows' scales (`dynamic.py`)."""
    add = _only_user(value)
    mul = None if add is None or add.op_type != "Add" else _only_user(add.outputs[0])
    return value if mul is None or mul.op_type != "Mul" else mul.outputs[0]


def _behind_scales(value: ir.Value) -> ir.Value:
    """Codes of an embedding's rows are turned, cast and multiplied by their scales."""
    at = value
    while (user := _only_user(at)) is not None and user.op_type in ("Transpose", "Cast"):
        at = user.outputs[0]
    return user.outputs[0] if at is not value and user is not None and user.op_type == "Mul" else value


def _bounds(node: ir.Node) -> tuple[float, float] | None:
    if node.op_type == "Relu":
        return 0.0, float("inf")
    ends = []
    for index, end in ((1, float("-inf")), (2, float("inf"))):
        item = node.inputs[index] if len(node.inputs) > index else None
        if item is not None and item.const_value is None:
            return None
        ends.append(end if item is None or item.const_value is None else float(item.const_value.numpy()))
    return ends[0], ends[1]


def _grid(node: ir.Node) -> tuple[float, int] | None:
    """Scale and zero point of a rounding that is fixed, for all of a tensor; None for others."""
    scale = node.inputs[1]
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    if scale is None or scale.const_value is None or scale.const_value.size != 1:
        return None
    if zero is not None and zero.const_value is None:
        return None
    return float(scale.const_value.numpy()), 0 if zero is None or zero.const_value is None else int(
        zero.const_value.numpy()
    )


def _on_grid(value: ir.Value, scale: float, zero: int, low: float, high: float) -> Value:
    """Codes in uint8: what lies beyond the grid is clamped."""
    return Value(
        value.name or "",
        scale=scale,
        zero=zero,
        low=max(low, -zero * scale),
        high=min(high, (255 - zero) * scale),
    )


def _input(node: ir.Node, weight: int) -> Value | None:
    """What the layer reads, before it is rounded anew for this layer; None for a lookup and for the file's inputs."""
    if node.op_type in LOOKUPS:
        return None
    value = node.inputs[0] if node.op_type != "MatMul" else node.inputs[1 - weight]
    while value is not None and (producer := value.producer()) is not None:
        if producer.op_type in ("QuantizeLinear", "DequantizeLinear"):
            grid = _grid(producer)
            if grid is not None:
                codes = producer.outputs[0] if producer.op_type == "QuantizeLinear" else producer.inputs[0]
                assert codes is not None
                return _on_grid(codes, *grid, float("-inf"), float("inf"))
        elif producer.op_type != "Reshape":
            return Value(value.name or "")
        value = producer.inputs[0]
    return None
