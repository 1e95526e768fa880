"""How much each layer matters: as compression recorded it when it chose formats, else measured, a layer at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from edgeport.explain.document import Alternative, LayerSensitivity, Sensitivity
from edgeport.explain.shipped import Shipped, module_of
from edgeport.explain.watch import Watch

if TYPE_CHECKING:
    import numpy as np

    from edgeport.compress.apply import LayerRecord
    from edgeport.model.types import Model
    from edgeport.quantized import QuantizedTensor

    Arrays = Mapping[str, np.ndarray]

RECORDED = (
    "Recorded while formats were chosen: what each format adds to the divergence from the original, by second order, "
    "on calibration inputs."
)
MEASURED = (
    "Measured now, on golden inputs in torch: the original with this one layer's weight as it is in the file, all "
    "others float. Effects of several layers together are not their sum."
)
ALONE = "The errors of the weights alone: {why}."
MOST_RUNS = 256
"""Of the original, beside those of the first sample: a model of many layers is measured on fewer samples."""


def read_sensitivity(shipped: Shipped, why: str) -> Sensitivity:
    """The table as it was recorded, without running anything; the layers that cost most first.

    Args:
        why: nothing was measured.
    """
    recorded = any(record.options for record in shipped.layers)
    rows = [_row(shipped, record) for record in shipped.layers]
    rows.sort(key=lambda row: (-(row.cost or 0.0), -row.weight_error, row.parameter))
    return Sensitivity(
        source="recorded" if recorded else "weights alone",
        statement=RECORDED if recorded else ALONE.format(why=why),
        samples=0,
        rows=tuple(rows),
    )


def measure_sensitivity(shipped: Shipped, model: Model, watch: Watch) -> Sensitivity:
    """The table with what each layer's compression does to the outputs, alone; what does most first.

    Where compression recorded costs for its choice of formats, they are taken instead: nothing is run.
    """
    from edgeport.explain.layers import incomparable
    from edgeport.explain.logical import weights_of
    from edgeport.explain.reference import run_original

    if any(record.options for record in shipped.layers):
        return read_sensitivity(shipped, "")
    if (problem := incomparable(shipped)) is not None:
        return read_sensitivity(shipped, problem[0].lower() + problem[1:].removesuffix("."))
    weights = weights_of(shipped)
    if not weights or not shipped.samples:
        return read_sensitivity(shipped, "no weight of the file is compressed")
    samples = shipped.samples[: max(1, MOST_RUNS // len(weights))]
    references = [run_original(model, sample, cached=shipped.artifact.context is not None) for sample in samples]
    rows = []
    for index, record in enumerate(shipped.layers):
        watch(index, len(shipped.layers), module_of(record.name))
        row = _row(shipped, record)
        if record.name in weights:
            effect, kl = _effect(shipped, model, {record.name: weights[record.name]}, samples, references)
            row = row.model_copy(update={"effect": effect, "kl": kl})
        rows.append(row)
    watch(len(shipped.layers), len(shipped.layers), "measured")
    rows.sort(key=lambda row: (-(row.effect or 0.0), -row.weight_error, row.parameter))
    return Sensitivity(source="measured", statement=MEASURED, samples=len(samples), rows=tuple(rows))


def _row(shipped: Shipped, record: LayerRecord) -> LayerSensitivity:
    count = math.prod(record.shape)
    options = list(record.options)
    place = next((index for index, option in enumerate(options) if option.chosen), None)
    cheaper = None if place is None or place == 0 else options[place - 1]
    dearer = None if place is None or place + 1 == len(options) else options[place + 1]
    return LayerSensitivity(
        layer=module_of(record.name),
        parameter=record.name,
        group=shipped.groups[record.name],
        format=record.format,
        bits=8 * record.bytes_after / count,
        bytes=record.bytes_after,
        bytes_saved=record.bytes_before - record.bytes_after,
        weight_error=record.relative_error,
        output_error=record.output_error,
        cost=None if place is None else options[place].cost,
        cheaper=None if cheaper is None else Alternative(format=cheaper.format, bytes=cheaper.bytes, cost=cheaper.cost),
        dearer=None if dearer is None else Alternative(format=dearer.format, bytes=dearer.bytes, cost=dearer.cost),
    )


def _effect(
    shipped: Shipped,
    model: Model,
    weights: Mapping[str, QuantizedTensor],
    samples: tuple[Arrays, ...],
    references: list[dict[str, np.ndarray]],
) -> tuple[float, float | None]:
    """Relative error of all outputs together, and KL divergence of class scores a row, nats."""
    import numpy as np
    from scipy.special import log_softmax  # type: ignore[import-untyped]

    from edgeport.explain.logical import with_weights
    from edgeport.explain.reference import run_original
    from edgeport.validate.outputs import class_scores, valid_positions

    difference = square = divergence = 0.0
    rows = 0
    with with_weights(model, weights):
        for sample, expected in zip(samples, references, strict=True):
            found = run_original(model, sample, cached=shipped.artifact.context is not None)
            for name, reference in expected.items():
                valid = valid_positions(name, reference.shape, sample)
                a, b = (value[name].astype(np.float64) for value in (found, expected))
                if valid is not None:
                    a, b = a[valid], b[valid]
                difference += float(((a - b) ** 2).sum())
                square += float((b**2).sum())
                only = len(expected) == 1
                before = class_scores(name, reference, valid, shipped.task, only_output=only)
                after = class_scores(name, found[name], valid, shipped.task, only_output=only)
                if before is not None and after is not None:
                    logs = [log_softmax(scores.astype(np.float64), axis=1) for scores in (before, after)]
                    divergence += float((np.exp(logs[0]) * (logs[0] - logs[1])).sum())
                    rows += len(before)
    return math.sqrt(difference / square) if square else 0.0, divergence / rows if rows else None
