"""Run the preparation steps of a recipe: each changes the weights and keeps the function."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch

from edgeport.compress.assign import Assignment
from edgeport.compress.chain import call
from edgeport.compress.prepare.awq import awq_scale
from edgeport.compress.prepare.fold import scale_pair
from edgeport.compress.prepare.graph import read_graph
from edgeport.compress.prepare.rotate import rotate
from edgeport.compress.prepare.smooth import smooth_scale
from edgeport.compress.statistics import observed
from edgeport.model.types import Model
from edgeport.recipe import Awq, Prepare, Rotate, Smooth

ROWS = 128
"""Rows of each weight on which AWQ's exponent is chosen: all of them choose mostly the same, in four times the time."""


def prepare(
    model: Model,
    steps: Sequence[Prepare],
    assignments: Sequence[Assignment],
    inputs: Sequence[Mapping[str, torch.Tensor]],
    *,
    weighted: bool,
    scale_search: bool = True,
    log: Callable[[str], None] = lambda _line: None,
) -> Model:
    """The model with other weights that compute the same. The given model is not changed.

    Args:
        assignments: what the weights will become.
        inputs: calibration samples; unused by rotation.
        weighted: the quantizer that follows weighs errors by the energy of their inputs, as GPTQ does.
        scale_search: it searches for scales.
        log: called with one line about what a step found to do.

    Raises:
        BadInputError: the model's structure does not allow a rotation, or an activation is not finite.
    """
    for step in steps:
        if isinstance(step, Rotate):
            outputs = tuple(spec.name for spec in model.outputs)
            model = replace(model, module=rotate(model.module, model.example, outputs, seed=step.seed))
        else:
            module, pairs = _scaled(model, step, assignments, inputs, weighted=weighted, scale_search=scale_search)
            model = replace(model, module=module)
            log(f"{step.method}: {pairs} pair{'' if pairs == 1 else 's'} of layers scaled")
    return model


def _scaled(
    model: Model,
    step: Awq | Smooth,
    assignments: Sequence[Assignment],
    inputs: Sequence[Mapping[str, torch.Tensor]],
    *,
    weighted: bool,
    scale_search: bool,
) -> tuple[torch.nn.Module, int]:
    """AWQ or SmoothQuant over every pair whose consumers are quantized, and how many pairs there are."""
    becomes = {item.name: item for item in assignments if item.format.scheme in ("int", "uint")}
    graph = read_graph(model.module, model.example, tuple(spec.name for spec in model.outputs))
    pairs = [pair for pair in graph.pairs if all(name in becomes for name in pair.consumers)]
    module = copy.deepcopy(model.module)
    layers = {pair.consumers[0]: module.get_submodule(pair.consumers[0].rpartition(".")[0]) for pair in pairs}
    with torch.no_grad(), observed(layers) as moments:
        for sample in inputs:
            call(module, sample)
    for pair in pairs:
        found, weights = moments[pair.consumers[0]], [module.get_parameter(name).detach() for name in pair.consumers]
        if isinstance(step, Awq):
            second, grid = found.second / found.count, becomes[pair.consumers[0]].grid
            # Judged by the error of the quantizer that follows: another one's may choose scales that harm.
            scale = awq_scale(
                weights,
                second,
                found.mean_abs,
                grid,
                columns=pair.columns,
                scale_search=scale_search,
                weighted=weighted,
                rows=ROWS,
            )
        else:
            scale = smooth_scale(weights, found.max_abs, step.alpha, columns=pair.columns)
        scale_pair(module, pair, scale)
    return module, len(pairs)
