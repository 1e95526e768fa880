#!/usr/bin/env python
"""Mixed precision's costs against the truth: what sensitivity.py foretells of single layers, and what they really do.

    OMP_NUM_THREADS=1 python scripts/bench/predicted_costs.py --model zoo:whisper-tiny.en --format int4_g32

Costs are taken on 16 calibration samples, as mixed precision takes them. Then one weight after the other is rounded
alone, and the divergence from the float model is measured: mean KL for logits, else half the relative squared error.
Samples that the costs were not taken on serve where the data has more than 16. "log sd" is the standard deviation of
log(predicted / measured) over the layers: 0 is perfect, 0.7 is a factor of two.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from rich.console import Console
from rich.progress import track

from edgeport.compress.assign import compressible
from edgeport.compress.calibrate import as_tensors
from edgeport.compress.chain import call
from edgeport.compress.mixed import SAMPLES
from edgeport.compress.quantize.grid import Grid
from edgeport.compress.quantize.rtn import quantize_rtn
from edgeport.compress.sensitivity import measure_sensitivity
from edgeport.data.samples import samples
from edgeport.formats import WeightFormat
from edgeport.model.inputs import select_outputs
from edgeport.model.load import load_model
from edgeport.quantized import as_matrix, dequantize

if TYPE_CHECKING:
    from edgeport.model.types import Model

Inputs = Sequence[Mapping[str, torch.Tensor]]


def answers(model: Model, inputs: Inputs) -> list[torch.Tensor]:
    """The logits as log probabilities, or the first output."""
    names = [spec.name for spec in model.outputs]
    with torch.no_grad():
        found = [select_outputs(call(model.module, sample), names) for sample in inputs]
    if "logits" in names:
        return [one["logits"].log_softmax(-1) for one in found]
    return [one[names[0]] for one in found]


def divergence(model: Model, before: list[torch.Tensor], after: list[torch.Tensor]) -> float:
    if "logits" in [spec.name for spec in model.outputs]:
        each = [(one.exp() * (one - two)).sum(-1).mean() for one, two in zip(before, after, strict=True)]
    else:
        each = [(two - one).square().sum() / one.square().sum() / 2 for one, two in zip(before, after, strict=True)]
    return float(torch.stack(each).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="zoo:minilm", help="what edgeport export takes")
    parser.add_argument("--format", default="int4_g32", help="an integer format")
    parser.add_argument("--layers", type=int, default=40, help="at most so many, evenly spread")
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output")
    arguments = parser.parse_args()
    model, form = load_model(arguments.model), WeightFormat.parse(arguments.format)
    grid = Grid(form.bits, form.group_size, form.scheme == "int", "float32")
    inputs = as_tensors(model, samples(model, count=2 * SAMPLES, split="calibration"))
    used, held = inputs[:SAMPLES], inputs[SAMPLES:] or inputs
    weights = {
        name: [alias.rpartition(".")[0] for alias in names]
        for name, (_, names) in compressible(model.module).items()
        if form.fits(*as_matrix(model.module.get_parameter(name)).shape)
    }
    layers = {layer: model.module.get_submodule(layer) for users in weights.values() for layer in users}
    found_costs = measure_sensitivity(model.module, layers, used, tuple(spec.name for spec in model.outputs))
    before = answers(model, held)
    rows: list[dict[str, Any]] = []
    chosen = list(weights)[:: max(1, math.ceil(len(weights) / arguments.layers))]
    for name in track(chosen, "rounding alone", console=Console(stderr=True)):
        parameter = model.module.get_parameter(name)
        weight = parameter.detach().clone()
        costs = [found_costs[user] for user in weights[name]]
        importance = next((cost.importance for cost in costs if cost.importance is not None), None)
        rounded = dequantize(quantize_rtn(weight, grid, importance=importance))
        change = as_matrix(rounded) - as_matrix(weight)
        with torch.no_grad():
            parameter.copy_(rounded)
            measured = divergence(model, before, answers(model, held))
            parameter.copy_(weight)
        rows.append({"weight": name, "predicted": sum(cost.cost(change) for cost in costs), "measured": measured})
    logs = [math.log(row["predicted"] / row["measured"]) for row in rows if min(row["predicted"], row["measured"]) > 0]
    spread = statistics.pstdev(logs)
    if arguments.json:
        print(json.dumps({"model": model.name, "format": form.name, "log_sd": spread, "rows": rows}, indent=2))
        return
    print(f"{model.name}, {form.name}: {len(rows)} weights, log sd {spread:.2f}\n")
    print("| weight | measured | predicted | ratio |\n|---|---|---|---|")
    for row in rows:
        ratio = row["predicted"] / row["measured"] if row["measured"] > 0 else math.nan
        print(f"| {row['weight']} | {row['measured']:.2e} | {row['predicted']:.2e} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
