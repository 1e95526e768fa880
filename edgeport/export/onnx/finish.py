"""The last touches on a graph: float16 storage, names of dimensions, and nothing that betrays a machine."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from edgeport.errors import TargetRefusesError
from edgeport.model.types import Axis, Model, TensorSpec

SMALLEST_HALF = 256
"""Float tensors with fewer values stay float32: a Cast costs more than it saves."""

SKIP_NORMS = {
    "SkipLayerNormalization": (2, "LayerNormalization"),
    "SkipSimplifiedLayerNormalization": (1, "SimplifiedLayerNormalization"),
}
"""Fused operator: how many of its inputs are the norm's own, and the norm."""

DOMAINS = ("", "ai.onnx", "ai.onnx.ml", "com.microsoft")
"""Operator domains that ONNX Runtime knows."""


PLAIN = {"Add", "AveragePool", "Clip", "Concat", "Conv", "Flatten", "GlobalAveragePool", "Linear", "MaxPool", "Mul"}
PLAIN |= {"Pad", "Quantized", "ReduceMean", "Relu", "Reshape", "Sigmoid", "Weight"}
"""What convolutional networks are made of: nothing in them can be fused into an operator for transformers."""


def fuse(program: ir.Model, *, decoder: bool = False) -> None:
    """Fuse a graph in place into the operators that ONNX Runtime's CPU provider runs fastest.

    Args:
        decoder: most calls have one row. Skip normalizations without a mean then stay fused: SmolLM2 decodes a tenth
            faster so, and reads prompts as fast (one thread, x86-64; `scripts/bench/llm.py`).
    """
    if all(node.op_type in PLAIN for node in program.graph.all_nodes()):
        return  # looking for patterns takes a fifth of a small network's conversion
    from transformers.exporters.onnxruntime_fusions import fuse_for_onnxruntime

    fuse_for_onnxruntime(program, "cpu")
    for node in list(program.graph.all_nodes()):
        kept = decoder and node.op_type == "SkipSimplifiedLayerNormalization"
        if node.domain == "com.microsoft" and node.op_type in SKIP_NORMS and not kept:
            _unfuse_skip_norm(node)


def _unfuse_skip_norm(node: ir.Node) -> None:
    """Take the sum out of a skip normalization: ONNX Runtime's CPU kernel for the two together is 5 times slower.

    The sum is written as `Sum`, not `Add`: ONNX Runtime would fuse an Add back again when it loads the file.
    """
    count, op_type = SKIP_NORMS[node.op_type]
    x, skip, *parameters = node.inputs
    bias = parameters[count] if len(parameters) > count else None
    total = ir.node("Sum", [value for value in (x, skip, bias) if value is not None])
    attributes = {"axis": -1, "epsilon": node.attributes.get_float("epsilon", 1e-5)}
    norm = ir.node(op_type, [total.outputs[0], *parameters[:count]], attributes=attributes)
    graph = node.graph
    assert graph is not None
    graph.insert_before(node, [total, norm])
    new = {0: norm.outputs[0], 3: total.outputs[0]}
    for index, old in enumerate(node.outputs):
        if index in new:
            new[index].shape, new[index].type = node.outputs[0].shape, node.outputs[0].type
            name, is_output = old.name, old.is_graph_output()
            old.replace_all_uses_with(new[index], replace_graph_outputs=True)
            if is_output:
                new[index].name = name
    graph.remove(node, safe=True)


def store_float16(program: ir.Model, names: list[str]) -> int:
    """Store large float32 initializers as float16, each behind a Cast to float32. Returns how many.

    ONNX Runtime's CPU provider computes in float32 and folds these Casts when it loads the file. What
    float16 can't hold stays as it is (masks of -3.4e38).

    Args:
        names: of the initializers to store so, as far as they are in the graph; no scales of integer weights.
    """
    graph = program.graph
    count = 0
    for name in names:
        value = graph.initializers.get(name)
        tensor = None if value is None else value.const_value
        if value is None or tensor is None or tensor.dtype != ir.DataType.FLOAT or tensor.size < SMALLEST_HALF:
            continue
        array = tensor.numpy()
        if not bool(np.all(np.abs(array) <= np.finfo(np.float16).max)):
            continue
        half = ir.Value(name=f"{name}.half", const_value=ir.tensor(array.astype(np.float16), name=f"{name}.half"))
        half.dtype, half.shape = ir.DataType.FLOAT16, value.shape
        graph.register_initializer(half)
        cast = ir.node("Cast", [half], attributes={"to": int(ir.DataType.FLOAT)})
        cast.outputs[0].shape, cast.outputs[0].dtype = value.shape, ir.DataType.FLOAT
        graph.insert_before(graph[0], cast)
        value.replace_all_uses_with(cast.outputs[0], replace_graph_outputs=True)
        del graph.initializers[name]
        count += 1
    return count


def _rename_dimensions(graph: ir.Graph, model: Model) -> None:
    """Give each symbolic dimension the name of its axis, and drop the exporters' notes on values."""
    names: dict[str, str] = {}
    specs = {spec.name: spec for spec in (*model.inputs, *model.outputs)}
    for value in (*graph.inputs, *graph.outputs):
        spec = specs.get(value.name or "")
        if spec is None or value.shape is None:
            continue
        for axis, dimension in zip(spec.shape, value.shape, strict=False):
            symbol = getattr(dimension, "value", None)
            if isinstance(axis, Axis) and symbol:
                names.setdefault(symbol, axis.name)
    values = [*graph.inputs, *graph.initializers.values()]
    for node in graph.all_nodes():
        values.extend(node.outputs)
    for value in values:
        value.metadata_props.clear()
        value.doc_string = None
        if value.shape is not None:
            value.shape = ir.Shape(
                [
                    names.get(dimension.value or "", dimension.value)
                    if isinstance(dimension, ir.SymbolicDim)
                    else dimension
                    for dimension in value.shape
                ]
            )


def _correct_shapes(graph: ir.Graph) -> None:
    """Drop the shapes of intermediate values, which the runtime infers, and say initializers' shapes as they are.

    Fusions leave both stale: a scale of one value declared as a scalar, say, which a strict checker refuses.
    """
    for value in graph.initializers.values():
        if value.const_value is not None:
            value.shape = ir.Shape(value.const_value.shape.numpy())
    kept = {id(value) for value in (*graph.inputs, *graph.outputs, *graph.initializers.values())}
    for node in graph.all_nodes():
        for output in node.outputs:
            if id(output) not in kept:
                output.shape, output.type = None, None


def _check_operators(program: ir.Model, model: Model) -> None:
    for node in program.graph.all_nodes():
        if node.domain not in DOMAINS and (node.domain, node.op_type, node.overload) not in program.functions:
            raise TargetRefusesError(
                f"ONNX Runtime has no operator {node.domain}.{node.op_type}.",
                where=model.name,
                next_step="Replace that operation in the model, or choose another target (`edgeport targets`).",
            )


def finish(program: ir.Model, model: Model) -> None:
    """Name dimensions and nodes, drop what the exporters noted about this machine, and check the operators.

    Raises:
        TargetRefusesError: naming an operator that ONNX Runtime does not have.
    """
    graph = program.graph
    _check_operators(program, model)
    common.ClearMetadataAndDocStringPass()(program)
    _correct_shapes(graph)
    _rename_dimensions(graph, model)
    common.RemoveUnusedOpsetsPass()(program)
    common.TopologicalSortPass()(program)
    for index, node in enumerate(graph.all_nodes()):
        node.name = f"{node.op_type}_{index}"
    graph.name = model.name
    graph.doc_string = None
    program.producer_name, program.producer_version = "edgeport", None
    program.domain, program.model_version, program.doc_string = None, None, None
    program.metadata_props.clear()


def file_specs(values: list[ir.Value], promised: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    """Inputs or outputs as the file has them, with the promised `Axis` where the file's dimension is symbolic."""
    by_name = {spec.name: spec for spec in promised}
    specs = []
    for value in values:
        name = value.name or ""
        spec = by_name[name]
        assert value.dtype is not None
        if value.shape is None or len(value.shape) != len(spec.shape):
            specs.append(spec)
            continue
        shape: list[int | Axis] = []
        for axis, dimension in zip(spec.shape, value.shape, strict=True):
            shape.append(dimension if isinstance(dimension, int) else axis)
        specs.append(TensorSpec(name, value.dtype.numpy().name, tuple(shape)))
    return tuple(specs)
