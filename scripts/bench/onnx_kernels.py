"""One matrix product on ONNX Runtime in every weight form, against float32: which form is fast.

    scripts/bench/onnx_kernels.py [--rounds 200] [--json FILE]

One thread. Each file is what `lower` writes for a Linear layer. Each round calls every file once, in an order that
changes; times are medians of the thread's processor time, which waiting for the processor does not change. `x` is how
many times faster than float32; `error` is relative, against float64 arithmetic with the dequantised weights.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import onnxruntime
import torch
from rich.console import Console
from rich.table import Table

from edgeport.compress.quantize.grid import Grid
from edgeport.compress.quantize.rtn import quantize_rtn
from edgeport.export.artifact import LoweringSettings
from edgeport.export.onnx.lower import lower
from edgeport.formats import ActivationFormat, WeightFormat
from edgeport.model.types import Axis, Model, Source, TensorSpec
from edgeport.quantized import dequantize
from edgeport.target import load_target

SIZES = ((576, 1536), (768, 3072))
ROWS = (1, 128)
FORMS: tuple[tuple[str, ActivationFormat], ...] = (
    ("float", "float"),
    ("int8", "dynamic_int8"),
    ("int8", "float"),
    *(
        (name, "dynamic_int8")
        for name in (
            *("int8_g32", "uint8_g32", "int8_g64", "int8_g128"),
            *("int4_g16", "int4_g32", "uint4_g32", "int4_g64", "int4_g128", "uint4_g128"),
            *("int2_g32", "uint2_g32", "int2_g64", "int2_g128"),
        )
    ),
    ("int8_g32", "float"),
    ("int4_g32", "float"),
)


def linear(columns: int, channels: int, name: str, activation: ActivationFormat) -> Model:
    """One Linear layer, compressed."""
    torch.manual_seed(0)
    module = torch.nn.Linear(columns, channels, bias=False)
    rows = Axis("rows", 1, max(ROWS), 2)
    chosen = WeightFormat.parse(name)
    quantized = {}
    if chosen.quantized:
        grid = Grid(
            chosen.bits, chosen.group_size, chosen.scheme == "int", "float16" if chosen.group_size else "float32"
        )
        quantized["weight"] = quantize_rtn(module.weight, grid, scale_search=False)
        with torch.no_grad():
            module.weight.copy_(dequantize(quantized["weight"]))
    return Model(
        name="linear",
        module=module.eval(),
        source=Source("factory", "linear", {}),
        task="feature-extraction",
        modality="other",
        inputs=(TensorSpec("input", "float32", (rows, columns)),),
        outputs=(TensorSpec("output", "float32", (rows, channels)),),
        example={"input": torch.randn(2, columns)},
        huggingface=False,
        quantized=quantized,
        activations=dict.fromkeys(quantized, activation),
    )


def measure(columns: int, channels: int, rounds: int) -> list[dict[str, Any]]:
    """Every form of one size: milliseconds, ratios to float32 and errors, by rows of activations."""
    target = load_target("linux-x86_64-ort")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    sessions, models, sizes = [], [], []
    forms = [form for form in FORMS if WeightFormat.parse(form[0]).fits(channels, columns)]
    for name, activation in forms:
        model = linear(columns, channels, name, activation)
        with tempfile.TemporaryDirectory() as folder:
            path = lower(model, target, LoweringSettings("fp32", "dynamic"), Path(folder)).path
            sessions.append(onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]))
            sizes.append(path.stat().st_size)
        models.append(model)
    rows: list[dict[str, Any]] = [
        {"weights": name, "activations": activation, "columns": columns, "channels": channels, "bytes": size}
        for (name, activation), size in zip(forms, sizes, strict=True)
    ]
    for count in ROWS:
        x = np.random.default_rng(0).standard_normal((count, columns), np.float32)
        times: list[list[float]] = [[] for _ in sessions]
        order = list(range(len(sessions)))
        for index in range(rounds + 5):
            random.Random(index).shuffle(order)
            for number in order:
                start = time.thread_time()
                sessions[number].run(None, {"input": x})
                if index >= 5:
                    times[number].append(time.thread_time() - start)
        for number, row in enumerate(rows):
            weight = models[number].module.weight.detach().double().numpy()
            exact = x.astype(np.float64) @ weight.T
            y = sessions[number].run(None, {"input": x})[0]
            median = float(np.median(times[number]))
            row[f"ms_{count}"] = median * 1e3
            row[f"ratio_{count}"] = float(np.median(times[0])) / median
            row[f"error_{count}"] = float(np.linalg.norm(y - exact) / np.linalg.norm(exact))
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Matrix products on ONNX Runtime in every weight form.")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results = []
    console = Console()
    for columns, channels in SIZES:
        rows = measure(columns, channels, arguments.rounds)
        results += rows
        table = Table(title=f"{columns} x {channels}")
        for heading in (
            "weights",
            "activations",
            "bits a weight",
            *(f"x, {n} row{'s' * (n > 1)}" for n in ROWS),
            "error",
        ):
            table.add_column(heading)
        for row in rows:
            bits = row["bytes"] * 8 / columns / channels
            ratios = [f"{row[f'ratio_{count}']:.2f}" for count in ROWS]
            table.add_row(row["weights"], row["activations"], f"{bits:.2f}", *ratios, f"{row[f'error_{ROWS[-1]}']:.0e}")
        console.print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
