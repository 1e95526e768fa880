"""Decide, before anything long starts, what each weight becomes; refuse what the target can't take.

This is the only place where a recipe meets a target. It reads shapes, never values.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from edgeport.compress.quantize.grid import Grid
from edgeport.errors import BadInputError, TargetRefusesError
from edgeport.formats import ActivationFormat, LayerKind, WeightFormat
from edgeport.model.corrected import factor_names
from edgeport.model.types import Model
from edgeport.quantized import ScaleDtype
from edgeport.recipe import Qera, Quantize, Recipe
from edgeport.restructuring import Sparsify
from edgeport.target import Target, load_target, target_names

OTHERS: tuple[ActivationFormat, ...] = ("dynamic_int8", "float")
"""What layers take that are kept from static activations, when the recipe names nothing else, best first."""

FACTORS = WeightFormat.parse("int8")
"""What the matrices of a low-rank correction are stored in."""


FEW_ROWS = 8
"""Tables of at most so many rows (BERT's token types) stay in float: most positions read the same row, so that its
error is the same everywhere and adds up, and there are next to no bytes to save."""


@dataclass(frozen=True)
class Assignment:
    """What one weight becomes.

    Attributes:
        name: parameter name, as in `module.named_parameters()`; the first of its names when tied.
        kinds: the layer kinds that use it; two when an embedding and a head are tied.
        shape: of the parameter.
        format: the weight format chosen.
        activation: activation format of the layer that multiplies by it.
        scale_dtype: the float type in which the backend stores its scales.
        signed_scales: the backend takes negative ones.
        tied: every name of this parameter, when there are several.
        reason: why this format, in a few words.
        corrects: for a matrix that compression adds, the weight whose error it makes up for.
    """

    name: str
    kinds: tuple[LayerKind, ...]
    shape: tuple[int, ...]
    format: WeightFormat
    activation: ActivationFormat
    scale_dtype: ScaleDtype
    tied: tuple[str, ...]
    reason: str
    signed_scales: bool = False
    corrects: str | None = None

    @property
    def grid(self) -> Grid:
        """The integer grid of the format on this target. Not for palettes."""
        return Grid(
            self.format.bits, self.format.group_size, self.format.scheme == "int", self.scale_dtype, self.signed_scales
        )


def layer_kind(module: torch.nn.Module) -> LayerKind | None:
    """The kind of a module whose weight can be compressed, or None."""
    if isinstance(module, torch.nn.Linear):
        return "linear"
    if isinstance(module, torch.nn.Embedding):
        return "embedding"
    if isinstance(module, torch.nn.Conv1d | torch.nn.Conv2d):
        # One input channel a filter: what backends call depthwise, also where there is only one channel at all.
        return "depthwise_conv" if module.in_channels == module.groups else "conv"
    return None


def compressible(module: torch.nn.Module) -> dict[str, tuple[tuple[LayerKind, ...], tuple[str, ...]]]:
    """Every compressible weight: first name -> (layer kinds, all names). Tied weights appear once."""
    first: dict[int, str] = {}
    found: dict[str, tuple[list[LayerKind], list[str]]] = {}
    for prefix, layer in module.named_modules(remove_duplicate=False):
        kind = layer_kind(layer)
        if kind is None or not isinstance(getattr(layer, "weight", None), torch.nn.Parameter):
            continue
        name = f"{prefix}.weight" if prefix else "weight"
        key = first.setdefault(id(layer.weight), name)
        kinds, names = found.setdefault(key, ([], []))
        if kind not in kinds:
            kinds.append(kind)
        names.append(name)
    return {name: (tuple(kinds), tuple(names)) for name, (kinds, names) in found.items()}


def candidates(
    step: Quantize, target: Target, kinds: tuple[LayerKind, ...], name: str, shape: tuple[int, int]
) -> tuple[str, ...]:
    """The formats that the recipe asks for and the target takes, for every kind that uses the weight, best first.

    Raises:
        TargetRefusesError: there is none.
    """
    wanted = step.formats(kinds[0])
    taken = [f for f in wanted if all(f in target.weight_formats(kind) for kind in kinds)]
    if not taken:
        offered = [f for f in target.weight_formats(kinds[0]) if all(f in target.weight_formats(k) for k in kinds)]
        raise TargetRefusesError(
            f"The target {target.name!r} takes no {kinds[0]} weights in {' or '.join(wanted)}.",
            where=f"layer {name}",
            allowed=f"{kinds[0]} weights in {', '.join(offered)}",
            next_step="Choose another recipe (`edgeport recipes`) or target (`edgeport targets`).",
        )
    fitting = [f for f in taken if WeightFormat.parse(f).fits(*shape)]
    return tuple(f for f in fitting if _runs(step, target, kinds, f)) or tuple(fitting) or ("float",)


def _runs(step: Quantize, target: Target, kinds: tuple[LayerKind, ...], weight_format: str) -> bool:
    """The target has kernels for a format beside activations that the recipe allows."""
    multiplying = [kind for kind in kinds if kind != "embedding"]
    if weight_format == "float" or not multiplying:
        return True
    offered = target.activation_formats(multiplying[0])
    if weight_format in target.weights.integer_only:
        # One choice of activations serves all formats of a layer, so float as the first choice leaves these out.
        return next((wanted for wanted in step.activations if wanted in offered), None) == "dynamic_int8"
    wanted = set(step.activations) | (set(OTHERS) if "static_int8" in step.activations else set())
    if weight_format != "int8":
        wanted.discard("static_int8")
    return bool(wanted & set(offered))


def reassigned(item: Assignment, name: str, target: Target) -> Assignment:
    """The same weight in another format."""
    chosen = WeightFormat.parse(name)
    return replace(
        item,
        format=chosen,
        activation=item.activation if chosen.quantized else "float",
        scale_dtype=scale_dtype_of(target, chosen),
        signed_scales=target.scales.signed and chosen.group_size is not None,
    )


def activation_of(
    step: Quantize,
    target: Target,
    kinds: tuple[LayerKind, ...],
    name: str,
    *,
    static: bool,
) -> ActivationFormat:
    """The first format of the recipe that the target offers. `static`: the layer can have static activations."""
    multiplying = [kind for kind in kinds if kind != "embedding"]
    if not multiplying:
        return "float"
    kind = multiplying[0]
    offered = target.activation_formats(kind)
    for wanted in step.activations:
        if wanted in offered and (static or wanted != "static_int8"):
            return wanted
    if "static_int8" in step.activations:
        for other in OTHERS:
            if other in offered:
                return other
    raise TargetRefusesError(
        f"The target {target.name!r} can't run quantized {kind} layers "
        f"with {' or '.join(step.activations)} activations.",
        where=f"layer {name}",
        allowed=f"activations in {', '.join(offered) or 'none: leave this layer kind float'}",
        next_step="Change `activations` in the recipe, or choose another target.",
    )


def fallback_activation(item: Assignment, step: Quantize, target: Target, reason: str) -> Assignment:
    """A layer that is kept from static activations: the next format of the recipe, or a float weight.

    Args:
        reason: why it is kept from them.
    """
    offered = target.activation_formats(item.kinds[0])
    for wanted in (*step.activations, *OTHERS):
        if wanted != "static_int8" and wanted in offered:
            return replace(item, activation=wanted, reason=reason)
    return replace(reassigned(item, "float", target), reason=f"{reason}, and the target has nothing else for its kind")


def scale_dtype_of(target: Target, weight_format: WeightFormat) -> ScaleDtype:
    """The float type of a format's scales. Palettes are stored like the scales of whole channels."""
    grouped = weight_format.group_size is not None and weight_format.scheme != "lut"
    return target.scales.grouped if grouped else target.scales.per_channel


def check_precision(recipe: Recipe, target: Target) -> None:
    """Refuse a precision the target does not offer.

    Raises:
        TargetRefusesError: the recipe asks for it by name and the target lacks it.
    """
    asked = recipe.lower.precision
    if asked != "target" and asked not in target.precisions:
        raise TargetRefusesError(
            f"The target {target.name!r} does not take the {asked} precision of the recipe {recipe.name!r}.",
            where="[lower] precision",
            allowed=target.precisions,
            next_step="Choose another recipe (`edgeport recipes`) or target (`edgeport targets`).",
        )


def check_sparse(recipe: Recipe, target: Target) -> None:
    """Refuse zeros where they would save nothing.

    Raises:
        TargetRefusesError: the target stores zeros like any other number.
    """
    step = next((step for step in recipe.restructure if isinstance(step, Sparsify)), None)
    if step is not None and not target.weights.sparse:
        raise TargetRefusesError(
            f"The target {target.name!r} has no sparse form of weights: the zeros of {step.method} would save neither "
            "bytes nor time there.",
            where=step.method,
            allowed=[name for name in target_names() if load_target(name).weights.sparse],
            next_step="Choose such a target, or prune_width, prune_depth or lowrank, which make every file smaller.",
        )


def check_exclude(recipe: Recipe, layers: Mapping[str, tuple[tuple[LayerKind, ...], tuple[str, ...]]]) -> None:
    """Refuse a pattern that leaves nothing alone: a slip in it would show only in the result's numbers.

    Raises:
        BadInputError: naming the pattern.
    """
    names = [name for _, aliases in layers.values() for name in aliases]
    for pattern in recipe.quantize.exclude if recipe.quantize is not None else ():
        if not fnmatch.filter(names, pattern):
            close = difflib.get_close_matches(pattern, names, n=3, cutoff=0.4) or names[:3]
            raise BadInputError(
                f"The pattern {pattern!r} matches no weight that can be compressed.",
                where=f"exclude of the recipe {recipe.name!r}",
                allowed=f"patterns of weight names such as {', '.join(close)}",
                next_step="Correct the pattern, or leave it out.",
            )


def assign(model: Model, recipe: Recipe, target: Target) -> tuple[Assignment, ...]:
    """What every compressible weight of the model becomes, in the module's order.

    A group size that does not divide a layer's input keeps that layer in float, with the reason recorded.

    Raises:
        TargetRefusesError: the target can't take what the recipe asks for.
        BadInputError: a pattern of `exclude` matches nothing, or a correction is larger than the weight it corrects.
    """
    check_precision(recipe, target)
    step = recipe.quantize
    parameters = dict(model.module.named_parameters(remove_duplicate=False))
    result = []
    layers = compressible(model.module)
    check_exclude(recipe, layers)
    for name, (kinds, names) in layers.items():
        shape = tuple(parameters[name].shape)
        columns = parameters[name].numel() // shape[0]
        activation: ActivationFormat = "float"
        format_name, reason = "float", "the recipe compresses nothing"
        if step is not None:
            if any(fnmatch.fnmatchcase(n, pattern) for n in names for pattern in step.exclude):
                reason = "excluded by the recipe"
            elif kinds == ("embedding",) and shape[0] <= FEW_ROWS:
                reason = f"a table of {shape[0]} rows: next to no bytes, and nearly every position reads its error"
            else:
                format_name = candidates(step, target, kinds, name, (shape[0], columns))[0]
                reason = "first format of the recipe that the target takes"
                if format_name == "float" and not WeightFormat.parse(step.formats(kinds[0])[0]).fits(shape[0], columns):
                    reason = f"{shape[0]} channels of {columns} weights can't be cut into the groups asked for"
                elif format_name == "float":
                    reason = f"the target takes no integer {kinds[0]} weights"
        weight_format = WeightFormat.parse(format_name)
        if weight_format.quantized and step is not None:
            # Ranges belong to one layer, and static kernels multiply weights with one scale a channel.
            static = len(names) == 1 and weight_format.name == "int8"
            activation = activation_of(step, target, kinds, name, static=static)
            if kinds != ("embedding",):
                _check_speed(weight_format, activation, target, name)
        result.append(
            Assignment(
                name=name,
                kinds=kinds,
                shape=shape,
                format=weight_format,
                activation=activation,
                scale_dtype=scale_dtype_of(target, weight_format),
                tied=names if len(names) > 1 else (),
                reason=reason,
                signed_scales=target.scales.signed and weight_format.group_size is not None,
            )
        )
    if recipe.correct is not None:
        result += [factor for item in result for factor in _correction(item, recipe.correct, target)]
    return tuple(result)


def _check_speed(weight_format: WeightFormat, activation: ActivationFormat, target: Target, name: str) -> None:
    """Refuse products that would be slower than float32.

    Raises:
        TargetRefusesError: the format needs integer activations.
    """
    if weight_format.name in target.weights.integer_only and activation == "float":
        raise TargetRefusesError(
            f"The target {target.name!r} multiplies {weight_format.name} weights by float activations far slower than "
            "float32.",
            where=f"layer {name}",
            allowed="this format with dynamic_int8 activations; 4 and 8 bits with any",
            next_step='Put "dynamic_int8" first in the recipe\'s `activations`, or choose more bits.',
        )


def _correction(item: Assignment, step: Qera, target: Target) -> tuple[Assignment, ...]:
    """The two matrices that correct a quantized Linear layer's weight; none for one that several layers share.

    Raises:
        TargetRefusesError: the target takes no 8-bit Linear weights.
        BadInputError: the rank is larger than the weight's, or the layer's activations are static.
    """
    if item.kinds != ("linear",) or item.tied or not item.format.quantized:
        return ()
    rows, columns = item.shape
    if step.rank > min(rows, columns):
        raise BadInputError(
            f"A correction of rank {step.rank} is larger than the weight, {rows} x {columns}.",
            where=f"layer {item.name}",
            allowed=f"1 to {min(rows, columns)}; what pays is below a tenth of it",
            next_step="Lower `rank` of qera in the recipe, or name the layer in `exclude`.",
        )
    if item.activation == "static_int8":
        raise BadInputError(
            "A layer with static_int8 activations can't be corrected: its branch has no calibrated range.",
            where=f"layer {item.name}",
            allowed="dynamic_int8 or float activations",
            next_step="Leave qera or static_int8 out of the recipe.",
        )
    if FACTORS.name not in target.weight_formats("linear"):
        raise TargetRefusesError(
            f"The target {target.name!r} takes no {FACTORS.name} Linear weights, which corrections are stored in.",
            where=f"layer {item.name}",
            allowed=f"linear weights in {', '.join(target.weight_formats('linear'))}",
            next_step="Leave qera out of the recipe, or choose another target.",
        )
    factor = replace(
        item,
        format=FACTORS,
        scale_dtype=scale_dtype_of(target, FACTORS),
        signed_scales=False,
        tied=(),
        reason=f"corrects {item.name}",
        corrects=item.name,
    )
    down, up = factor_names(item.name)
    return (
        replace(factor, name=down, shape=(step.rank, columns)),
        replace(factor, name=up, shape=(rows, step.rank)),
    )
