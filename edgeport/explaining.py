"""Explain a bundle: where its bytes went, where the error grows, which inputs flipped, what decides."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgeport.bundle.read import Bundle
    from edgeport.explain.shipped import Shipped


def shipped_of(bundle: Bundle) -> Shipped:
    """What explaining a bundle needs of it."""
    from edgeport.compress.apply import LayerRecord
    from edgeport.compress.mixed import Option
    from edgeport.compress.restructure import PartRecord, StepRecord
    from edgeport.explain.shipped import Shipped

    manifest = bundle.manifest
    layers = tuple(
        LayerRecord(**{**dict(layer), "options": tuple(Option(**dict(option)) for option in layer.options)})
        for layer in manifest.layers
    )
    steps = tuple(
        StepRecord(**{**dict(step), "parts": tuple(PartRecord(**dict(part)) for part in step.parts)})
        for step in manifest.steps
    )
    return Shipped(
        artifact=bundle.artifact,
        task=manifest.task,
        recipe=manifest.recipe,
        parameters=manifest.parameters,
        layers=layers,
        steps=steps,
        samples=bundle.golden().inputs,
    )
