"""MiniLM on ONNX Runtime: edgeport's files against ONNX Runtime's own quantizer, in one interleaved run.

    scripts/bench/onnx_minilm.py [--rounds 60] [--sentences 64] [--json FILE]

One thread, batch 1, 128 tokens. Each round calls every file once, in an order that changes, so that a busy
machine slows all of them alike; `cpu` is processor time, which waiting for the processor does not change.
The cosines are to torch in float32 on real sentences of the parity slice, which nothing was tuned on.
"""

from __future__ import annotations

import argparse
import json
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
from edgeport.data.samples import samples
from edgeport.export.artifact import LoweringSettings
from edgeport.export.onnx.lower import lower
from edgeport.export.onnx.trace import quiet
from edgeport.model.load import load_model
from edgeport.model.types import Model
from edgeport.recipe import load_recipe
from edgeport.target import load_target
from edgeport.validate.outputs import sentence_embedding

OUTPUT = "last_hidden_state"
TOKENS = 128


def our_files(model: Model, folder: Path) -> dict[str, Path]:
    target = load_target("linux-x86_64-ort")
    files = {}
    for recipe in ("fp32", "int8", "int4"):
        compressed, _ = apply_recipe(model, load_recipe(recipe), target)
        out = folder / recipe
        out.mkdir()
        files[f"edgeport {recipe}"] = lower(compressed, target, LoweringSettings("fp32", "dynamic"), out).path
    return files


def peer_files(model: Model, folder: Path) -> dict[str, Path]:
    """The plain export, and what `onnxruntime.quantization.quantize_dynamic` makes of it."""
    from onnxruntime.quantization import quantize_dynamic
    from transformers.exporters import OnnxConfig, OnnxExporter

    vary = torch.export.Dim.AUTO
    example = {name: torch.cat([value, value]) for name, value in model.example.items()}
    config = OnnxConfig(dynamic=True, dynamic_shapes={name: {0: vary, 1: vary} for name in example}, opset_version=20)
    files = {"plain export fp32": folder / "plain.onnx"}
    with quiet():
        OnnxExporter().export(model.module, example, config).save_pretrained(folder / "plain")
        exported = next((folder / "plain").rglob("*.onnx"))
        import onnx

        # Quantizers want the weights inside.
        onnx.save(onnx.load(exported), files["plain export fp32"])
        for per_channel in (False, True):
            name = f"quantize_dynamic per {'channel' if per_channel else 'tensor'}"
            files[name] = folder / f"dynamic_{per_channel}.onnx"
            quantize_dynamic(
                files["plain export fp32"],
                files[name],
                per_channel=per_channel,
                op_types_to_quantize=["MatMul", "Gemm", "Gather"],
            )
    return files


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a.ravel() @ b.ravel() / np.linalg.norm(a) / np.linalg.norm(b))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--sentences", type=int, default=64)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    console = Console(stderr=True)

    import onnxruntime

    model = load_model("zoo:minilm")
    with tempfile.TemporaryDirectory() as name:
        console.print("exporting ...")
        files = {**our_files(model, Path(name)), **peer_files(model, Path(name))}
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        sessions = {
            label: onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            for label, path in files.items()
        }
        sizes = {label: path.stat().st_size / 1e6 for label, path in files.items()}

    def run(label: str, inputs: dict[str, np.ndarray]) -> np.ndarray:
        session = sessions[label]
        feed = {value.name: inputs[value.name] for value in session.get_inputs()}
        result: np.ndarray = session.run([OUTPUT], feed)[0]
        return result

    console.print("comparing outputs ...")
    found = samples(model, count=arguments.sentences, split="parity")
    cosines: dict[str, list[tuple[float, float]]] = {label: [] for label in sessions}
    for inputs in found.inputs:
        with torch.no_grad():
            result = model.module(**{key: torch.from_numpy(value) for key, value in inputs.items()})
        reference, mask = result[OUTPUT].numpy(), inputs["attention_mask"]
        for label in sessions:
            hidden = run(label, inputs)
            pooled = cosine(sentence_embedding(hidden, mask), sentence_embedding(reference, mask))
            cosines[label].append((pooled, cosine(hidden[mask != 0], reference[mask != 0])))

    console.print("timing ...")
    full = samples(model, count=1, split="parity", sequence=TOKENS).inputs[0]
    full["attention_mask"] = np.ones_like(full["attention_mask"])
    labels = list(sessions)
    times: dict[str, list[tuple[float, float]]] = {label: [] for label in labels}
    for label in labels * 3:
        run(label, full)
    for turn in range(arguments.rounds):
        for label in labels[turn % len(labels) :] + labels[: turn % len(labels)]:
            cpu, wall = time.process_time(), time.perf_counter()
            run(label, full)
            times[label].append((time.perf_counter() - wall, time.process_time() - cpu))

    rows = []
    base = float(np.median([cpu for _, cpu in times["plain export fp32"]]))
    for label in labels:
        wall, cpu = (float(value) for value in np.median(np.array(times[label]), axis=0))
        pooled, hidden = np.array(cosines[label]).T
        rows.append(
            {
                "file": label,
                "megabytes": sizes[label],
                "wall_p50_ms": wall * 1e3,
                "cpu_p50_ms": cpu * 1e3,
                "cpu_ratio_to_plain_fp32": cpu / base,
                "cosine_embedding": float(pooled.mean()),
                "cosine_embedding_worst": float(pooled.min()),
                "cosine_hidden": float(hidden.mean()),
                "cosine_hidden_worst": float(hidden.min()),
            }
        )
    table = Table(
        "file", "MB", "wall p50 ms", "cpu p50 ms", "ratio", "cosine embedding (worst)", "cosine hidden (worst)"
    )
    for row in rows:
        table.add_row(
            str(row["file"]),
            f"{row['megabytes']:.1f}",
            f"{row['wall_p50_ms']:.1f}",
            f"{row['cpu_p50_ms']:.1f}",
            f"{row['cpu_ratio_to_plain_fp32']:.2f}",
            f"{row['cosine_embedding']:.4f} ({row['cosine_embedding_worst']:.4f})",
            f"{row['cosine_hidden']:.4f} ({row['cosine_hidden_worst']:.4f})",
        )
    Console(width=120).print(table)
    print(f"{found.record.samples} samples: {found.record.name}, {found.record.slice}")
    if arguments.json:
        record = {"rows": rows, "samples": found.record.samples, "data": found.record.name, "rounds": arguments.rounds}
        arguments.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
