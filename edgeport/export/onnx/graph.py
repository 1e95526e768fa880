"""Small helpers for editing an ONNX graph in place."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgeport.export.onnx.canonical import is_operator
from edgeport.export.onnx.trace import PLACEHOLDERS
from edgeport.quantized import ScaleDtype

MICROSOFT = "com.microsoft"
CODES, SCALE, ZERO_POINT = ".codes", ".scale", ".zero_point"
"""Suffixes of a compressed parameter's initializers in the file."""


def answer_for(old: ir.Value, new: ir.Value) -> None:
    """Let `new` take the place of a value, its shape and type, and its name where it is an output of the graph."""
    new.shape, new.type = old.shape, old.type
    name, is_output = old.name, old.is_graph_output()
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    if is_output:
        new.name = name


class Writer:
    """Adds initializers and nodes to one graph."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self._last_of_weights: ir.Node | None = None

    def constant(self, name: str, array: np.ndarray | np.generic) -> ir.Value:
        """An initializer, one a name."""
        if name in self.graph.initializers:
            return self.graph.initializers[name]
        array = np.array(array, order="C")
        value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
        value.dtype, value.shape = ir.DataType.from_numpy(array.dtype), ir.Shape(array.shape)
        self.graph.register_initializer(value)
        return value

    def shape(self, sizes: list[int]) -> ir.Value:
        """A shape for Reshape, stored once."""
        return self.constant(f"edgeport.shape_{'x'.join(map(str, sizes))}", np.array(sizes, np.int64))

    def scale(self, name: str, array: np.ndarray, dtype: ScaleDtype) -> ir.Value:
        """A parameter's scales as float32, stored in `dtype` (float32, or float16 behind a Cast)."""
        stored = self.constant(name + SCALE, array.astype(dtype))
        if dtype == "float32":
            return stored
        return self.of_weights("Cast", [stored], to=int(ir.DataType.FLOAT))

    def of_weights(self, op_type: str, inputs: list[ir.Value], **attributes: int | list[int]) -> ir.Value:
        """A node that reads weights only, placed before all that read activations; returns its output."""
        node = ir.node(op_type, inputs, attributes=attributes)
        if self._last_of_weights is None:
            self.graph.insert_before(self.graph[0], node)
        else:
            self.graph.insert_after(self._last_of_weights, node)
        self._last_of_weights = node
        return node.outputs[0]

    def node(
        self,
        before: ir.Node,
        op_type: str,
        inputs: list[ir.Value | None],
        *,
        domain: str = "",
        outputs: int = 1,
        **attributes: int | float | str | list[int],
    ) -> tuple[ir.Value, ...]:
        """A node placed before another one; returns its outputs. Inputs left out at the end are None."""
        while inputs[-1] is None:
            inputs = inputs[:-1]
        node = ir.node(op_type, inputs, attributes=attributes, domain=domain, num_outputs=outputs)
        self.graph.insert_before(before, node)
        return tuple(node.outputs)

    def replace(self, node: ir.Node, new: ir.Value) -> None:
        """Let `new` answer for the node's only output, and remove the node."""
        answer_for(node.outputs[0], new)
        self.graph.remove(node, safe=True)


def rank(value: ir.Value) -> int:
    """The number of dimensions of a value."""
    if value.shape is None:
        raise ValueError(f"the rank of {value.name} is unknown")
    return len(value.shape)


def linear_uses(weight: ir.Value) -> list[ir.Node]:
    """The `edgeport::Linear` layers that multiply by a weight."""
    return [user for user, index in weight.uses() if index == 1 and is_operator(user, "Linear", PLACEHOLDERS)]


def gather_uses(weight: ir.Value) -> list[ir.Node]:
    """The embeddings that look rows of a weight up."""
    return [
        user
        for user, index in weight.uses()
        if index == 0 and is_operator(user, "Gather") and user.attributes.get_int("axis", 0) == 0
    ]


def bias_of(linear: ir.Node) -> ir.Value | None:
    """The constant bias of an `edgeport::Linear`."""
    return linear.inputs[2] if len(linear.inputs) > 2 else None


def scale_rows(writer: Writer, gather: ir.Node, rows: ir.Value, scale: ir.Value, ids: ir.Value, *, flat: bool) -> None:
    """Answer for a Gather: its codes (ids..., K) times their rows' scales, gathered from (N,) when flat or (N, 1)."""
    (scales,) = writer.node(gather, "Gather", [scale, ids], axis=0)
    if flat:
        last = writer.constant("edgeport.last_axis", np.array([-1], np.int64))
        (scales,) = writer.node(gather, "Unsqueeze", [scales, last])
    (floats,) = writer.node(gather, "Cast", [rows], to=int(ir.DataType.FLOAT))
    writer.replace(gather, writer.node(gather, "Mul", [floats, scales])[0])
