"""From a torch module to an ONNX graph in memory, with every compressed weight marked.

A compressed weight must be found again after the exporter has renamed, transposed and folded what it
likes. So each one is read through a placeholder operator, `edgeport::Weight(parameter)`, whose `name`
attribute says which weight it is: no exporter folds an operator that it does not know, and every use of
the weight hangs on it. `native.py` then replaces it.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.utils import parametrize

from edgeport.activations import ActivationGrid, round_layers
from edgeport.errors import BadInputError, EdgeportError, TargetRefusesError, first_line
from edgeport.export.artifact import LoweringSettings
from edgeport.model.types import Axis, Model

if TYPE_CHECKING:
    import onnx_ir as ir

PLACEHOLDERS = "edgeport"
"""Domain of the operators that stand for compressed weights until `native.py` replaces them."""

NOISY_LOGGERS = ("torch.onnx", "torch.export", "torch.utils._pytree", "transformers", "onnxscript", "onnx_ir")


class _Mark(torch.nn.Module):
    """Reads a weight through `edgeport::Weight` while an export is traced, and as it is otherwise."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """Any shape in, the same shape and values out."""
        if not torch.compiler.is_exporting():
            return weight
        marked: torch.Tensor = torch.onnx.ops.symbolic(
            f"{PLACEHOLDERS}::Weight", (weight,), {"name": self.name}, dtype=weight.dtype, shape=weight.shape, version=1
        )
        return marked


def _mark_rounding(x: torch.Tensor, grid: ActivationGrid) -> torch.Tensor:
    """`edgeport::Quantized` on the way to a static layer while an export is traced; any shape, any values."""
    if not torch.compiler.is_exporting():
        return x
    marked: torch.Tensor = torch.onnx.ops.symbolic(
        f"{PLACEHOLDERS}::Quantized",
        (x,),
        {"scale": grid.scale, "zero_point": grid.zero_point},
        dtype=x.dtype,
        shape=x.shape,
        version=1,
    )
    return marked


class _Positional(torch.nn.Module):
    """The module with inputs by position and the named outputs as a tuple, as `torch.onnx.export` likes them."""

    def __init__(self, module: torch.nn.Module, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        super().__init__()
        self.module, self.inputs, self.outputs = module, tuple(inputs), tuple(outputs)

    def forward(self, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The tensors named in `inputs`, in that order, give the tensors named in `outputs`."""
        result = self.module(**dict(zip(self.inputs, values, strict=True)))
        if isinstance(result, torch.Tensor):
            return (result,)
        if isinstance(result, Mapping):
            return tuple(result[name] for name in self.outputs)
        return tuple(result[: len(self.outputs)])


def marked_copy(model: Model) -> torch.nn.Module:
    """A copy of the module's structure, sharing its tensors, that marks each compressed weight wherever it is used,
    and each activation that is rounded to a grid."""
    tensors = [*model.module.parameters(), *model.module.buffers()]
    module = copy.deepcopy(model.module, memo={id(tensor): tensor for tensor in tensors})
    parameters = dict(module.named_parameters(remove_duplicate=False))
    names = {id(parameters[name]): name for name in model.quantized}
    for layer in list(module.modules()):
        for attribute, parameter in list(layer.named_parameters(recurse=False)):
            name = names.get(id(parameter))
            if name is not None:
                parametrize.register_parametrization(layer, attribute, _Mark(name), unsafe=True)
    round_layers(module, model.ranges, _mark_rounding)
    return module


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the exporters' progress lines, version remarks and deprecation warnings off the user's terminal."""
    loggers = [logging.getLogger(name) for name in NOISY_LOGGERS]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _traced_size(axis: Axis) -> int:
    """torch.export takes a size of 1 for a constant, so a dimension that varies is traced with 2 or more."""
    return max(axis.example, 2)


def _grow(tensor: torch.Tensor, dimension: int, size: int) -> torch.Tensor:
    """Repeat a tensor along one dimension until it has `size` entries there."""
    repeats = -(-size // tensor.shape[dimension])
    return torch.cat([tensor] * repeats, dimension).narrow(dimension, 0, size)


def trace_inputs(
    model: Model, settings: LoweringSettings
) -> tuple[dict[str, torch.Tensor], dict[str, dict[int, Any]] | None]:
    """The example inputs to trace with, and torch.export's dynamic shapes (None when all shapes are fixed)."""
    example = {spec.name: model.example[spec.name] for spec in model.inputs}
    if settings.shapes == "fixed":
        return example, None
    shapes: dict[str, dict[int, Any]] = {}
    for spec in model.inputs:
        shapes[spec.name] = {}
        for dimension, axis in enumerate(spec.shape):
            if isinstance(axis, Axis) and axis.varies:
                hint = torch.export.Dim.AUTO(min=axis.minimum, max=axis.maximum)
                shapes[spec.name][dimension] = hint
                example[spec.name] = _grow(example[spec.name], dimension, _traced_size(axis))
    return example, shapes


def _export_huggingface(
    module: torch.nn.Module, example: Mapping[str, torch.Tensor], shapes: dict[str, Any] | None, opset: int
) -> ir.Model:
    from transformers.exporters import OnnxConfig, OnnxExporter

    config = OnnxConfig(dynamic=shapes is not None, dynamic_shapes=shapes, opset_version=opset)
    # A plain forward: no key-value cache among the outputs.
    program: ir.Model = OnnxExporter().export(module, {**example, "use_cache": False}, config).program
    return program


def _export_torch(
    module: torch.nn.Module,
    model: Model,
    example: Mapping[str, torch.Tensor],
    shapes: dict[str, Any] | None,
    opset: int,
) -> ir.Model:
    outputs = [spec.name for spec in model.outputs]
    with torch.no_grad():
        program = torch.onnx.export(
            _Positional(module, list(example), outputs).eval(),
            tuple(example.values()),
            input_names=list(example),
            output_names=outputs,
            opset_version=opset,
            dynamic_shapes=None if shapes is None else (tuple(shapes.values()),),
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    graph: ir.Model = program.model
    return graph


def _refusal(error: BaseException, model: Model) -> TargetRefusesError:
    """What the exporter could not take, as one sentence that names the operator where there is one."""
    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None and cause not in causes:
        causes.append(cause)
    found = None
    for item in reversed(causes):
        found = found or re.search(r"OpOverload\(op='([\w.]+)'", str(item)) or re.search(r"\b(aten\.\w+)", str(item))
    operator = f": it has no form for the operator {found[1]}" if found else ""
    return TargetRefusesError(
        f"The ONNX exporter can't convert this model{operator}.",
        where=f"{model.name} ({first_line(error)[:300]})",
        next_step="Replace that operation in the model, or choose a target with another runtime (`edgeport targets`).",
    )


def _check_axes(graph: ir.Graph, model: Model) -> None:
    """Refuse when the model's code turned a dimension that should vary into a constant."""
    values = {value.name: value for value in (*graph.inputs, *graph.outputs)}
    for spec in (*model.inputs, *model.outputs):
        value = values.get(spec.name)
        if value is None or value.shape is None or len(value.shape) != len(spec.shape):
            continue
        for axis, size in zip(spec.shape, value.shape, strict=True):
            if isinstance(axis, Axis) and axis.varies and isinstance(size, int):
                raise TargetRefusesError(
                    f"The model's code fixes the {axis.name!r} dimension of {spec.name!r} to {size}: it can't vary.",
                    where=model.name,
                    allowed="fixed shapes",
                    next_step="Export with fixed shapes.",
                )


def _select_outputs(graph: ir.Graph, model: Model) -> None:
    """Keep the outputs that the model names, in its order."""
    by_name = {(value.name or "").removeprefix("output."): value for value in graph.outputs}
    missing = [spec.name for spec in model.outputs if spec.name not in by_name]
    if missing:
        raise BadInputError(
            f"The model gives no output named {missing[0]!r}.", where=model.name, allowed=sorted(by_name)
        )
    chosen = [by_name[spec.name] for spec in model.outputs]
    graph.outputs.clear()
    graph.outputs.extend(chosen)


def trace_decoder(
    model: Model, files: Model, export: Callable[[torch.nn.Module, Model, int], ir.Model], opset: int
) -> ir.Model:
    """Export a model with a cache by `export(marked module, model, opset)`.

    Args:
        files: the model with the inputs and outputs that the graph has.

    Raises:
        TargetRefusesError: the exporter can't convert the model.
    """
    with quiet():
        try:
            program = export(marked_copy(model), model, opset)
        except EdgeportError:
            raise
        except Exception as error:
            raise _refusal(error, model) from error
    _select_outputs(program.graph, files)
    return program


def trace(model: Model, settings: LoweringSettings, opset: int) -> ir.Model:
    """Export a model to an ONNX graph, unfused, with an `edgeport::Weight` on each compressed weight.

    Raises:
        TargetRefusesError: the exporter can't convert the model, or a dimension that should vary can't.
        BadInputError: an output that the model promises does not exist.
    """
    if model.decoder is not None:
        from edgeport.export.onnx.decoder import export_decoder, file_model

        return trace_decoder(model, file_model(model), export_decoder, opset)
    module = marked_copy(model)
    example, shapes = trace_inputs(model, settings)
    with quiet():
        try:
            if model.huggingface:
                program = _export_huggingface(module, example, shapes, opset)
            else:
                program = _export_torch(module, model, example, shapes, opset)
        except Exception as error:
            raise _refusal(error, model) from error
    _select_outputs(program.graph, model)
    if shapes is not None:
        _check_axes(program.graph, model)
    return program
