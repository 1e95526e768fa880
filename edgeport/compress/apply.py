"""Apply a recipe: the compressed Model, and a record of what happened to every layer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from edgeport.compress.assign import Assignment, assign
from edgeport.compress.quantize.grid import Grid
from edgeport.compress.quantize.rtn import quantize_rtn
from edgeport.errors import BadInputError
from edgeport.model.types import Model
from edgeport.quantized import QuantizedTensor, dequantize, digest
from edgeport.recipe import Recipe
from edgeport.target import Target


@dataclass(frozen=True)
class LayerRecord:
    """What compression did to one weight.

    Attributes:
        bytes_before, bytes_after: in float32, and in the chosen format with its scales.
        relative_error: ||after - before|| / ||before||, of the weight itself.
        tied: every name of the weight when it has several.
        sha256: of the logical codes and scales (`quantized.digest`), None for a weight left in float.
    """

    name: str
    kinds: tuple[str, ...]
    shape: tuple[int, ...]
    format: str
    activation: str
    bytes_before: int
    bytes_after: int
    relative_error: float
    tied: tuple[str, ...]
    reason: str
    sha256: str | None


def check_finite(module: torch.nn.Module) -> None:
    """Refuse a checkpoint with NaN or infinite weights.

    Raises:
        BadInputError: naming the first such tensor and how many of its values are not finite.
    """
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            count = int((~torch.isfinite(tensor)).sum())
            # -inf buffers are causal masks in some models: only parameters and running statistics count.
            if name in dict(module.named_parameters(remove_duplicate=False)) or "running_" in name:
                raise BadInputError(
                    f"The weight has {count} of {tensor.numel()} values that are NaN or infinite.",
                    where=name,
                    next_step="Check the checkpoint: training may have diverged, or the file is damaged.",
                )


def set_weights(model: Model, quantized: dict[str, QuantizedTensor], assignments: tuple[Assignment, ...]) -> Model:
    """A model whose compressed weights hold their dequantised values. The given model is not changed."""
    if not quantized:
        return model
    module = copy.deepcopy(model.module)
    parameters = dict(module.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, tensor in quantized.items():
            parameters[name].copy_(dequantize(tensor))
    activations = {item.name: item.activation for item in assignments if item.name in quantized}
    return replace(model, module=module, quantized=quantized, activations=activations)


def record_layers(
    model: Model, assignments: tuple[Assignment, ...], quantized: dict[str, QuantizedTensor]
) -> tuple[LayerRecord, ...]:
    """What happened to each compressible weight. `model` is the uncompressed one."""
    parameters = dict(model.module.named_parameters(remove_duplicate=False))
    records = []
    for item in assignments:
        weight = parameters[item.name].detach().to(torch.float32)
        tensor = quantized.get(item.name)
        error = 0.0
        if tensor is not None:
            norm = float(weight.norm())
            error = float((dequantize(tensor) - weight).norm()) / norm if norm > 0 else 0.0
        records.append(
            LayerRecord(
                name=item.name,
                kinds=item.kinds,
                shape=item.shape,
                format=item.format.name,
                activation=item.activation,
                bytes_before=weight.numel() * 4,
                bytes_after=weight.numel() * 4 if tensor is None else tensor.storage_bytes(),
                relative_error=error,
                tied=item.tied,
                reason=item.reason,
                sha256=None if tensor is None else digest(tensor),
            )
        )
    return tuple(records)


def apply_recipe(
    model: Model, recipe: Recipe, target: Target, *, progress: Callable[[int, int], None] | None = None
) -> tuple[Model, tuple[LayerRecord, ...]]:
    """Compress a model as the recipe says, on the grids that the target has.

    Args:
        progress: called with (weights done, weights in all).

    Raises:
        TargetRefusesError: the target can't take the recipe.
        BadInputError: a weight is not finite.
    """
    assignments = assign(model, recipe, target)
    check_finite(model.module)
    parameters = dict(model.module.named_parameters(remove_duplicate=False))
    step = recipe.compress[-1] if recipe.compress else None
    quantized: dict[str, QuantizedTensor] = {}
    for index, item in enumerate(assignments):
        if item.format.quantized and step is not None:
            grid = Grid(item.format.bits, item.format.group_size, item.format.scheme == "int", item.scale_dtype)
            quantized[item.name] = quantize_rtn(parameters[item.name], grid, scale_search=step.scale_search)
        if progress is not None:
            progress(index + 1, len(assignments))
    return set_weights(model, quantized, assignments), record_layers(model, assignments, quantized)
