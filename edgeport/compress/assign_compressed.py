"""What the weights of a model that was compressed before become on a target: the same, or the target refuses them."""

from __future__ import annotations

from collections.abc import Mapping

from edgeport.compress.assign import Assignment, activation_of, check_precision, compressible, scale_dtype_of
from edgeport.errors import BadInputError, TargetRefusesError
from edgeport.formats import ActivationFormat, LayerKind, WeightFormat
from edgeport.model.types import Model
from edgeport.quantized import QuantizedTensor, ScaleDtype, round_scale
from edgeport.recipe import Recipe
from edgeport.target import Target


def assign_compressed(
    model: Model, formats: Mapping[str, str], recipe: Recipe, target: Target
) -> tuple[Assignment, ...]:
    """What the weights of a model that was compressed before become on a target: the same codes and values.

    Activations are no part of the weights, so the recipe's first choice that this target offers is taken.

    Args:
        formats: the weight format of each tensor in `model.quantized`.

    Raises:
        TargetRefusesError: the target can't take a weight as it is.
        BadInputError: a compressed weight belongs to no layer that can be compressed.
    """
    check_precision(recipe, target)
    step = recipe.quantize
    parameters = dict(model.module.named_parameters(remove_duplicate=False))
    layers = compressible(model.module)
    stray = sorted(set(model.quantized) - set(layers))
    if stray:
        raise BadInputError("A compressed weight belongs to no layer that can be compressed.", where=stray[0])
    result = []
    for name, (kinds, names) in layers.items():
        weight_format = WeightFormat.parse(formats[name] if name in model.quantized else "float")
        _check_taken(weight_format, kinds, name, target)
        scale_dtype = scale_dtype_of(target, weight_format)
        activation: ActivationFormat = "float"
        if name in model.quantized and step is not None:
            _check_scales(model.quantized[name], scale_dtype, name, target)
            activation = activation_of(step, target, kinds, name, static=name in model.ranges)
        result.append(
            Assignment(
                name=name,
                kinds=kinds,
                shape=tuple(parameters[name].shape),
                format=weight_format,
                activation=activation,
                scale_dtype=scale_dtype,
                tied=names if len(names) > 1 else (),
                reason="compressed before the export",
            )
        )
    return tuple(result)


def _check_taken(weight_format: WeightFormat, kinds: tuple[LayerKind, ...], name: str, target: Target) -> None:
    for kind in kinds:
        if weight_format.name not in target.weight_formats(kind):
            raise TargetRefusesError(
                f"The target {target.name!r} takes no {kind} weights in {weight_format.name}, "
                "and the model is already compressed.",
                where=f"layer {name}",
                allowed=f"{kind} weights in {', '.join(target.weight_formats(kind))}",
                next_step=f"Compress the original for it (`edgeport compress --target {target.name}`), or choose "
                "another target (`edgeport targets`).",
            )


def _check_scales(tensor: QuantizedTensor, dtype: ScaleDtype, name: str, target: Target) -> None:
    for values in (tensor.scale, tensor.palette):
        if values is None:
            continue
        negative = int((values < 0).sum())
        if negative and values is tensor.scale and not target.scales.signed:
            raise TargetRefusesError(
                f"The target {target.name!r} takes no negative scales, which {negative} of this weight are.",
                where=f"layer {name}",
                next_step=f"Compress the original for it (`edgeport compress --target {target.name}`), or for no "
                "target in particular.",
            )
        lost = int((round_scale(values, dtype) != values).sum())
        if lost:
            raise TargetRefusesError(
                f"The target {target.name!r} stores scales as {dtype}, which can't hold {lost} of {values.numel()} "
                "of this weight, and the model is already compressed.",
                where=f"layer {name}",
                allowed=f"scales in {dtype}",
                next_step=f"Compress the original for it (`edgeport compress --target {target.name}`), or for no "
                "target in particular.",
            )
