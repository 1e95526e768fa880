"""Attention over a cache as ONNX Runtime's GroupQueryAttention (com.microsoft), positions rotated inside it.

The operator keeps keys and values in BNSH, appends the new ones (in place when past and present are one buffer), and
masks what lies ahead. Its rotation takes the tables of `edgeport.model.decoder.RotaryTables`, one half of them: both
halves say the same. Keys and values are rounded inside it where the cache holds integers, and tokens that have left a
layer's window are dropped. Where a model rotates only a part of each head or normalizes between, RotaryEmbedding
(com.microsoft) does it in front.

Source: ONNX Runtime, ContribOperators.md, 1.31.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from edgeport.export.onnx.canonical import is_operator
from edgeport.export.onnx.decoder import MASK, POSITIONS, past_names
from edgeport.export.onnx.graph import MICROSOFT, Writer, answer_for
from edgeport.export.onnx.trace import PLACEHOLDERS
from edgeport.formats import CACHE_BITS
from edgeport.model.types import Decoder

OPERATORS = ("GroupQueryAttention", "MultiHeadAttention")
BIAS, ATTENTION_BIAS = 6, 10
"""Place of what is added to the scores, in the placeholder and in the operator."""


def _made_by(value: ir.Value | None, op_type: str, domain: str = "") -> ir.Node | None:
    node = None if value is None else value.producer()
    return node if node is not None and is_operator(node, op_type, domain) else None


def _permutation(node: ir.Node) -> list[int]:
    return list(node.attributes.get_ints("perm", []))


def _flat(writer: Writer, before: ir.Node, value: ir.Value) -> ir.Value:
    """(1, heads, S, width) as (1, S, heads * width), past the reshape and transpose that cut it into heads."""
    turned = _made_by(value, "Transpose")
    if turned is not None and _permutation(turned) == [0, 2, 1, 3] and turned.inputs[0] is not None:
        apart = turned.inputs[0]
    else:
        (apart,) = writer.node(before, "Transpose", [value], perm=[0, 2, 1, 3])
    reshaped = _made_by(apart, "Reshape")
    whole = None if reshaped is None else reshaped.inputs[0]
    if whole is not None and whole.shape is not None and len(whole.shape) == 3:
        return whole
    (joined,) = writer.node(before, "Reshape", [apart, writer.shape([0, 0, -1])])
    return joined


def half_table(writer: Writer, table: ir.Value) -> ir.Value:
    """The first half of each row of a constant table."""
    assert table.const_value is not None
    array = table.const_value.numpy()
    return writer.constant(f"{table.name}.half", np.ascontiguousarray(array[:, : array.shape[1] // 2]))


def tables_of(rotary: ir.Node) -> tuple[ir.Value, ir.Value] | None:
    """The constant tables that a rotation reads."""
    found = []
    for value in rotary.inputs[1:3]:
        table = _made_by(value, "Table", PLACEHOLDERS)
        if table is None or table.inputs[0] is None or table.inputs[0].const_value is None:
            return None
        found.append(table.inputs[0])
    return found[0], found[1]


def _unscaled(query: ir.Value, attributes: dict[str, Any]) -> ir.Value:
    """A flat query without the one factor that it was multiplied by, which goes to the operator's scale (Whisper)."""
    product = _made_by(query, "Mul")
    if product is None or len(list(query.uses())) > 1:
        return query
    for value, factor in (product.inputs, product.inputs[::-1]):
        constant = None if factor is None else factor.const_value
        if value is not None and constant is not None and constant.size == 1 and value.const_value is None:
            attributes["scale"] = float(attributes["scale"] * constant.numpy().item())
            return value
    return query


class _Lengths:
    """How many tokens there are, as the operator wants to know it; made once a graph."""

    def __init__(self, writer: Writer, graph: ir.Graph) -> None:
        self.writer = writer
        self.mask = next(value for value in graph.inputs if value.name == MASK)
        self._made: tuple[ir.Value, ir.Value] | None = None

    def values(self, before: ir.Node) -> tuple[ir.Value, ir.Value]:
        """seqlens_k (1,), the tokens in all less one, and total_sequence_length, a scalar; int32."""
        if self._made is None:
            write = self.writer
            axis, one = (write.constant(f"edgeport.{name}", np.array([1], np.int64)) for name in ("axis_1", "one"))
            (count,) = write.node(before, "ReduceSum", [self.mask, axis], keepdims=0)
            (last,) = write.node(before, "Sub", [count, one])
            (seqlens,) = write.node(before, "Cast", [last], to=int(ir.DataType.INT32))
            (shape,) = write.node(before, "Shape", [self.mask])
            index = write.constant("edgeport.index_1", np.array(1, np.int64))
            (total,) = write.node(before, "Gather", [shape, index], axis=0)
            (total,) = write.node(before, "Cast", [total], to=int(ir.DataType.INT32))
            self._made = (seqlens, total)
        return self._made


def _rotated(x: ir.Value) -> tuple[ir.Value, tuple[ir.Value, ir.Value] | None]:
    """What a rotation turns, and the tables that it turns by; the value itself and None where there is none."""
    rotary = _made_by(x, "Rotary", PLACEHOLDERS)
    tables = None if rotary is None else tables_of(rotary)
    if rotary is None or tables is None or rotary.inputs[0] is None:
        return x, None
    return rotary.inputs[0], tables


def _rounding(writer: Writer, decoder: Decoder, past: str) -> tuple[list[ir.Value], dict[str, int | str]]:
    """Inputs 12 and 13 of the operator and its attributes for a cache of integers; nothing for one of floats."""
    if decoder.cache == "float":
        return [], {}
    index = past_names(len(decoder.layers)).index(past) // 2
    scales = decoder.scales[index]
    found = [
        writer.constant(f"edgeport.cache_{part}_{index}", scale.numpy()[None, :, None])
        for part, scale in (("key", scales.key), ("value", scales.value))
    ]
    bits = CACHE_BITS[decoder.cache]
    kind = "PER_CHANNEL"
    return found, {"k_quant_type": kind, "v_quant_type": kind, "kv_cache_bit_width": bits}


def _write_attention(writer: Writer, lengths: _Lengths, node: ir.Node, decoder: Decoder) -> None:
    query, key, value, *past = [x for x in node.inputs if x is not None][:5]
    bias = node.inputs[BIAS] if len(node.inputs) > BIAS else None
    (straight_query, tables), (straight_key, others) = _rotated(query), _rotated(key)
    inside = tables is not None and tables == others
    if inside:
        query, key = straight_query, straight_key
    attributes: dict[str, Any] = {name: attribute.value for name, attribute in node.attributes.items()}
    attributes.pop("version", None)
    flat, *rest = (_flat(writer, node, x) for x in (query, key, value))
    inputs: list[ir.Value | None] = [_unscaled(flat, attributes), *rest, *past, *lengths.values(node)]
    inputs += [half_table(writer, table) for table in tables] if inside and tables is not None else [None, None]
    scales, how = _rounding(writer, decoder, past[0].name or "")
    if bias is not None or scales:
        inputs += [None, bias, None, *scales]
    answer, present_key, present_value = writer.node(
        node, "GroupQueryAttention", inputs, domain=MICROSOFT, outputs=3, do_rotary=int(inside), **attributes, **how
    )
    (apart,) = writer.node(node, "Reshape", [answer, writer.shape([0, 0, int(attributes["num_heads"]), -1])])
    for old, new in zip(node.outputs, (apart, present_key, present_value), strict=True):
        answer_for(old, new)
    writer.graph.remove(node, safe=True)


def _write_cross_attention(writer: Writer, node: ir.Node) -> None:
    """Attention to states whose keys and values (1, heads, T, width) were computed before: MultiHeadAttention."""
    query, key, value = node.inputs
    assert query is not None
    attributes: dict[str, Any] = {name: attribute.value for name, attribute in node.attributes.items()}
    attributes.pop("version", None)
    inputs: list[ir.Value | None] = [_unscaled(_flat(writer, node, query), attributes), key, value]
    (answer,) = writer.node(node, "MultiHeadAttention", inputs, domain=MICROSOFT, **attributes)
    (apart,) = writer.node(node, "Reshape", [answer, writer.shape([0, 0, int(attributes["num_heads"]), -1])])
    writer.replace(node, apart)


def _write_rotation(writer: Writer, node: ir.Node, positions: ir.Value | None) -> None:
    tables = tables_of(node)
    assert tables is not None, "rotations are only marked where their tables are"
    halves = [half_table(writer, table) for table in tables]
    (turned,) = writer.node(node, "RotaryEmbedding", [node.inputs[0], positions, *halves], domain=MICROSOFT)
    writer.replace(node, turned)


def _join(writer: Writer, reshape: ir.Node) -> None:
    """Drop a reshape to (1, S, heads, width) that another one undoes at once."""
    for user, index in list(reshape.outputs[0].uses()):
        source = reshape.inputs[0]
        if index == 0 and is_operator(user, "Reshape") and source is not None and len(user.outputs[0].shape or ()) == 3:
            user.outputs[0].replace_all_uses_with(source)
            writer.graph.remove(user, safe=True)


def write_attention(program: ir.Model, decoder: Decoder) -> None:
    """Replace the placeholders of `decoder.py` in place; drop `position_ids` where nothing asks for it any more."""
    graph = program.graph
    graph.opset_imports.setdefault(MICROSOFT, 1)
    writer = Writer(graph)
    lengths = _Lengths(writer, graph)
    positions = next((value for value in graph.inputs if value.name == POSITIONS), None)
    for node in list(graph):
        if is_operator(node, "CachedAttention", PLACEHOLDERS):
            _write_attention(writer, lengths, node, decoder)
        elif is_operator(node, "CrossAttention", PLACEHOLDERS):
            _write_cross_attention(writer, node)
    RemoveUnusedNodesPass()(program)
    for node in list(graph):
        if is_operator(node, "Rotary", PLACEHOLDERS):
            _write_rotation(writer, node, positions)
    RemoveUnusedNodesPass()(program)
    for node in list(graph):
        if is_operator(node, "Table", PLACEHOLDERS):
            (rows,) = writer.node(node, "Gather", [node.inputs[0], node.inputs[1]], axis=0)
            writer.replace(node, rows)
        elif is_operator(node, "Reshape") and any(_made_by(node.inputs[0], kind, MICROSOFT) for kind in OPERATORS):
            _join(writer, node)
    RemoveUnusedNodesPass()(program)
    if positions is not None and not positions.uses():
        graph.inputs.remove(positions)
