"""From a torch module to an exported program that coremltools can convert.

`torch.export` (through transformers' exporter for its models) gives ATen operators. Those that coremltools
does not know are taken apart by torch's own decompositions, and only those: a `linear` that stays whole keeps
its weight whole, so that a compressed weight meets its operator directly.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import is_concrete_int

from edgeport.errors import BadInputError, TargetRefusesError
from edgeport.export.artifact import LoweringSettings
from edgeport.export.coreml.library import quiet
from edgeport.export.coreml.patches import forward_replaced, plain_attention, plain_masks
from edgeport.model.types import Axis, Model

aten = torch.ops.aten
SEQUENCE = "sequence"
"""The axis whose sizes `LoweringSettings.enumerated` lists."""


def varies(axis: int | Axis, settings: LoweringSettings) -> bool:
    """The dimension keeps its freedom in the program: pictures and enumerated shapes leave less of it."""
    if not isinstance(axis, Axis) or axis.maximum <= axis.minimum or settings.image_input:
        return False
    if settings.enumerated:
        return axis.name == SEQUENCE and len(settings.enumerated) > 1
    return settings.shapes == "dynamic"


def fixed_size(axis: int | Axis, settings: LoweringSettings) -> int:
    """The size of a dimension that does not vary (and the default size of one that does)."""
    if isinstance(axis, int):
        return axis
    return settings.enumerated[0] if settings.enumerated and axis.name == SEQUENCE else axis.example


def _grow(tensor: torch.Tensor, dimension: int, size: int) -> torch.Tensor:
    """Repeat or cut a tensor along one dimension to `size` entries."""
    repeats = -(-size // tensor.shape[dimension])
    return torch.cat([tensor] * repeats, dimension).narrow(dimension, 0, size)


def trace_inputs(
    model: Model, settings: LoweringSettings
) -> tuple[dict[str, torch.Tensor], dict[str, dict[int, Any]] | None]:
    """Example inputs to trace with, and torch.export's dynamic shapes (None when every shape is fixed).

    torch.export takes a size of 1 for a constant, so a dimension that varies is traced with 2 or more.
    """
    example = {spec.name: model.example[spec.name] for spec in model.inputs}
    shapes: dict[str, dict[int, Any]] = {spec.name: {} for spec in model.inputs}
    for spec in model.inputs:
        for dimension, axis in enumerate(spec.shape):
            size = fixed_size(axis, settings)
            if isinstance(axis, Axis) and varies(axis, settings):
                shapes[spec.name][dimension] = torch.export.Dim.AUTO(min=axis.minimum, max=axis.maximum)
                size = max(size, 2)
            example[spec.name] = _grow(example[spec.name], dimension, size)
    return example, shapes if any(shapes.values()) else None


def _select(result: Any, names: tuple[str, ...]) -> tuple[torch.Tensor, ...]:
    """The tensors that the model names, in its order, out of what its module returned."""
    if isinstance(result, torch.Tensor):
        result = (result,)
    if isinstance(result, Mapping):
        missing = [name for name in names if name not in result]
        if missing:
            raise BadInputError(f"The model gives no output named {missing[0]!r}.", allowed=sorted(result))
        return tuple(result[name] for name in names)
    return tuple(result[: len(names)])


def whole_forward(model: Model, settings: LoweringSettings, *, probabilities: bool) -> Callable[..., Any]:
    """The forward that is exported: named outputs as a tuple, pixels normalised, probabilities added.

    Args:
        probabilities: also return softmax of the first output, last: Core ML's classifier interface takes it.
    """
    original = model.module.forward
    names = tuple(spec.name for spec in model.outputs)
    picture = model.inputs[0].name
    centre, factor = pixel_constants(model) if settings.image_input else (None, None)

    def forward(**inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if centre is not None and factor is not None:
            inputs[picture] = (inputs[picture] - centre) * factor
        outputs = _select(original(**inputs), names)
        return (*outputs, torch.softmax(outputs[0], -1)) if probabilities else outputs

    # torch.export reads the signature: without one it takes the inputs for a single dict.
    keyword = inspect.Parameter.POSITIONAL_OR_KEYWORD
    signature = inspect.Signature([inspect.Parameter(spec.name, keyword) for spec in model.inputs])
    forward.__signature__ = signature  # type: ignore[attr-defined]
    return forward


def pixel_constants(model: Model) -> tuple[torch.Tensor, torch.Tensor]:
    """Centre and factor, float32 (1, 3, 1, 1): (pixel * scale - mean) / std = (pixel - centre) * factor.

    Core ML's own image preprocessing has one scale for all channels, and becomes two operators in the program
    too. The difference comes first: it is what float16 rounds least, and coremltools would turn a product and a
    sum into a batch norm with an epsilon. Made before the trace: coremltools would compute float64 in float16.
    """
    image = model.image
    if image is None:
        raise BadInputError("The model has no image preprocessing.", where=model.name)
    mean, std = (torch.tensor(values, dtype=torch.float64).reshape(1, 3, 1, 1) for values in (image.mean, image.std))
    return (mean / image.scale).to(torch.float32), (image.scale / std).to(torch.float32)


def export(model: Model, settings: LoweringSettings, *, probabilities: bool) -> torch.export.ExportedProgram:
    """The model as a program of ATen operators that coremltools has a conversion for.

    Raises:
        TargetRefusesError: the module can't be exported, a dimension that should vary can't, or an operator
            is unknown to coremltools and has no decomposition; the message names it and its layer.
        BadInputError: an output that the model promises does not exist.
    """
    example, shapes = trace_inputs(model, settings)
    if settings.image_input:
        example[model.inputs[0].name] = torch.full_like(example[model.inputs[0].name], 127.0)
    forward = whole_forward(model, settings, probabilities=probabilities)
    with contextlib.ExitStack() as stack:
        for context in (quiet(), forward_replaced(model.module, forward), plain_attention(), torch.no_grad()):
            stack.enter_context(context)
        if model.huggingface:
            stack.enter_context(plain_masks(positions_given="position_ids" in example))
        try:
            if model.huggingface:
                from transformers.exporters import DynamoConfig, DynamoExporter

                config = DynamoConfig(dynamic=shapes is not None, dynamic_shapes=shapes)
                # A plain forward: no key-value cache among the outputs.
                program, _ = DynamoExporter().export_program(model.module, {**example, "use_cache": False}, config)
            else:
                program = torch.export.export(model.module, (), example, dynamic_shapes=shapes, strict=False)
        except BadInputError:
            raise
        except Exception as error:
            raise _refusal(error, model, shapes is not None) from error
    program = decompose(program, model)
    _check_axes(program, model, settings)
    return program


def _refusal(error: Exception, model: Model, dynamic: bool) -> TargetRefusesError:
    line = next(iter(str(error).strip().splitlines()), "")[:300]
    return TargetRefusesError(
        "torch.export can't turn this model into a graph" + (" with shapes that vary." if dynamic else "."),
        where=f"{model.name} ({type(error).__name__}: {line})",
        next_step="Export with fixed shapes (`--shapes fixed`)." if dynamic else None,
    )


def _check_axes(program: torch.export.ExportedProgram, model: Model, settings: LoweringSettings) -> None:
    """Refuse when tracing turned a dimension that should vary into a constant."""
    values = {node.name: node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"}
    for spec in model.inputs:
        tensor = values.get(spec.name)
        for dimension, axis in enumerate(spec.shape):
            if not isinstance(axis, Axis) or not varies(axis, settings) or not isinstance(tensor, torch.Tensor):
                continue
            if is_concrete_int(tensor.shape[dimension]):  # an int, or a symbol that turned out to be one
                raise TargetRefusesError(
                    f"The model's code fixes the {axis.name!r} dimension of {spec.name!r} "
                    f"to {tensor.shape[dimension]}: it can't vary.",
                    where=model.name,
                    allowed="fixed shapes",
                    next_step="Export with fixed shapes (`--shapes fixed`).",
                )


def _group_norm(
    x: torch.Tensor,
    groups: int,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    epsilon: float = 1e-5,
    cudnn_enabled: bool = True,
) -> torch.Tensor:
    """Group norm as an instance norm over (N, groups, rest): x of shape (N, channels, ...), whose sizes may vary."""
    grouped = x.reshape(x.shape[0], groups, -1)
    normalised: torch.Tensor = aten.instance_norm.default(
        grouped, None, None, None, None, True, 0.0, epsilon, False
    ).reshape(x.shape)
    for parameter, combine in ((weight, torch.mul), (bias, torch.add)):
        if parameter is not None:
            normalised = combine(normalised, parameter.reshape(-1, *[1] * (x.ndim - 2)))
    return normalised


# coremltools knows these operators, but not with scalars, on booleans or without a dtype, as stock Hugging Face
# masks use them; its group norm takes no shapes that vary, and its reciprocal is 1 / (x + 0.0001).
TARGETED: dict[Any, Callable[..., Any]] = {
    aten.where.ScalarOther: lambda condition, a, b: torch.where(condition, a, torch.full_like(a, b)),
    aten.where.ScalarSelf: lambda condition, a, b: torch.where(condition, torch.full_like(b, a), b),
    aten.__and__.Tensor: lambda a, b: aten.bitwise_and.Tensor(a, b),
    aten.__or__.Tensor: lambda a, b: aten.bitwise_or.Tensor(a, b),
    aten.new_ones.default: lambda x, size, dtype=None, **_: torch.full(size, 1, dtype=dtype or x.dtype),
    aten.group_norm.default: _group_norm,
    aten.reciprocal.default: lambda x: aten.div.Tensor(torch.full_like(x, 1.0), x),
    aten.alias.default: lambda x: aten.clone.default(x),
}


def _unknown(program: torch.export.ExportedProgram) -> dict[Any, torch.fx.Node]:
    """Operators of the program that coremltools has no conversion for, each with its first node."""
    from coremltools.converters.mil.frontend.torch.torch_op_registry import _TORCH_OPS_REGISTRY

    unknown: dict[Any, torch.fx.Node] = {}
    for node in program.graph.nodes:
        if node.op == "call_function":
            name = node.target.name() if hasattr(node.target, "name") else node.target.__name__
            if _TORCH_OPS_REGISTRY.get_func(name) is None:
                unknown.setdefault(node.target, node)
    return unknown


def decompose(program: torch.export.ExportedProgram, model: Model) -> torch.export.ExportedProgram:
    """Take apart what coremltools does not know, again and again until nothing unknown is left.

    Raises:
        TargetRefusesError: an operator can't be taken apart; names it and its layer.
    """
    available: dict[Any, Callable[..., Any]] = dict(torch.export.default_decompositions())
    table = dict(TARGETED)
    with quiet():
        program = program.run_decompositions(table)
        while unknown := _unknown(program):
            for operator, node in unknown.items():
                if operator in table or operator not in available:
                    layers = [path for path, _ in node.meta.get("nn_module_stack", {}).values() if path]
                    raise TargetRefusesError(
                        f"Core ML's converter has no form for the operator {operator}.",
                        where=f"{model.name}, layer {layers[-1] if layers else '(top)'}",
                        next_step="Replace that operation in the model, or choose a target with another runtime.",
                    )
                table[operator] = available[operator]
            program = program.run_decompositions(table)
    return program
