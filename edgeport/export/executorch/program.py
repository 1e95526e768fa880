"""From a Model to torch.export's program, with the patches that transformers ships for ExecuTorch.

Hugging Face models go through transformers' `DynamoExporter`. Its `ExecutorchExporter` can't be used: it
partitions by itself, for XNNPACK only. Its registered patches and graph repairs are applied here around
the export and the lowering instead, to plain modules as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F

from edgeport.errors import TargetRefusesError, first_line
from edgeport.export.artifact import LoweringSettings
from edgeport.export.executorch.native import with_native_weights
from edgeport.export.executorch.quiet import muted, quiet
from edgeport.export.executorch.repairs import bounded_layout_search, complete_pooling, kept_bounds, written_gelu
from edgeport.export.executorch.roundings import simplify_roundings
from edgeport.model.inputs import select_outputs
from edgeport.model.types import Axis, Model


@contextmanager
def exporter_patches() -> Iterator[None]:
    """Apply transformers' and our own patches to torch, transformers and executorch inside the block."""
    with quiet(), muted():
        from transformers.exporters import exporter_dynamo, exporter_executorch, utils

    # The two modules register their patches when they are imported.
    assert exporter_dynamo.DynamoExporter
    assert exporter_executorch.ExecutorchExporter
    with ExitStack() as stack:
        for backend in ("executorch", "executorch.xnnpack"):
            stack.enter_context(utils.apply_patches(backend))
        stack.enter_context(kept_bounds())
        stack.enter_context(bounded_layout_search())
        patched = F.adaptive_avg_pool2d

        def pool(x: torch.Tensor, size: Any) -> torch.Tensor:
            # A mean, which XNNPACK has a kernel for; transformers' patch writes an average pool, which it has not.
            return x.mean((-2, -1), keepdim=True) if size in (1, (1, 1), [1, 1]) else patched(x, size)

        setattr(F, "adaptive_avg_pool2d", pool)  # noqa: B010  # mypy takes an assignment for a redefinition
        stack.callback(setattr, F, "adaptive_avg_pool2d", patched)
        yield


def trace_inputs(
    model: Model, settings: LoweringSettings
) -> tuple[dict[str, torch.Tensor], dict[str, dict[int, Any]] | None]:
    """The inputs to trace with, in the model's order, and torch.export's dynamic shapes (None when fixed).

    A size of 1 would be taken for a constant, so a dimension that varies is traced with 2 or more.
    """
    example = {spec.name: model.example[spec.name].contiguous() for spec in model.inputs}
    if settings.shapes == "fixed":
        return example, None
    shapes: dict[str, dict[int, Any]] = {}
    for spec in model.inputs:
        shapes[spec.name] = {}
        for dimension, size in enumerate(spec.shape):
            if isinstance(size, Axis) and size.varies:
                shapes[spec.name][dimension] = torch.export.Dim.AUTO(min=size.minimum, max=size.maximum)
                tensor = example[spec.name]
                if tensor.shape[dimension] == 1:
                    example[spec.name] = torch.cat([tensor, tensor], dimension)
    return example, shapes


def _select_outputs(module: torch.nn.Module, names: tuple[str, ...]) -> None:
    """Make the module return the named outputs only, so that nothing else reaches the file."""
    forward: Callable[..., Any] = module.forward

    def selected(**inputs: Any) -> tuple[torch.Tensor, ...]:
        return tuple(select_outputs(forward(**inputs), names).values())

    module.forward = selected


class _Prefixed(torch.nn.Module):
    """Puts the module below the name `model`: XNNPACK's passes can't name constants that begin with a digit."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.model = module

    def forward(self, **inputs: torch.Tensor) -> Any:
        """The module itself."""
        return self.model(**inputs)


def _export_huggingface(
    module: torch.nn.Module, example: dict[str, torch.Tensor], shapes: dict[str, dict[int, Any]] | None
) -> torch.export.ExportedProgram:
    from transformers.exporters.exporter_dynamo import DynamoConfig, DynamoExporter

    config = DynamoConfig(dynamic_shapes=shapes, prefer_deferred_runtime_asserts_over_guards=True)
    inputs = {**example, "use_cache": False, "return_dict": True}
    program: torch.export.ExportedProgram = DynamoExporter().export_program(module, inputs, config)[0]
    return program


def _export_plain(
    module: torch.nn.Module, example: dict[str, torch.Tensor], shapes: dict[str, dict[int, Any]] | None
) -> torch.export.ExportedProgram:
    from transformers.exporters.exporter_dynamo import patch_forward_signature

    prefixed = _Prefixed(module)
    with torch.no_grad(), patch_forward_signature(prefixed, example):
        return torch.export.export(prefixed, args=(), kwargs=example, dynamic_shapes=shapes)


def _check_dynamic(program: torch.export.ExportedProgram, model: Model) -> None:
    """Refuse a program that fixed a size which the model's inputs leave open.

    Raises:
        TargetRefusesError: naming the input and the axis.
    """
    from torch.fx.experimental.symbolic_shapes import is_concrete_int

    values = {node.name: node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"}
    for spec, name in zip(model.inputs, program.graph_signature.user_inputs, strict=True):
        for dimension, size in enumerate(spec.shape):
            # Either an int, or a symbol that turned out to be one.
            if isinstance(size, Axis) and size.varies and is_concrete_int(values[name].shape[dimension]):
                raise TargetRefusesError(
                    f"The model only works with one size of the axis {size.name!r}.",
                    where=f"input {spec.name}, dimension {dimension}",
                    next_step="Export with fixed shapes (`--shapes fixed`).",
                )


def export_program(model: Model, settings: LoweringSettings) -> torch.export.ExportedProgram:
    """Trace the model with its compressed weights in native form. Call inside `exporter_patches`.

    Raises:
        TargetRefusesError: torch.export can't trace the model, or fixed an axis that must vary.
    """
    module = with_native_weights(model)
    if model.huggingface:
        # Plain matrix products run a third faster on XNNPACK than torch's decomposed fused attention.
        cast(Any, module).set_attn_implementation("eager")
    _select_outputs(module, tuple(spec.name for spec in model.outputs))
    example, shapes = trace_inputs(model, settings)
    try:
        program = (_export_huggingface if model.huggingface else _export_plain)(module, example, shapes)
    except TargetRefusesError:
        raise
    except Exception as error:
        raise TargetRefusesError(
            f"torch.export can't trace the model: {first_line(error)}",
            where=f"model {model.name}",
            next_step="Try fixed shapes (`--shapes fixed`), or another runtime.",
        ) from error
    if shapes is not None:
        _check_dynamic(program, model)
    complete_pooling(program)
    written_gelu(program)
    simplify_roundings(program)
    return program
