"""The last touches on a graph: float16 storage, names of dimensions, and nothing that betrays a machine."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from edgeport.errors import TargetRefusesError
from edgeport.export.onnx.native import CODES, SCALE
from edgeport.model.types import Axis, Model, TensorSpec

SMALLEST_HALF = 256
"""Float tensors with fewer values stay float32: a Cast costs more than it saves."""

DOMAINS = ("", "ai.onnx", "ai.onnx.ml", "com.microsoft")
"""Operator domains that ONNX Runtime knows."""


def fuse(program: ir.Model) -> None:
    """Fuse a graph in place into the operators that ONNX Runtime's CPU provider runs fastest."""
    from transformers.exporters.onnxruntime_fusions import fuse_for_onnxruntime

    fuse_for_onnxruntime(program, "cpu")


def store_float16(program: ir.Model) -> int:
    """Store large float32 initializers as float16, each behind a Cast to float32. Returns how many.

    ONNX Runtime's CPU provider computes in float32 and folds these Casts when it loads the file. Scales of
    integer weights stay as they are, and so does what float16 can't hold (masks of -3.4e38).
    """
    graph = program.graph
    count = 0
    for value in list(graph.initializers.values()):
        tensor = value.const_value
        name = value.name or ""
        if tensor is None or tensor.dtype != ir.DataType.FLOAT or tensor.size < SMALLEST_HALF:
            continue
        if name.endswith((CODES, SCALE)):
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
    """Give each symbolic dimension the name of its axis, in every value's shape."""
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
        if value.shape is not None:
            value.shape = ir.Shape(
                [
                    names.get(dimension.value, dimension.value) if isinstance(dimension, ir.SymbolicDim) else dimension
                    for dimension in value.shape
                ]
            )


def _forget_inner_shapes(graph: ir.Graph) -> None:
    """Drop the shapes of intermediate values: ONNX Runtime infers them, and stale ones only warn."""
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
    _forget_inner_shapes(graph)
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
