"""Apply a recipe: the compressed Model, and a record of what happened to every layer."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from edgeport.compress.assign import Assignment, assign
from edgeport.compress.bias import correct_biases
from edgeport.compress.calibrate import as_tensors, calibration_samples
from edgeport.compress.guidance import Guidance, measure_guidance
from edgeport.compress.journal import Journal, Made, Note
from edgeport.compress.lines import weight_line
from edgeport.compress.mixed import Option, Table, choose_formats
from edgeport.compress.prepare.passes import prepare
from edgeport.compress.prune.sparse import sparse_bytes
from edgeport.compress.quantize.brecq import reconstruct
from edgeport.compress.quantize.fitted import quantize_fitted_palette
from edgeport.compress.quantize.gptq import quantize_gptq
from edgeport.compress.quantize.hqq import quantize_hqq
from edgeport.compress.quantize.palette import quantize_palette
from edgeport.compress.quantize.qat import fine_tune
from edgeport.compress.quantize.qera import correct
from edgeport.compress.quantize.refine import refine
from edgeport.compress.quantize.rtn import quantize_rtn
from edgeport.compress.sequential import QuantizedBlock, Report, Tune, quantize_in_sequence
from edgeport.compress.static import with_static_activations
from edgeport.compress.statistics import Moments, output_error
from edgeport.data.samples import Samples
from edgeport.errors import BadInputError
from edgeport.model.types import Model
from edgeport.quantized import QuantizedTensor, as_matrix, dequantize, digest
from edgeport.recipe import Brecq, Gptq, Hqq, Qat, Quantize, Recipe, RoundToNearest
from edgeport.target import Target


@dataclass(frozen=True)
class LayerRecord:
    """What compression did to one weight.

    Attributes:
        bytes_before, bytes_after: in float32, and in the chosen format with its scales. A matrix that compression
            added had 0 before. Where pruning put zeros, afterwards a bit a place and the other numbers in float32.
        method: what chose the codes; empty for a weight left in float.
        relative_error: ||after - before|| / ||before||, of the weight itself.
        output_error: the same of the layer's output over the calibration inputs, as the layers quantized before
            it make them, positions weighted as the method weighs them; None where the method saw no inputs, or
            training changed the layer afterwards.
        tied: every name of the weight when it has several.
        sha256: of the logical codes and scales (`quantized.digest`), None for a weight left in float.
        options: with mixed precision, what every worthwhile format would store and cost, fewest bytes first.
    """

    name: str
    kinds: tuple[str, ...]
    shape: tuple[int, ...]
    format: str
    activation: str
    bytes_before: int
    bytes_after: int
    method: str
    relative_error: float
    output_error: float | None
    tied: tuple[str, ...]
    reason: str
    sha256: str | None
    options: tuple[Option, ...] = ()


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
    model: Model,
    assignments: tuple[Assignment, ...],
    quantized: dict[str, QuantizedTensor],
    notes: Mapping[str, Note],
    table: Table,
    added: Mapping[str, torch.Tensor] | None = None,
) -> tuple[LayerRecord, ...]:
    """What happened to each compressible weight.

    Args:
        model: the uncompressed one.
        added: matrices that it does not have, before they were rounded.
    """
    parameters = dict(model.module.named_parameters(remove_duplicate=False)) | dict(added or {})
    records = []
    for item in assignments:
        if item.name not in parameters:
            continue  # the correction of a weight that mixed precision left in float
        weight = parameters[item.name].detach().to(torch.float32)
        tensor, note = quantized.get(item.name), notes.get(item.name, Note("", None))
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
                bytes_before=weight.numel() * 4 if item.corrects is None else 0,
                bytes_after=_float_bytes(model, item) if tensor is None else tensor.storage_bytes(),
                method="" if tensor is None else note.method,
                relative_error=error,
                output_error=note.output_error,
                tied=item.tied,
                reason=item.reason,
                sha256=None if tensor is None else digest(tensor),
                options=table.get(item.name, ()),
            )
        )
    return tuple(records)


def _float_bytes(model: Model, item: Assignment) -> int:
    """Bytes of a weight left in float32; of one with zeros those of its other numbers and a bit a place."""
    count = math.prod(item.shape)
    return sparse_bytes(count, model.sparse[item.name]) if item.name in model.sparse else count * 4


def _searches(step: Quantize) -> bool:
    """Scales are searched for, unless round to nearest was told not to."""
    return step.scale_search if isinstance(step, RoundToNearest) else True


def _quantize(step: Quantize, item: Assignment, weight: torch.Tensor, moments: Moments | None) -> Made:
    """One weight by the recipe's method. A layer whose inputs are no vectors (an embedding) is rounded to nearest."""
    second = None if moments is None else moments.second / moments.count
    if item.format.scheme == "lut" and isinstance(step, Gptq) and second is not None:
        tensor = quantize_fitted_palette(
            weight,
            second,
            bits=item.format.bits,
            group_size=item.format.group_size,
            scale_dtype=item.scale_dtype,
            act_order=step.act_order,
            damping=step.damping,
            rounds=step.refine,
        )
        name = "gptq"
    elif item.format.scheme == "lut":
        importance = None if second is None else second.diagonal()
        size = item.format.group_size
        tensor = quantize_palette(
            weight, bits=item.format.bits, group_size=size, scale_dtype=item.scale_dtype, importance=importance
        )
        name = "palette"
    elif isinstance(step, Gptq) and second is not None:
        tensor = quantize_gptq(weight, second, item.grid, act_order=step.act_order, damping=step.damping)
        if step.refine:
            tensor = refine(tensor, weight, second, rounds=step.refine)
        name = "gptq"
    elif isinstance(step, Hqq):
        tensor, name = quantize_hqq(weight, item.grid), "hqq"
    else:
        tensor, name = quantize_rtn(weight, item.grid, scale_search=_searches(step)), "rtn"
    if second is None:
        return tensor, Note(name, None)
    matrix = as_matrix(weight.to(torch.float32))
    energy = output_error(matrix.clone(), second)
    change = as_matrix(dequantize(tensor)) - matrix
    return tensor, Note(name, (max(output_error(change, second), 0.0) / energy) ** 0.5 if energy > 0 else 0.0)


def _guidance(
    model: Model,
    assignments: Sequence[Assignment],
    inputs: Sequence[Mapping[str, torch.Tensor]],
    progress: Report | None,
) -> Guidance:
    """How much each position counts, for every layer whose weight is quantized by its inputs."""
    names = {
        name.rpartition(".")[0] for item in assignments if item.format.quantized for name in item.tied or (item.name,)
    }
    layers = {name: model.module.get_submodule(name) for name in sorted(names)}
    multiplying = {name: layer for name, layer in layers.items() if not isinstance(layer, torch.nn.Embedding)}

    def report(done: int) -> None:
        if progress is not None:
            progress(done, len(inputs), f"gradients of sample {done}")

    outputs = tuple(spec.name for spec in model.outputs)
    return measure_guidance(model.module, multiplying, inputs, outputs, progress=report)


def _fine_tune(
    model: Model,
    teacher: Model,
    step: Qat,
    assignments: tuple[Assignment, ...],
    inputs: Sequence[Mapping[str, torch.Tensor]],
    notes: dict[str, Note],
    report: Callable[[int, int, float], None] | None,
    log: Callable[[str], None],
    checkpoint: Path | None,
) -> Model:
    """The quantized model after training; the notes of the weights that it changed say so."""
    tuned = fine_tune(model, teacher, inputs, step, checkpoint=checkpoint, progress=report)
    log(f"qat: loss on held-out inputs {tuned.loss_before:.4g} before, {tuned.loss_after:.4g} after")
    for name, tensor in tuned.quantized.items():
        if digest(tensor) != digest(model.quantized[name]):
            notes[name] = Note(f"{notes[name].method}+qat", None)
    if tuned.floats:
        model = replace(model, module=copy.deepcopy(model.module))
        with torch.no_grad():
            for name, value in tuned.floats.items():
                model.module.get_parameter(name).copy_(value)
    return set_weights(model, tuned.quantized, assignments)


def _tuning(
    step: Brecq,
    inputs: Sequence[Mapping[str, torch.Tensor]],
    report: Callable[[int, int, float], None] | None,
    log: Callable[[str], None],
) -> Tune:
    """Block reconstruction as the sequential run calls it; the notes of the weights that it changed say so."""
    masks = [sample.get("attention_mask") for sample in inputs]

    def progress(done: int, loss: float) -> None:
        if report is not None:
            report(done, step.steps, loss)

    def tune(block: QuantizedBlock) -> dict[str, Made]:
        start = {name: tensor for name, (tensor, _) in block.made.items()}
        if not start:
            return {}  # a block that nothing is quantized in
        found = reconstruct(block.forward, block.wanted, masks, start, block.weights, step, progress=progress)
        log(f"brecq: loss on held-out inputs {found.loss_before:.4g} before, {found.loss_after:.4g} after")
        made = dict(block.made)
        for name, tensor in found.quantized.items():
            if digest(tensor) != digest(start[name]):
                made[name] = tensor, Note(f"{made[name][1].method}+brecq", None)
        return made

    return tune


def apply_recipe(
    model: Model,
    recipe: Recipe,
    target: Target,
    *,
    calibration: Samples | None = None,
    progress: Report | None = None,
    log: Callable[[str], None] | None = None,
    training: Callable[[int, int, float], None] | None = None,
    journal: Journal | None = None,
) -> tuple[Model, tuple[LayerRecord, ...]]:
    """Compress a model as the recipe says, on the grids that the target has.

    Args:
        calibration: real inputs for the methods that need them; None gets those that the recipe names.
        progress: called with (weights done, weights in all, the last one and the relative error of its output).
        log: called with one line a block where a method goes block by block, and one for each other step.
        training: called with (steps done, steps in all, loss) where the recipe trains; for each block where it tunes
            blocks.
        journal: where a method that goes block by block notes what it finished, and training its state, to go on there.

    Raises:
        TargetRefusesError: the target can't take the recipe.
        BadInputError: a weight is not finite, or the calibration data can't be had or makes values that are not.
    """
    assignments = assign(model, recipe, target)
    check_finite(model.module)
    step = recipe.quantize
    if step is None:
        return model, record_layers(model, assignments, {}, {}, {})

    inputs = as_tensors(model, calibration or calibration_samples(model, recipe)) if recipe.calibrates else []
    assignments, corrections = (
        tuple(item for item in assignments if (item.corrects is not None) == adds) for adds in (False, True)
    )
    say = log or (lambda _line: None)
    model = prepare(
        model,
        recipe.prepare,
        assignments,
        inputs,
        weighted=isinstance(step, Gptq),
        scale_search=_searches(step),
        log=say,
    )
    table: Table = {}
    if step.bits_per_weight is not None:
        assignments, table = choose_formats(model, recipe, target, assignments, inputs, progress=progress)

    def method(item: Assignment, weight: torch.Tensor, moments: Moments | None) -> Made:
        return _quantize(step, item, weight, moments)

    finished: dict[str, Made] = {}
    if isinstance(step, Gptq) or recipe.reconstruct is not None:
        tune = None if recipe.reconstruct is None else _tuning(recipe.reconstruct, inputs, training, say)
        finished = quantize_in_sequence(
            model.module,
            assignments,
            inputs,
            method,
            guidance=_guidance(model, assignments, inputs, progress) if isinstance(step, Gptq) else None,
            tune=tune,
            journal=journal,
            progress=progress,
            log=log,
        )
    else:
        parameters = dict(model.module.named_parameters(remove_duplicate=False))
        quantized = [item for item in assignments if item.format.quantized]
        for index, item in enumerate(quantized):
            finished[item.name] = method(item, parameters[item.name].detach(), None)
            if progress is not None:
                progress(index + 1, len(quantized), weight_line(item.name, finished[item.name][1]))
    notes = {name: note for name, (_, note) in finished.items()}
    made = set_weights(model, {name: tensor for name, (tensor, _) in finished.items()}, assignments)
    added: dict[str, torch.Tensor] = {}
    if corrections:
        made, found, added = correct(made, model.module, corrections, inputs)
        notes |= found
        assignments += corrections
    if recipe.tune is not None and finished:
        checkpoint = None if journal is None else journal.folder / "qat.safetensors"
        made = _fine_tune(made, model, recipe.tune, assignments, inputs, notes, training, say, checkpoint)
    if step.correct_bias:
        made = correct_biases(made, model, inputs)
    static = sum(item.activation == "static_int8" for item in assignments)
    if static:
        made, assignments = with_static_activations(made, model, assignments, step, target, inputs)
        say(f"static int8 activations: {len(made.ranges)} layers, {static - len(made.ranges)} left out")
    return made, record_layers(model, assignments, dict(made.quantized), notes, table, added)
