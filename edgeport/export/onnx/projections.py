"""The projections to queries, keys and values as one product, which GroupQueryAttention takes as it is.

Three small products of one row cost more than their sum of work: SmolLM2's decoding took 17% less time with them
joined (one thread, x86-64; `scripts/bench/llm.py`). The rows of one weight follow those of another.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from edgeport.export.onnx.canonical import is_operator
from edgeport.export.onnx.graph import CODES, MICROSOFT, ZERO_POINT, Writer
from edgeport.quantized import ScaleDtype

BLOCKS = ("MatMulNBits", MICROSOFT)
OPERANDS = 6
"""x, codes, scales, zero points, group indices, bias."""


def _operands(node: ir.Node) -> list[ir.Value | None]:
    return [*node.inputs, *[None] * (OPERANDS - len(node.inputs))]


def _settings(node: ir.Node) -> dict[str, int]:
    return {name: attribute.as_int() for name, attribute in node.attributes.items() if name != "N"}


def _alike(nodes: list[ir.Node]) -> bool:
    """The products have one input, one form of weights, and all or none of them zero points."""
    first = nodes[0]
    return all(
        is_operator(node, *BLOCKS)
        and node.inputs[0] is first.inputs[0]
        and _settings(node) == _settings(first)
        and [value is None for value in _operands(node)[:5]] == [value is None for value in _operands(first)[:5]]
        and len(list(node.outputs[0].uses())) == 1
        and not node.outputs[0].is_graph_output()
        for node in nodes
    )


def _source(value: ir.Value | None) -> ir.Value | None:
    """The initializer that an operand is, behind a Reshape or a Cast, if nothing else reads it."""
    while value is not None and value.const_value is None:
        node = value.producer()
        if node is None or node.op_type not in ("Reshape", "Cast") or len(list(value.uses())) != 1:
            return None
        value = node.inputs[0]
    return value if value is not None and len(list(value.uses())) == 1 else None


def _rows(value: ir.Value, count: int) -> np.ndarray:
    """An initializer as an array (count, ...)."""
    assert value.const_value is not None
    return value.const_value.numpy().reshape(count, -1)


def _join(writer: Writer, attention: ir.Node, nodes: list[ir.Node], name: str) -> None:
    """Put one product in the place of several; `name` is that of the joined weight."""
    counts = [node.attributes.get_int("N") for node in nodes]
    settings = _settings(nodes[0])
    arrays: list[np.ndarray | None] = []
    for values in zip(*(_operands(node)[1:] for node in nodes), strict=True):
        # A bias may have other readers: it is small, and written once more.
        sources = [value if value is None or value.const_value is not None else _source(value) for value in values]
        none = all(value is None for value in sources)
        # Of all operands only biases may be some there and some not (Whisper's keys have none): those are zeros.
        rows = [
            np.zeros((count, 1), np.float32) if value is None else _rows(value, count)
            for value, count in zip(sources, counts, strict=True)
        ]
        arrays.append(None if none else np.concatenate(rows))
    codes, scale, zero, _, bias = arrays
    assert codes is not None
    assert scale is not None
    groups = settings["K"] // settings["block_size"]
    blocks = writer.shape([sum(counts), groups, settings["block_size"] * settings["bits"] // 8])
    dtype: ScaleDtype = "float16" if scale.dtype == np.float16 else "float32"
    inputs = [
        nodes[0].inputs[0],
        writer.of_weights("Reshape", [writer.constant(name + CODES, codes), blocks]),
        writer.scale(name, scale, dtype),
        None if zero is None else writer.constant(name + ZERO_POINT, zero),
        None,
        None if bias is None else writer.constant(name + ".bias", bias.reshape(-1)),
    ]
    (product,) = writer.node(attention, "MatMulNBits", inputs, domain=MICROSOFT, N=sum(counts), **settings)
    for index, value in enumerate((product, None, None)):
        attention.replace_input_with(index, value)


def initializer_names(stored: Mapping[str, str]) -> list[str]:
    """The names, without `.codes`, of the initializers that hold weights."""
    return list(dict.fromkeys(name.partition("[")[0].removesuffix(CODES) for name in stored.values()))


def join_projections(program: ir.Model, stored: Mapping[str, str]) -> dict[str, str]:
    """Join the projections of every GroupQueryAttention that has three alike, in place.

    Args:
        stored: for each compressed weight, the name of the initializer that holds its codes.

    Returns:
        The same after the joining: a joined weight's is "NAME[START:STOP]", the rows of an initializer.
    """
    graph, writer = program.graph, Writer(program.graph)
    after, parameters = dict(stored), {name: parameter for parameter, name in stored.items()}
    for attention in list(graph):
        if not is_operator(attention, "GroupQueryAttention", MICROSOFT):
            continue
        makers = [None if value is None else value.producer() for value in attention.inputs[:3]]
        nodes = [node for node in makers if node is not None]
        if len(nodes) < 3 or not _alike(nodes):
            continue
        operands = [value for node in nodes for value in _operands(node)[1:5] if value is not None]
        codes = [_source(node.inputs[1]) for node in nodes]
        if any(_source(value) is None for value in operands):
            continue
        names = [parameters[str(value.name)] for value in codes if value is not None]
        _join(writer, attention, nodes, f"{names[0]}.joined")
        start = 0
        for name, node in zip(names, nodes, strict=True):
            stop = start + node.attributes.get_int("N")
            after[name] = f"{names[0]}.joined{CODES}[{start}:{stop}]"
            start = stop
    RemoveUnusedNodesPass()(program)
    return after
