"""What an export will do, predicted before anything long starts: `edgeport export --dry-run`.

Sizes follow from shapes and formats. Memory is an estimate: the resident size of the libraries plus a
multiple of the float32 weights, chosen not to fall below what was seen: MiniLM 1.3 GB with ExecuTorch (its peak),
SmolLM2 4.6 GB with ONNX Runtime while measuring and 2.9 GB with ExecuTorch while lowering. Core ML's is a guess.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from edgeport.compress.assign import Assignment
from edgeport.recipe import Recipe
from edgeport.schema import Strict
from edgeport.target import RuntimeName, Target

if TYPE_CHECKING:
    from edgeport.model.types import Model

LIBRARIES_BYTES: dict[RuntimeName, int] = {
    "onnxruntime": 650_000_000,
    "executorch": 900_000_000,
    "coreml": 700_000_000,
}
"""Resident size after importing torch, transformers and the exporter."""

WEIGHT_COPIES: dict[RuntimeName, float] = {"onnxruntime": 7.5, "executorch": 7.5, "coreml": 7.5}
"""Copies of the float32 weights that are alive at the peak of a run."""

GRAPH_BYTES: dict[RuntimeName, int] = {"onnxruntime": 60_000, "executorch": 130_000, "coreml": 200_000}
"""Size of the graph around the weights."""


class PlannedStage(Strict):
    """One stage of the run, and whether the cache has its output already."""

    name: str
    detail: str
    cached: bool


class PlannedLayer(Strict):
    """What one weight becomes."""

    name: str
    kinds: tuple[str, ...]
    shape: tuple[int, ...]
    format: str
    activation: str
    bytes_before: int
    bytes_after: int
    reason: str


class Plan(Strict):
    """The whole plan.

    Attributes:
        predicted_bytes: of the model file(s).
        predicted_peak_memory_bytes: resident size of the edgeport process at its peak, an estimate.
        predicted_disk_bytes: written to the cache and to the output folder together.
        checks: what the gate will look at, in words.
    """

    model: str
    task: str
    parameters: int
    fp32_bytes: int
    target: str
    runtime: str
    recipe: str
    precision: Literal["fp32", "fp16"]
    shapes: str
    inputs: dict[str, tuple[int | str, ...]]
    stages: tuple[PlannedStage, ...]
    layers: tuple[PlannedLayer, ...]
    predicted_bytes: int
    predicted_peak_memory_bytes: int
    available_memory_bytes: int
    predicted_disk_bytes: int
    available_disk_bytes: int
    checks: tuple[str, ...]
    warnings: tuple[str, ...]


def packed_bytes(assignment: Assignment) -> int:
    """Bytes of one weight in its format: packed codes and scales."""
    count = 1
    for size in assignment.shape:
        count *= size
    if not assignment.format.quantized:
        return count * 4
    columns = count // assignment.shape[0]
    groups = columns // (assignment.format.group_size or columns)
    scale_width = 4 if assignment.scale_dtype == "float32" else 2
    return (count * assignment.format.bits + 7) // 8 + assignment.shape[0] * groups * scale_width


def predict_size(
    model: Model,
    assignments: tuple[Assignment, ...],
    precision: str,
    runtime: RuntimeName,
    budgets: Mapping[str, int] | None = None,
) -> int:
    """Bytes of the model file: packed weights, the remaining floats at `precision`, and the graph.

    `budgets` (mixed precision): bytes of the weights whose formats are still to be chosen, by name.
    """
    width = 2 if precision == "fp16" else 4
    quantized = {a.name: a for a in assignments if a.format.quantized}
    given = budgets or {}
    total = sum(given[name] if name in given else packed_bytes(a) for name, a in quantized.items())
    for name, parameter in model.module.named_parameters():
        if name not in quantized:
            total += parameter.numel() * width
    return total + GRAPH_BYTES[runtime]


def reference_bytes(model: Model, samples: int) -> int:
    """Bytes of the float outputs kept for comparison."""
    total = 0
    for spec in model.outputs:
        count = samples * 4
        for size in spec.fixed_shape():
            count *= size
        total += count
    return total


def planned_layers(assignments: tuple[Assignment, ...]) -> tuple[PlannedLayer, ...]:
    """The assignments as plan rows."""
    rows = []
    for item in assignments:
        count = 1
        for size in item.shape:
            count *= size
        rows.append(
            PlannedLayer(
                name=item.name,
                kinds=item.kinds,
                shape=item.shape,
                format=item.format.name,
                activation=item.activation,
                bytes_before=count * 4 if item.corrects is None else 0,
                bytes_after=packed_bytes(item),
                reason=item.reason,
            )
        )
    return tuple(rows)


def planned_checks(recipe: Recipe, target: Target, quantized: bool) -> tuple[str, ...]:
    """What the gate will look at."""
    checks = ["every output value is finite"]
    if quantized:
        checks.append("the integer weights in the file equal the logical ones, bit for bit")
    for name, value in recipe.gate.bounds().items():
        bound, metric = ("at least", name.removesuffix("_min")) if name.endswith("_min") else ("at most", name[:-4])
        checks.append(f"{metric.replace('_', ' ')} {bound} {value}")
    if target.execution.here == "reference":
        checks.append("latency and memory are not measured: " + target.execution.statement)
    return tuple(checks)
