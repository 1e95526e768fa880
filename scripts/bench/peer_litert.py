"""LiteRT: convert a model with litert-torch, quantize it with AI Edge Quantizer, run it; in an interpreter with both.

peer_litert.py MODEL INPUTS.npz CALIBRATION.npz FLOAT.onnx FLOAT.tflite OUT.tflite RECIPE

The float file is converted once. Shapes are fixed at the largest of the inputs; what is shorter is padded, with zeros
in the attention mask. The outputs of every input go to outputs.npz beside OUT.tflite, and with them the processor time
of a run relative to ONNX Runtime's on FLOAT.onnx.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ai_edge_litert.interpreter import Interpreter
from ai_edge_quantizer import quantizer, recipe
from peer_inputs import read

from edgeport.model.inputs import select_outputs
from edgeport.model.load import load_model
from edgeport.model.types import Model

ROUNDS = 9
OCTAV, GPTQ = recipe.AlgorithmName.OCTAV, recipe.AlgorithmName.GPTQ
RECIPES = {
    "float": None,
    "dynamic_wi8_afp32": recipe.dynamic_wi8_afp32,
    "weight_only_wi8_afp32": recipe.weight_only_wi8_afp32,
    "static_wi8_ai8": recipe.static_wi8_ai8,
    "dynamic_wi4b32_afp32": recipe.dynamic_wi4b32_afp32,
    "dynamic_wi4b32_afp32 octav": lambda: recipe.dynamic_wi4b32_afp32(algorithm_key=OCTAV),
    "dynamic_wi4c_hr_afp32": recipe.dynamic_wi4c_hr_afp32,
    "dynamic_wi4b32_afp32 gptq": lambda: recipe.dynamic_wi4b32_afp32(algorithm_key=GPTQ),
}

Rows = list[dict[str, np.ndarray]]


class Named(torch.nn.Module):
    """The model with its outputs in order and nothing else."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.module = model.module
        self.names = tuple(spec.name for spec in model.outputs)

    def forward(self, **inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(select_outputs(self.module(**inputs), self.names).values())


def pad(rows: Rows, shapes: Mapping[str, tuple[int, ...]]) -> Rows:
    """Every input at the given shape, zeros behind it."""
    return [
        {name: np.pad(value, [(0, a - b) for a, b in zip(shapes[name], value.shape, strict=True)])
         for name, value in row.items()}
        for row in rows
    ]  # fmt: skip


def convert(model: Model, shapes: Mapping[str, tuple[int, ...]], out: Path) -> None:
    import litert_torch

    dtypes = {spec.name: getattr(torch, spec.dtype) for spec in model.inputs}
    example = {name: torch.ones(shape, dtype=dtypes[name]) for name, shape in shapes.items()}
    litert_torch.convert(Named(model).eval(), sample_kwargs=example).export(str(out))


def runner(path: Path) -> Any:
    """The file's one signature, one thread."""
    interpreter = Interpreter(str(path), num_threads=1)
    return interpreter.get_signature_runner()


def feed(run: Any, row: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A row in the dtypes that the file takes; a static file takes codes."""
    values = {}
    for name, found in run.get_input_details().items():
        value, dtype = row[name], found["dtype"]
        scale, zero_point = found["quantization"]
        if value.dtype.kind == "f" and np.issubdtype(dtype, np.integer):
            limits = np.iinfo(dtype)
            value = np.clip(np.round(value / scale) + zero_point, limits.min, limits.max)
        values[name] = value.astype(dtype)
    return values


def answer(run: Any, row: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """The outputs in the model's order, in float32."""
    details, result = run.get_output_details(), run(**feed(run, row))
    values = []
    for name in sorted(result):
        scale, zero_point = details[name]["quantization"]
        value = result[name].astype(np.float32)
        coded = np.issubdtype(details[name]["dtype"], np.integer) and scale
        values.append((value - zero_point) * np.float32(scale) if coded else value)
    return values


def cpu_ratio(run: Any, plain: str, row: Mapping[str, np.ndarray]) -> float:
    """Median processor time of one run, relative to ONNX Runtime's of the float file; one thread, taking turns."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(plain, options, providers=["CPUExecutionProvider"])
    fed = {value.name: row[value.name] for value in session.get_inputs()}
    coded = feed(run, row)
    calls = (lambda: session.run(None, fed), lambda: run(**coded))
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(ROUNDS + 2):
        for index in (0, 1) if turn % 2 else (1, 0):
            start = time.process_time()
            calls[index]()
            times[index].append(time.process_time() - start)
    return float(np.median(times[1][2:]) / np.median(times[0][2:]))


def main() -> None:
    reference, inputs, calibration, plain_onnx, plain, out, name = sys.argv[1:]
    rows, tune = read(inputs), read(calibration)
    shapes = {
        key: tuple(int(size) for size in np.max([row[key].shape for row in rows + tune], axis=0)) for key in rows[0]
    }
    model = load_model(reference)
    if not Path(plain).is_file():
        convert(model, shapes, Path(plain))
    make = RECIPES[name]
    if make is not None:
        tool = quantizer.Quantizer(str(plain))
        tool.load_quantization_recipe(make())
        found = None
        if tool.need_calibration:
            float_run = runner(Path(plain))
            data = [feed(float_run, row) for row in pad(tune, shapes)]
            found = tool.calibrate({"serving_default": data}, num_threads=1)
        tool.quantize(found).export_model(Path(out), overwrite=True)
    run = runner(Path(plain) if make is None else Path(out))
    names = [spec.name for spec in model.outputs]
    answers = {}
    padded = pad(rows, shapes)
    for index, row in enumerate(padded):
        for key, value in zip(names, answer(run, row), strict=True):
            answers[f"{index}/{key}"] = value
    answers["cpu_ratio"] = np.array(cpu_ratio(run, plain_onnx, padded[0]))
    np.savez(Path(out).with_name("outputs.npz"), **answers)


if __name__ == "__main__":
    main()
