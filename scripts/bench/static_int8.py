"""EfficientNet-Lite0 with int8 activations on fixed grids, beside the other int8 forms and ONNX Runtime's quantizer.

    scripts/bench/static_int8.py [--rounds 40] [--runtime onnxruntime|executorch]

One thread, batch 1. Each round calls every file once, so that a busy machine slows all of them alike; the times are
processor time. Pictures are those of the parity slice and their mirror images, which nothing was calibrated on; every
tool calibrates on the same pictures of the calibration slice. KL and cosine are to torch in float32.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from edgeport.compress import apply_recipe
from edgeport.compress.calibrate import calibration_samples
from edgeport.data.samples import samples
from edgeport.export.artifact import Artifact, LoweringSettings
from edgeport.export.dispatch import lower
from edgeport.model.load import load_model
from edgeport.model.types import Model
from edgeport.recipe import load_recipe
from edgeport.runtime.session import Session, open_session
from edgeport.target import load_target

TARGETS = {"onnxruntime": "linux-x86_64-ort", "executorch": "android-arm64-executorch"}
RECIPES = ("fp32", "int8", "int8-static")


def our_files(model: Model, target_name: str, folder: Path) -> dict[str, Artifact]:
    target = load_target(target_name)
    files = {}
    for name in RECIPES:
        compressed, _ = apply_recipe(model, load_recipe(name), target)
        out = folder / name
        out.mkdir()
        files[f"edgeport {name}"] = lower(compressed, target, LoweringSettings("fp32", "fixed"), out)
    return files


def peer_files(model: Model, float_file: Artifact, folder: Path) -> dict[str, Artifact]:
    """What `onnxruntime.quantization.quantize_static` makes of the float file: per channel, uint8 by int8."""
    from dataclasses import replace

    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    calibration = calibration_samples(model, load_recipe("int8-static")).inputs

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = iter(calibration)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.left, None)

    ready = folder / "ready.onnx"
    quant_pre_process(str(float_file.path), str(ready), skip_symbolic_shape=True)
    files = {}
    for method in (CalibrationMethod.MinMax, CalibrationMethod.Entropy, CalibrationMethod.Percentile):
        out = folder / f"{method.name}.onnx"
        quantize_static(
            str(ready),
            str(out),
            Reader(),
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=method,
        )
        files[f"onnxruntime static {method.name}"] = replace(float_file, root=folder, entry=out.name)
    return files


def logits_of(session: Session, inputs: list[dict[str, np.ndarray]]) -> torch.Tensor:
    return torch.cat([torch.from_numpy(session.run(sample)["logits"]) for sample in inputs]).double()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--runtime", choices=sorted(TARGETS), default="onnxruntime")
    options = parser.parse_args()

    model = load_model("zoo:efficientnet-lite0")
    inputs = samples(model, count=28, split="parity").inputs
    with torch.no_grad():
        reference = torch.cat(
            [model.module(**{k: torch.from_numpy(v) for k, v in sample.items()}) for sample in inputs]
        ).double()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        files = our_files(model, TARGETS[options.runtime], folder)
        if options.runtime == "onnxruntime":
            files |= peer_files(model, files["edgeport fp32"], folder)
        sessions = {name: open_session(artifact) for name, artifact in files.items()}
        times: dict[str, list[float]] = {name: [] for name in sessions}
        for index in range(options.rounds):
            for name, session in sessions.items():
                started = time.process_time()
                session.run(inputs[index % len(inputs)])
                times[name].append(time.process_time() - started)
        floats = float(np.median(times["edgeport fp32"]))
        table = Table("file", "MB", "cosine", "KL", "top-1", "ms", "of float")
        for name, session in sessions.items():
            found = logits_of(session, inputs)
            p, q = reference.log_softmax(-1), found.log_softmax(-1)
            middle = float(np.median(times[name]))
            table.add_row(
                name,
                f"{files[name].path.stat().st_size / 1e6:.2f}",
                f"{float(torch.cosine_similarity(reference, found).mean()):.5f}",
                f"{float((p.exp() * (p - q)).sum(-1).mean()):.5f}",
                f"{float((reference.argmax(-1) == found.argmax(-1)).double().mean()):.3f}",
                f"{middle * 1e3:.2f}",
                f"{middle / floats:.2f}",
            )
        Console(width=120).print(table)


if __name__ == "__main__":
    main()
