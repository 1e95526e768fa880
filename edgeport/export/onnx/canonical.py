"""Give every compressed weight one marker and every layer that multiplies by it one form.

Exporters write a Linear layer as `MatMul(x, Transpose(w)) + b`, or as `Gemm`. Here it becomes
`edgeport::Linear(x, w, b)`, so that the fusions that follow can't tear the weight from its layer. A table that is
looked up by `GatherND` (Whisper's positions) is looked up by `Gather`.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from edgeport.errors import TargetRefusesError
from edgeport.export.onnx.trace import PLACEHOLDERS


def is_operator(node: ir.Node, op_type: str, domain: str = "") -> bool:
    """The node is that operator of that domain."""
    return node.op_type == op_type and node.domain in ((domain, "ai.onnx") if domain == "" else (domain,))


def weight_nodes(graph: ir.Graph) -> dict[str, list[ir.Node]]:
    """The markers of each compressed weight, by parameter name."""
    found: dict[str, list[ir.Node]] = {}
    for node in graph:
        if is_operator(node, "Weight", PLACEHOLDERS):
            found.setdefault(node.attributes.get_string("name", ""), []).append(node)
    return found


def _merge_markers(graph: ir.Graph) -> dict[str, ir.Value]:
    """One marker a weight, before every node that uses it. Returns its output by parameter name."""
    merged = {}
    for name, nodes in weight_nodes(graph).items():
        first = nodes[0]
        graph.remove(first)
        graph.insert_before(graph[0], first)
        for other in nodes[1:]:
            other.outputs[0].replace_all_uses_with(first.outputs[0])
            graph.remove(other, safe=True)
        merged[name] = first.outputs[0]
    return merged


def _transposed(value: ir.Value) -> list[ir.Value]:
    """The values that are `Transpose(value)` with both dimensions swapped."""
    return [
        user.outputs[0]
        for user, _ in value.uses()
        if is_operator(user, "Transpose") and list(user.attributes.get_ints("perm", [1, 0])) == [1, 0]
    ]


def _bias_add(product: ir.Value, channels: int) -> tuple[ir.Node, ir.Value] | None:
    """The `Add` of a constant bias of shape (channels,) that is the product's only use."""
    uses = list(product.uses())
    if len(uses) != 1 or product.is_graph_output() or not is_operator(uses[0][0], "Add"):
        return None
    add, index = uses[0]
    bias = add.inputs[1 - index]
    if bias is None or not bias.is_initializer() or bias.shape is None or list(bias.shape) != [channels]:
        return None
    return add, bias


def _replace_by_linear(node: ir.Node, x: ir.Value, weight: ir.Value, bias: ir.Value | None, last: ir.Node) -> None:
    """Put `edgeport::Linear` in the place of `node`, answering for the output of `last` (the bias's Add, or `node`)."""
    old = last.outputs[0]
    linear = ir.node("Linear", [x, weight] if bias is None else [x, weight, bias], domain=PLACEHOLDERS)
    new = linear.outputs[0]
    new.shape, new.type = old.shape, old.type
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    graph.insert_before(last, linear)
    name, is_output = old.name, old.is_graph_output()
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove(last, safe=True)
    if last is not node:
        graph.remove(node, safe=True)
    if is_output:
        new.name = name


def _is_plain_gemm(node: ir.Node, transposed_weight: int) -> bool:
    attributes = node.attributes
    return (
        is_operator(node, "Gemm")
        and attributes.get_int("transB", 0) == transposed_weight
        and attributes.get_int("transA", 0) == 0
        and attributes.get_float("alpha", 1.0) == 1.0
        and attributes.get_float("beta", 1.0) == 1.0
    )


def _form_linears(weight: ir.Value, channels: int) -> None:
    candidates = [(user, index, 1) for user, index in weight.uses()]
    for turned in _transposed(weight):
        candidates += [(user, index, 0) for user, index in turned.uses()]
    for user, index, transposed in candidates:
        x = user.inputs[0]
        if index != 1 or x is None:
            continue
        if _is_plain_gemm(user, transposed):
            bias = user.inputs[2] if len(user.inputs) > 2 else None
            if bias is None or (bias.shape is not None and list(bias.shape) == [channels]):
                _replace_by_linear(user, x, weight, bias, user)
        elif is_operator(user, "MatMul") and transposed == 0:
            add = _bias_add(user.outputs[0], channels)
            if add is None:
                _replace_by_linear(user, x, weight, None, user)
            else:
                _replace_by_linear(user, x, weight, add[1], add[0])


def _form_gathers(graph: ir.Graph, weight: ir.Value) -> None:
    """Write a table's `GatherND` over one axis as the `Gather` it is: what `table[ids]` on tensors is exported as."""
    for user, index in list(weight.uses()):
        ids = user.inputs[1] if len(user.inputs) > 1 else None
        if not is_operator(user, "GatherND") or index != 0 or ids is None or ids.shape is None:
            continue
        if user.attributes.get_int("batch_dims", 0) or ids.shape[-1] != 1:
            continue
        last = ir.Value(name=f"{user.outputs[0].name}.last_axis", const_value=ir.tensor(np.array([-1], np.int64)))
        graph.register_initializer(last)
        squeeze = ir.node("Squeeze", [ids, last])
        gather = ir.node("Gather", [weight, squeeze.outputs[0]], {"axis": 0})
        old, new = user.outputs[0], gather.outputs[0]
        new.shape, new.type = old.shape, old.type
        graph.insert_before(user, [squeeze, gather])
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        graph.remove(user, safe=True)


def _check_hidden_uses(graph: ir.Graph) -> None:
    """Refuse when a compressed weight is read past its marker: the file would hold it again, uncompressed."""
    for parameter in graph.initializers.values():
        # The name that torch gives a parametrized weight, see `trace.marked_copy`.
        owner = (parameter.name or "").replace(".parametrizations.", ".").removesuffix(".original")
        if owner == parameter.name:
            continue
        unmarked = [user for user, _ in parameter.uses() if not is_operator(user, "Weight", PLACEHOLDERS)]
        if unmarked or parameter.is_graph_output():
            raise TargetRefusesError(
                f"The model reads a compressed weight in a way that hides it from the exporter "
                f"({unmarked[0].op_type if unmarked else 'as an output'}).",
                where=owner,
                next_step="Exclude it in the recipe (`exclude`).",
            )


def canonicalize(program: ir.Model, names: list[str]) -> list[str]:
    """Change a traced graph in place into the form that `native.py` takes.

    Returns:
        The compressed weights that take no part in the exported outputs (a pooler, when only the hidden
        state is exported): they are not in the file.

    Raises:
        TargetRefusesError: a compressed weight is also used past its marker.
    """
    graph = program.graph
    _check_hidden_uses(graph)
    RemoveUnusedNodesPass()(program)
    merged = _merge_markers(graph)
    for weight in merged.values():
        if weight.shape is not None and len(weight.shape) == 2:
            _form_linears(weight, int(weight.shape[0]))  # type: ignore[arg-type]
        _form_gathers(graph, weight)
    RemoveUnusedNodesPass()(program)
    return [name for name in names if name not in merged]
