#!/usr/bin/env python
"""What a conversion costs: edgeport's lowering against the underlying exporter alone.

    python scripts/bench/conversion.py --model zoo:minilm --backend onnx --backend executorch --json

Each measurement is a fresh process that loads the model and then converts it, once, with fixed shapes:
imports of the exporter count, loading the model does not. The variants take turns. `exporter` is what a
user would write without edgeport: transformers.exporters, torch.onnx, ExecuTorch's or coremltools' own
calls on the float model. Time is reported as processor time, which other processes disturb less, and as
wall time; memory is the most ever resident. The goal is a ratio of at most 1.3 for each.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

if TYPE_CHECKING:
    from edgeport.model.types import Model
    from edgeport.target import Target

BACKENDS = {"onnx": "linux-x86_64-ort", "executorch": "android-arm64-executorch", "coreml": "ios18-coreml"}
"""The target that stands for each backend."""
GOAL = 1.3


@dataclass(frozen=True)
class Cost:
    """What one conversion took in its own process; MB are 1e6 bytes."""

    cpu_s: float
    wall_s: float
    peak_mb: float
    file_mb: float


def edgeport(model: Model, target: Target, recipe: str, out: Path) -> None:
    """Compress as the recipe says, and lower."""
    from edgeport.compress import apply_recipe
    from edgeport.export.artifact import LoweringSettings
    from edgeport.export.dispatch import lower
    from edgeport.recipe import load_recipe

    settings = LoweringSettings(precision=target.precisions[0], shapes="fixed")
    compressed, _ = apply_recipe(model, load_recipe(recipe), target)
    lower(compressed, target, settings, out)


def export_onnx(model: Model, target: Target, out: Path) -> None:
    """transformers.exporters for Hugging Face models, torch.onnx for the rest."""
    import torch

    assert target.onnxruntime is not None
    opset = target.onnxruntime.opset
    if model.huggingface:
        from transformers.exporters import OnnxConfig, OnnxExporter

        inputs = {**model.example, "use_cache": False}
        exported = OnnxExporter().export(model.module, inputs, OnnxConfig(opset_version=opset))
        exported.save_pretrained(out)
        return
    torch.onnx.export(
        model.module,
        kwargs=dict(model.example),
        f=out / "model.onnx",
        opset_version=opset,
        dynamo=True,
        external_data=False,
    )


def traced(model: Model) -> Any:
    """torch.export's program of the float model."""
    import torch

    if model.huggingface:
        from transformers.exporters.exporter_dynamo import DynamoConfig, DynamoExporter

        return DynamoExporter().export_program(model.module, {**model.example, "use_cache": False}, DynamoConfig())[0]
    return torch.export.export(model.module, (), dict(model.example))


def export_executorch(model: Model, target: Target, out: Path) -> None:
    """torch.export, then ExecuTorch with its XNNPACK partitioner."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower

    if model.huggingface:
        model.module.set_attn_implementation("eager")
    config = EdgeCompileConfig(_check_ir_validity=False)
    edge = to_edge_transform_and_lower(traced(model), partitioner=[XnnpackPartitioner()], compile_config=config)
    fuse = ExecutorchBackendConfig(do_quant_fusion_and_const_prop=True)
    (out / "model.pte").write_bytes(edge.to_executorch(fuse).buffer)


def converted_coreml(model: Model, target: Target) -> Any:
    """torch.export, the decompositions that stock Hugging Face masks need, then coremltools."""
    import coremltools
    import torch

    assert target.coreml is not None
    aten = torch.ops.aten
    decompositions = {
        aten.where.ScalarOther: lambda c, a, b: torch.where(c, a, torch.full_like(a, b)),
        aten.__and__.Tensor: lambda a, b: aten.bitwise_and.Tensor(a, b),
        aten.new_ones.default: lambda x, size, dtype=None, **_: torch.full(size, 1, dtype=dtype or x.dtype),
    }
    program = traced(model).run_decompositions(decompositions)
    return coremltools.convert(
        program,
        minimum_deployment_target=coremltools.target[target.coreml.minimum_deployment_target],
        skip_model_load=True,
    )


def export_coreml(model: Model, target: Target, out: Path) -> None:
    """coremltools alone."""
    converted_coreml(model, target).save(str(out / "model.mlpackage"))


def export_onnx_int8(model: Model, target: Target, out: Path) -> None:
    """The exporter's file through onnxruntime's dynamic quantizer."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    export_onnx(model, target, out)
    (plain,) = out.glob("*.onnx")
    program = onnx.load(plain)
    # The quantizer infers the shapes again, and refuses to where the exporter's own differ.
    del program.graph.value_info[:]
    onnx.save(program, plain)
    quantize_dynamic(
        plain,
        out / "int8.onnx",
        per_channel=True,
        weight_type=QuantType.QInt8,
        op_types_to_quantize=["MatMul", "Gemm", "Gather", "Conv"],
    )
    for file in [*out.glob(f"{plain.name}*")]:
        file.unlink()


def export_executorch_int8(model: Model, target: Target, out: Path) -> None:
    """torchao's 8-bit dynamic weights for transformers; PT2E with XNNPACK's quantizer for convolutions."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

    if model.huggingface:
        import executorch.kernels.quantized  # noqa: F401  # the embedding's kernel
        import torch
        from torchao.quantization import quantize_
        from torchao.quantization.granularity import PerAxis
        from torchao.quantization.quant_api import Int8DynamicActivationIntxWeightConfig, IntxWeightOnlyConfig

        def embedding(module: torch.nn.Module, _name: str) -> bool:
            return isinstance(module, torch.nn.Embedding)

        for layer in model.module.modules():
            if isinstance(layer, torch.nn.Embedding):
                layer.padding_idx = None
        quantize_(model.module, IntxWeightOnlyConfig(torch.int8, PerAxis(0)), embedding)
        quantize_(model.module, Int8DynamicActivationIntxWeightConfig(torch.int8, PerAxis(0)))
        export_executorch(model, target, out)
        return
    import executorch.backends.xnnpack.quantizer.xnnpack_quantizer as xnnpack
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    quantizer = xnnpack.XNNPACKQuantizer().set_global(xnnpack.get_symmetric_quantization_config(is_per_channel=True))
    prepared = prepare_pt2e(traced(model).module(), quantizer)
    prepared(**model.example)
    import torch

    program = torch.export.export(convert_pt2e(prepared), (), dict(model.example))
    config = EdgeCompileConfig(_check_ir_validity=False)
    edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()], compile_config=config)
    (out / "model.pte").write_bytes(edge.to_executorch().buffer)


def export_coreml_int8(model: Model, target: Target, out: Path) -> None:
    """The exporter's package through coremltools' weight quantizer."""
    import coremltools.optimize.coreml as optimize

    converted = converted_coreml(model, target)
    config = optimize.OptimizationConfig(global_config=optimize.OpLinearQuantizerConfig(mode="linear_symmetric"))
    optimize.linear_quantize_weights(converted, config).save(str(out / "model.mlpackage"))


EXPORTERS: dict[str, Callable[[Model, Target, Path], None]] = {
    "onnx": export_onnx,
    "executorch": export_executorch,
    "coreml": export_coreml,
}
INT8_EXPORTERS: dict[str, Callable[[Model, Target, Path], None]] = {
    "onnx": export_onnx_int8,
    "executorch": export_executorch_int8,
    "coreml": export_coreml_int8,
}


def convert_here(model_reference: str, backend: str, variant: str) -> Cost:
    """Load the model in this process and convert it once."""
    from edgeport.model.load import load_model
    from edgeport.storage import tree_size
    from edgeport.target import load_target
    from edgeport.usage import peak_mb

    target = load_target(BACKENDS[backend])
    model = load_model(model_reference)
    with tempfile.TemporaryDirectory(prefix="edgeport-bench-") as folder:
        out = Path(folder)
        cpu, wall = time.process_time(), time.perf_counter()
        if variant == "exporter":
            EXPORTERS[backend](model, target, out)
        elif variant == "exporter int8":
            INT8_EXPORTERS[backend](model, target, out)
        else:
            edgeport(model, target, variant.removeprefix("edgeport "), out)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        return Cost(cpu_s=cpu, wall_s=wall, peak_mb=peak_mb(), file_mb=tree_size(out) / 1e6)


def convert_apart(model: str, backend: str, variant: str) -> Cost:
    """`convert_here` in a fresh process."""
    command = [sys.executable, __file__, "--model", model, "--backend", backend, "--here", variant]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode != 0:
        raise SystemExit(f"{variant} for {backend} failed; its messages stand above.")
    return Cost(**json.loads(done.stdout.strip().splitlines()[-1]))


def median(costs: list[Cost]) -> Cost:
    """The median of each figure."""
    return Cost(**{name: statistics.median(asdict(cost)[name] for cost in costs) for name in asdict(costs[0])})


def ratios(cost: Cost, other: Cost) -> dict[str, float]:
    """A cost relative to another."""
    return {
        "cpu": cost.cpu_s / other.cpu_s,
        "wall": cost.wall_s / other.wall_s,
        "peak": cost.peak_mb / other.peak_mb,
    }


def compare(model: str, backend: str, repeats: int, recipes: list[str]) -> list[dict[str, Any]]:
    """Rows of the table: the exporter alone, then edgeport with each recipe and its ratios."""
    variants = ["exporter", "exporter int8", *(f"edgeport {recipe}" for recipe in recipes)]
    costs: dict[str, list[Cost]] = {variant: [] for variant in variants}
    for repeat in range(repeats):
        # The order turns round each time, so that no variant always comes first.
        for variant in variants if repeat % 2 == 0 else reversed(variants):
            costs[variant].append(convert_apart(model, backend, variant))
            print(f"{model} {backend} {variant}: {costs[variant][-1]}", file=sys.stderr, flush=True)
    alone = median(costs["exporter"])
    rows = []
    for variant in variants:
        cost = median(costs[variant])
        quantizes = variant not in ("exporter", "edgeport fp32", "edgeport fp16")
        rows.append(
            {
                "model": model,
                "backend": backend,
                "variant": variant,
                **asdict(cost),
                "ratio": ratios(cost, alone),
                "ratio_to_like": ratios(cost, median(costs["exporter int8"]) if quantizes else alone),
            }
        )
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", help="a model reference; zoo:minilm when left out")
    parser.add_argument("--backend", action="append", choices=sorted(BACKENDS), help="all three when left out")
    parser.add_argument("--recipe", action="append", help="fp32 (fp16 for Core ML) and int8 when left out")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output")
    parser.add_argument("--here", help=argparse.SUPPRESS)
    options = parser.parse_args()
    models, backends = options.model or ["zoo:minilm"], options.backend or list(BACKENDS)
    if options.here:
        print("\n" + json.dumps(asdict(convert_here(models[0], backends[0], options.here))))
        return
    rows = []
    for model in models:
        for backend in backends:
            recipes = options.recipe or ["fp16" if backend == "coreml" else "fp32", "int8"]
            rows += compare(model, backend, options.repeats, recipes)
    if options.json:
        print(json.dumps({"goal": GOAL, "repeats": options.repeats, "rows": rows}, indent=2))
        return
    print("Ratios are to the exporter that makes the same precision, and in brackets to the plain exporter.\n")
    print("| model | backend | variant | CPU s | wall s | peak MB | file MB | CPU ratio | peak ratio |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['model']} | {row['backend']} | {row['variant']} | {row['cpu_s']:.1f} | {row['wall_s']:.1f} "
            f"| {row['peak_mb']:.0f} | {row['file_mb']:.1f} "
            f"| {row['ratio_to_like']['cpu']:.2f} ({row['ratio']['cpu']:.2f}) "
            f"| {row['ratio_to_like']['peak']:.2f} ({row['ratio']['peak']:.2f}) |"
        )


if __name__ == "__main__":
    main()
