"""Change the size that an axis is traced with, or fixed at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from edgeport.errors import BadInputError
from edgeport.model.types import Axis, Model, TensorSpec

if TYPE_CHECKING:
    import torch


def axes(specs: tuple[TensorSpec, ...]) -> dict[str, Axis]:
    """Every axis of some inputs, by name."""
    return {size.name: size for spec in specs for size in spec.shape if isinstance(size, Axis)}


def with_axis(model: Model, name: str, size: int) -> Model:
    """The model with one axis' example size changed, and its example inputs and outputs cut or tiled to it.

    Raises:
        BadInputError: the model has no such axis, or the size is outside its range.
    """
    known = axes(model.inputs)
    if name not in known:
        raise BadInputError(
            f"The model {model.name!r} has no {name} axis.", where=name, allowed=sorted(known) or "none"
        )
    axis = known[name]
    if not axis.minimum <= size <= axis.maximum:
        raise BadInputError(f"The {name} size {size} is out of range.", allowed=f"{axis.minimum} to {axis.maximum}")

    def resized(specs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
        return tuple(
            replace(
                spec,
                shape=tuple(
                    replace(s, example=size) if isinstance(s, Axis) and s.name == name else s for s in spec.shape
                ),
            )
            for spec in specs
        )

    inputs = resized(model.inputs)
    example: Mapping[str, torch.Tensor] = {
        spec.name: fit(model.example[spec.name], spec.fixed_shape()) for spec in inputs
    }
    return replace(model, inputs=inputs, outputs=resized(model.outputs), example=example)


def with_limit(model: Model, name: str, maximum: int) -> Model:
    """The model with an axis that grows no further than `maximum`; an axis with one size left is a constant."""

    def limit(size: int | Axis) -> int | Axis:
        if not isinstance(size, Axis) or size.name != name or size.maximum <= maximum:
            return size
        if size.minimum == maximum:
            return maximum
        return replace(size, maximum=maximum, example=min(size.example, maximum))

    def limited(specs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
        return tuple(replace(spec, shape=tuple(limit(size) for size in spec.shape)) for spec in specs)

    inputs = limited(model.inputs)
    example = {spec.name: fit(model.example[spec.name], spec.fixed_shape()) for spec in inputs}
    return replace(model, inputs=inputs, outputs=limited(model.outputs), example=example)


def fit(tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Repeat and cut a tensor to a shape of the same rank."""
    repeats = [-(-wanted // max(have, 1)) for wanted, have in zip(shape, tensor.shape, strict=True)]
    return tensor.repeat(*repeats)[tuple(slice(0, size) for size in shape)].contiguous()
