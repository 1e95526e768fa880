"""Compression for no target in particular.

Without a target the recipe's first format of each layer kind is taken, on scales that every backend can store:
float16 for whole channels and palettes; for groups bfloat16 numbers within float16's normal range (2**-14 to
65504), which float16 holds as well (8 significant bits of its 11).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from edgeport.compress.apply import LayerRecord, set_weights
from edgeport.compress.assign import FACTORS, Assignment
from edgeport.errors import TargetRefusesError
from edgeport.model.types import Model
from edgeport.quantized import QuantizedTensor, dequantize, digest, quantize_with_scale
from edgeport.recipe import Recipe
from edgeport.target import Activations, Execution, ScaleStorage, Target, Weights, load_target, target_names

NAME = "portable"
LEAST_SCALE = 2.0**-14
"""float16's smallest normal number."""


def portable_target(recipe: Recipe) -> Target:
    """A target that takes whatever the recipe asks for. Nothing can be lowered for it."""
    step = recipe.quantize
    none: tuple[str, ...] = ("float",)
    formats = none if step is None else (*step.linear, *step.embedding, *step.conv, *step.depthwise_conv)
    corrections = () if recipe.correct is None else (FACTORS.name,)
    activations = ("float",) if step is None else step.activations
    return Target(
        name=NAME,
        title="any target: scales that every backend can store",
        os="any",
        arch="any",
        runtime="onnxruntime",
        precisions=("fp32", "fp16"),
        shapes=("dynamic", "fixed"),
        weights=Weights(
            linear=(*formats, *corrections), embedding=formats, conv=formats, depthwise_conv=formats, sparse=True
        ),
        activations=Activations(linear=activations, conv=activations, depthwise_conv=activations),
        scales=ScaleStorage(per_channel="float16", grouped="bfloat16"),
        execution=Execution(here="none", statement="Not lowered: the folder is exported for a target later."),
    )


def check_some_target_takes(assignments: Sequence[Assignment]) -> None:
    """Refuse a format that no target of this installation takes: nothing could be made of the folder.

    Raises:
        TargetRefusesError: naming the first such layer.
    """
    targets = [load_target(name) for name in target_names()]
    for item in assignments:
        taken = {kind: {name for target in targets for name in target.weight_formats(kind)} for kind in item.kinds}
        if not any(all(item.format.name in target.weight_formats(kind) for kind in item.kinds) for target in targets):
            raise TargetRefusesError(
                f"No target takes {' and '.join(item.kinds)} weights in {item.format.name}.",
                where=f"layer {item.name}",
                allowed=f"weights in {', '.join(sorted(set.intersection(*taken.values())))}",
                next_step="Choose other formats; docs/targets.md has those of every target. For a target file of your "
                "own, compress with --target.",
            )


def _raise_scales(tensor: QuantizedTensor) -> QuantizedTensor:
    """The same weight with no scale below `LEAST_SCALE`: groups of that little weight get new codes."""
    low = tensor.scale.abs() < LEAST_SCALE
    if tensor.palette is not None or not bool(low.any()):
        return tensor
    scale = torch.where(low, torch.full_like(tensor.scale, LEAST_SCALE), tensor.scale)
    return quantize_with_scale(
        dequantize(tensor),
        scale,
        bits=tensor.bits,
        group_size=tensor.group_size,
        axis=tensor.axis,
        scale_dtype=tensor.scale_dtype,
        zero_point=tensor.zero_point,
    )


def make_portable(model: Model, layers: tuple[LayerRecord, ...]) -> tuple[Model, tuple[LayerRecord, ...]]:
    """A compressed model whose scales float16 holds too, and its layer records.

    Where a scale was below 2**-14 the group's weights change by at most 2**-15; the change is added to the error
    that is on record, which is then an upper bound (the triangle inequality).
    """
    raised = {name: _raise_scales(tensor) for name, tensor in model.quantized.items()}
    changed = {name: tensor for name, tensor in raised.items() if tensor is not model.quantized[name]}
    if not changed:
        return model, layers
    records = []
    for layer in layers:
        if layer.name in changed:
            before, after = dequantize(model.quantized[layer.name]), dequantize(changed[layer.name])
            norm = float(before.norm())
            moved = float((after - before).norm()) / norm if norm > 0 else 0.0
            layer = replace(layer, relative_error=layer.relative_error + moved, sha256=digest(changed[layer.name]))
        records.append(layer)
    return replace(set_weights(model, raised, ()), activations=model.activations), tuple(records)
