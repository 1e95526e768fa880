"""Run the steps of a recipe that make a model smaller before its weights are quantized, and record what each did.

The shapes that come out follow from the recipe and the model's shapes alone: `outline` makes a model of those shapes
at once, which plans and formats are decided on. `restructure` chooses from data what stays. Its cuts, applied to the
original, make the module again; only values that a step changed have to be stored beside them. Training that heals what
a cut broke (edgeport.compress.distill) changes values alone, so it may stand behind any cut.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from edgeport.compress.chain import call
from edgeport.compress.distill import distance
from edgeport.compress.distill.checks import check_step
from edgeport.compress.distill.lessons import Lessons, teach
from edgeport.compress.distill.run import TrainingRecord
from edgeport.compress.flops import count_flops
from edgeport.compress.lowrank.svd import choose_ranks, factorize_layers, outline_factors
from edgeport.compress.prune.cut import Cut, cut_depth, cut_width
from edgeport.compress.prune.depth import choose_layers, layers_left
from edgeport.compress.prune.families import sizes_of
from edgeport.compress.prune.narrow import OUT, choose_channels, cut_channels
from edgeport.compress.prune.repair import repair_channels
from edgeport.compress.prune.sparse import sparse_bytes, sparse_layers, sparsify_layers
from edgeport.compress.prune.width import choose_parts, first_parts
from edgeport.distilling import Distill
from edgeport.errors import BadInputError
from edgeport.model.inputs import select_outputs, vocabulary_size
from edgeport.model.types import Model
from edgeport.recipe import Recipe
from edgeport.restructuring import (
    LowRank,
    PruneChannels,
    PruneDepth,
    PruneVocabulary,
    PruneWidth,
    Restructure,
    Sparsify,
    needs_data,
)

Inputs = Sequence[Mapping[str, torch.Tensor]]
COMPARED = 16
"""Calibration inputs on which a step's divergence is measured."""


@dataclass(frozen=True)
class PartRecord:
    """What a step did to one part of the model.

    Attributes:
        name: of a layer, or of the block or group of layers that the step sees as one, in the model before the step.
        before, after: how much of it there was and is, in words ("192 channels").
        loss: what the step saw go: block influence (depth), share of the summed score (width), relative error of the
            layer's output (lowrank, sparse) or of the weight (magnitude), relative change of the weight (distill); None
            where it measures nothing.
    """

    name: str
    before: str
    after: str
    loss: float | None


@dataclass(frozen=True)
class StepRecord:
    """What one step did to the model.

    Attributes:
        parameters_before, parameters_after: values, tied ones once; zeros count.
        bytes_before, bytes_after: of them in float32; zeros of sparse weights cost a bit each.
        flops_before, flops_after: of the layers with weights, on the model's example (edgeport.compress.flops).
        divergence: distance of the outputs from the original's over calibration inputs, all steps so far together:
            nats a position for logits, else relative squared error (edgeport.compress.distill.distance); None where
            the recipe uses no data.
        training: of distillation.
    """

    method: str
    parameters_before: int
    parameters_after: int
    bytes_before: int
    bytes_after: int
    flops_before: int
    flops_after: int
    divergence: float | None
    parts: tuple[PartRecord, ...]
    training: TrainingRecord | None = None


@dataclass(frozen=True)
class Restructured:
    """The smaller model, the cuts that make its module of the original's, and a record for each step."""

    model: Model
    cuts: tuple[Cut, ...]
    steps: tuple[StepRecord, ...]


def apply_cut(model: Model, cut: Cut) -> Model:
    """The module that a cut makes; factors are zeros and sparse weights whole: their values are stored beside it.

    Raises:
        BadInputError: the cut does not fit the model.
    """
    if cut.method == "prune_depth":
        return cut_depth(model, cut.kept["layers"])
    if cut.method == "prune_width":
        return cut_width(model, cut.kept)
    if cut.method == "prune_channels":
        return cut_channels(model, cut.kept)
    counts = {name: count for name, (count,) in cut.kept.items()}
    if cut.method == "lowrank":
        return outline_factors(model, counts)
    return replace(model, sparse={f"{name}.weight": count for name, count in counts.items()})


def apply_cuts(model: Model, cuts: Sequence[Cut]) -> Model:
    """`apply_cut` for one after the other."""
    for cut in cuts:
        model = apply_cut(model, cut)
    return model


def _first_cut(model: Model, step: Restructure) -> Cut | None:
    """The cut of a step as if the first parts stayed: its shapes. None where the step makes no cut."""
    if isinstance(step, PruneDepth):
        return Cut(step.method, {"layers": tuple(range(layers_left(model, step)))})
    if isinstance(step, PruneWidth):
        return Cut(step.method, first_parts(model, step))
    if isinstance(step, PruneChannels):
        return Cut(step.method, choose_channels(model, step, ())[0])
    if isinstance(step, LowRank):
        return Cut(step.method, {name: (rank,) for name, rank in choose_ranks(model, step).items()})
    if isinstance(step, Sparsify):
        return Cut(step.method, {name: (count,) for name, count in sparse_layers(model, step).items()})
    return None


def outline(model: Model, recipe: Recipe) -> Model:
    """A model of the shapes that the recipe's steps lead to, with the values of whatever came first. No data is needed.

    Raises:
        BadInputError: a step can't be done to this model.
    """
    for step in recipe.restructure:
        if isinstance(step, Distill):
            check_step(model, step)
        cut = _first_cut(model, step)
        model = model if cut is None else apply_cut(model, cut)
    return model


def _run(model: Model, step: Restructure, inputs: Inputs) -> tuple[Model, Cut, tuple[PartRecord, ...]]:
    """One step, chosen from data."""
    if isinstance(step, PruneDepth):
        sizes = sizes_of(model.module)
        left = layers_left(model, step)
        layers, influence = choose_layers(model, left, inputs, iterative=step.iterative)
        parts = tuple(
            PartRecord(sizes.block(index), "1 layer", "1 layer" if index in layers else "removed", influence[index])
            for index in range(sizes.layers)
        )
        cut = Cut(step.method, {"layers": layers})
        return apply_cut(model, cut), cut, parts
    if isinstance(step, PruneWidth):
        kept, lost = choose_parts(model, step, inputs)
        sizes = sizes_of(model.module)
        whole = {"ffn": sizes.ffn, "heads": sizes.heads, "hidden": sizes.hidden}
        parts = tuple(
            PartRecord(name, str(whole[name.partition(".")[0]]), str(len(kept[name])), loss)
            for name, loss in lost.items()
        )
        cut = Cut(step.method, kept)
        return apply_cut(model, cut), cut, parts
    if isinstance(step, PruneChannels):
        kept, lost = choose_channels(model, step, inputs)
        rows = {name: len(model.module.get_submodule(name).get_parameter("weight")) for name in lost}
        parts = tuple(
            PartRecord(name, f"{rows[name]} channels", f"{len(kept[f'{OUT}{name}'])} channels", loss)
            for name, loss in lost.items()
        )
        cut = Cut(step.method, kept)
        made = apply_cut(model, cut)
        return repair_channels(made, model, kept, inputs) if step.repair else made, cut, parts
    return _run_values(model, step, inputs)


def _run_values(model: Model, step: Restructure, inputs: Inputs) -> tuple[Model, Cut, tuple[PartRecord, ...]]:
    """A step that changes values too."""
    first = _first_cut(model, step)
    assert first is not None
    rows = {name: model.module.get_submodule(name).get_parameter("weight") for name in first.kept}
    if isinstance(step, LowRank):
        made, errors = factorize_layers(model, step, inputs)
        full = {name: f"rank {min(weight.shape)}" for name, weight in rows.items()}
        left = {name: f"rank {rank}" for name, (rank,) in first.kept.items()}
    else:
        assert isinstance(step, Sparsify)
        made, errors = sparsify_layers(model, step, inputs)
        full = {name: f"{weight.numel()} numbers" for name, weight in rows.items()}
        left = {name: f"{count} numbers" for name, (count,) in first.kept.items()}
    return made, first, tuple(PartRecord(name, full[name], left[name], errors[name]) for name in rows)


def _changes(before: Model, after: Model) -> tuple[PartRecord, ...]:
    """How far training moved each weight with two or more dimensions."""
    parts = []
    for name, value in before.module.named_parameters():
        if value.ndim >= 2:
            moved = float((after.module.get_parameter(name) - value).norm() / value.norm().clamp_min(1e-12))
            numbers = f"{value.numel()} numbers"
            parts.append(PartRecord(name, numbers, numbers if moved else f"{numbers}, not trained", moved))
    return tuple(parts)


def float_bytes(model: Model) -> int:
    """Bytes of all parameters in float32; of a sparse weight those of its numbers and a bit for every place."""
    total = 0
    for name, parameter in model.module.named_parameters():
        count = model.sparse.get(name)
        total += 4 * parameter.numel() if count is None else sparse_bytes(parameter.numel(), count)
    return total


def dense_bytes(model: Model) -> int:
    """Bytes of all parameters in float32, zeros like all others."""
    return 4 * parameter_count(model)


def parameter_count(model: Model) -> int:
    """Values of all parameters, tied ones once."""
    return sum(parameter.numel() for parameter in model.module.parameters())


@torch.no_grad()
def divergence(model: Model, original: Model, inputs: Inputs) -> float:
    """Mean distance of the outputs of two models (edgeport.compress.distill.distance)."""
    names = tuple(spec.name for spec in original.outputs)
    total = 0.0
    for sample in inputs:
        one, other = (select_outputs(call(each.module, sample), names) for each in (model, original))
        total += float(distance(one, other, sample))
    return total / len(inputs)


def _vocabulary_record(whole: Model, model: Model) -> StepRecord:
    """What leaving out tokens did (edgeport.compress.prune.trim)."""
    before, after = (f"{vocabulary_size(one.module)} tokens" for one in (whole, model))
    return _record("prune_vocabulary", whole, model, None, (PartRecord("vocabulary", before, after, None),))


def _record(
    method: str, before: Model, after: Model, diverged: float | None, parts: tuple[PartRecord, ...]
) -> StepRecord:
    return StepRecord(
        method=method,
        parameters_before=parameter_count(before),
        parameters_after=parameter_count(after),
        bytes_before=float_bytes(before),
        bytes_after=float_bytes(after),
        flops_before=sum(count_flops(before).values()),
        flops_after=sum(count_flops(after).values()),
        divergence=diverged,
        parts=parts,
    )


def restructure(
    model: Model,
    recipe: Recipe,
    inputs: Inputs,
    *,
    whole: Model | None = None,
    lessons: Lessons | None = None,
    log: Callable[[str], None] = lambda _line: None,
) -> Restructured:
    """Run the recipe's steps on a model, which is not changed.

    Args:
        inputs: calibration samples as the module takes them; empty where no step needs any.
        whole: the model with all of its tokens, where the recipe left some out.
        lessons: what distillation needs; None where the recipe names no teacher, and trainings need not be resumed.
        log: called with one line for each step.

    Raises:
        BadInputError: a step can't be done to this model, or has no data to choose from.
    """
    original = model
    cuts: list[Cut] = []
    records: list[StepRecord] = [] if whole is None else [_vocabulary_record(whole, model)]
    for index, step in enumerate(recipe.restructure):
        if isinstance(step, PruneVocabulary):
            continue  # was done when the model was loaded: everything after it sees the smaller vocabulary
        if needs_data(step) and not inputs:
            raise BadInputError(
                "The step chooses from data, and there is none.",
                where=step.method,
                next_step="Give the model inputs that edgeport has data for, or leave the step out.",
            )
        before, training = model, None
        if isinstance(step, Distill):
            model, training = teach(model, original, step, lessons or Lessons(), index)
            parts = _changes(before, model)
        else:
            model, cut, parts = _run(model, step, inputs)
            cuts.append(cut)
        diverged = divergence(model, original, inputs[:COMPARED]) if inputs else None
        record = replace(_record(step.method, before, model, diverged, parts), training=training)
        records.append(record)
        log(step_line(record))
    return Restructured(model, tuple(cuts), tuple(records))


def step_line(record: StepRecord) -> str:
    """A step in one line."""
    words = (
        f"{record.method}: {record.parameters_before / 1e6:.2f} -> {record.parameters_after / 1e6:.2f} M parameters, "
        f"{record.bytes_before / 1e6:.2f} -> {record.bytes_after / 1e6:.2f} MB, "
        f"{record.flops_before / 1e6:.1f} -> {record.flops_after / 1e6:.1f} MFLOP"
    )
    if record.training is not None:
        words = (
            f"{record.method}: {record.training.steps} updates, held-out loss {record.training.loss_before:.4g} -> "
            f"{record.training.loss_after:.4g} ({record.training.ended})"
        )
    return words if record.divergence is None else f"{words}, divergence {record.divergence:.4g}"
