"""Attention over a cache in operators of the ONNX standard alone (opset 23): any runtime that knows them can read it.

    Attention(Q, K, V, mask (S, T), past key, past value) -> Y, present key, present value

Keys and values are float and grow: present is past with the new tokens behind it, and a new buffer at every call. What
a token sees is said by the mask, windows too. The standard's soft cap comes after the mask in opset 23, where it would
let a token see what is hidden, so layers with one are written out as matrix products.

Source: ONNX, Operators.md: Attention-23, RotaryEmbedding-23.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from edgeport.export.onnx.attention import half_table, tables_of
from edgeport.export.onnx.canonical import is_operator
from edgeport.export.onnx.decoder import MASK, POSITIONS, past_names
from edgeport.export.onnx.graph import Writer, answer_for
from edgeport.export.onnx.trace import PLACEHOLDERS
from edgeport.model.types import AttentionLayer, Decoder

HIDDEN_SCORE = -1e9


class _Masks:
    """What each token sees, (S, T) of booleans, made once for every window."""

    def __init__(self, writer: Writer, graph: ir.Graph) -> None:
        self.writer = writer
        values = {value.name: value for value in graph.inputs}
        self.mask, self.positions = values[MASK], values[POSITIONS]
        self._made: dict[int | None, ir.Value] = {}

    def _number(self, value: int) -> ir.Value:
        return self.writer.constant(f"edgeport.number_{value}", np.array(value, np.int64))

    def seen(self, before: ir.Node, window: int | None) -> ir.Value:
        """True where the key's position is the query's or before it, and inside the window."""
        if window not in self._made:
            write = self.writer
            (shape,) = write.node(before, "Shape", [self.mask])
            (total,) = write.node(before, "Gather", [shape, self._number(1)], axis=0)
            (keys,) = write.node(before, "Range", [self._number(0), total, self._number(1)])
            column = write.shape([-1, 1])
            (queries,) = write.node(before, "Reshape", [self.positions, column])
            (seen,) = write.node(before, "LessOrEqual", [keys, queries])
            if window is not None:
                (first,) = write.node(before, "Sub", [queries, self._number(window)])
                (near,) = write.node(before, "Greater", [keys, first])
                (seen,) = write.node(before, "And", [seen, near])
            self._made[window] = seen
        return self._made[window]


def _joined(writer: Writer, node: ir.Node, past: ir.Value, new: ir.Value) -> ir.Value:
    (whole,) = writer.node(node, "Concat", [past, new], axis=2)
    return whole


def _softcapped(
    writer: Writer,
    node: ir.Node,
    layer: AttentionLayer,
    query: ir.Value,
    keys: ir.Value,
    values: ir.Value,
    seen: ir.Value,
) -> ir.Value:
    """softmax(c tanh(scale q k^T / c), hidden ones left out) v; (1, heads, S, head_dim)."""
    assert layer.softcap is not None
    groups, width = layer.heads // layer.kv_heads, layer.head_dim

    def number(value: float) -> ir.Value:
        return writer.constant(f"edgeport.float_{value!r}", np.array(value, np.float32))

    # Query heads that share a key lie behind each other: (kv_heads, groups, S, head_dim).
    (grouped,) = writer.node(node, "Reshape", [query, writer.shape([layer.kv_heads, groups, -1, width])])
    axis = writer.constant("edgeport.axis_1", np.array([1], np.int64))
    (shared,) = writer.node(node, "Squeeze", [keys, writer.constant("edgeport.axis_0", np.array([0], np.int64))])
    (shared,) = writer.node(node, "Unsqueeze", [shared, axis])
    (turned,) = writer.node(node, "Transpose", [shared], perm=[0, 1, 3, 2])
    (scores,) = writer.node(node, "MatMul", [grouped, turned])
    (scores,) = writer.node(node, "Mul", [scores, number(layer.scale / layer.softcap)])
    (scores,) = writer.node(node, "Tanh", [scores])
    (scores,) = writer.node(node, "Mul", [scores, number(layer.softcap)])
    (scores,) = writer.node(node, "Where", [seen, scores, number(HIDDEN_SCORE)])
    (shares,) = writer.node(node, "Softmax", [scores], axis=-1)
    (content,) = writer.node(node, "Squeeze", [values, writer.constant("edgeport.axis_0", np.array([0], np.int64))])
    (content,) = writer.node(node, "Unsqueeze", [content, axis])
    (answer,) = writer.node(node, "MatMul", [shares, content])
    (answer,) = writer.node(node, "Reshape", [answer, writer.shape([1, layer.heads, -1, width])])
    return answer


def _write_attention(writer: Writer, masks: _Masks, node: ir.Node, layer: AttentionLayer) -> None:
    query, key, value, past_key, past_value = [x for x in node.inputs if x is not None][:5]
    seen = masks.seen(node, layer.window)
    if layer.softcap is None:
        inputs: list[ir.Value | None] = [query, key, value, seen, past_key, past_value]
        answer, *present = writer.node(node, "Attention", inputs, outputs=3, scale=layer.scale)
    else:
        present = [_joined(writer, node, past_key, key), _joined(writer, node, past_value, value)]
        answer = _softcapped(writer, node, layer, query, present[0], present[1], seen)
    (turned,) = writer.node(node, "Transpose", [answer], perm=[0, 2, 1, 3])
    for old, new in zip(node.outputs, (turned, *present), strict=True):
        answer_for(old, new)
    writer.graph.remove(node, safe=True)


def write_standard_attention(program: ir.Model, decoder: Decoder) -> None:
    """Replace the placeholders of `decoder.py` in place, by operators of the standard."""
    graph = program.graph
    writer = Writer(graph)
    masks = _Masks(writer, graph)
    names = past_names(len(decoder.layers))
    for node in list(graph):
        if is_operator(node, "CachedAttention", PLACEHOLDERS):
            past = node.inputs[3]
            assert past is not None
            _write_attention(writer, masks, node, decoder.layers[names.index(past.name or "") // 2])
        elif is_operator(node, "Rotary", PLACEHOLDERS):
            tables = tables_of(node)
            assert tables is not None, "rotations are only marked where their tables are"
            inputs = [node.inputs[0], *(half_table(writer, table) for table in tables), masks.positions]
            writer.replace(node, writer.node(node, "RotaryEmbedding", inputs)[0])
    RemoveUnusedNodesPass()(program)
    for node in list(graph):
        if is_operator(node, "Table", PLACEHOLDERS):
            (rows,) = writer.node(node, "Gather", [node.inputs[0], node.inputs[1]], axis=0)
            writer.replace(node, rows)
    RemoveUnusedNodesPass()(program)
