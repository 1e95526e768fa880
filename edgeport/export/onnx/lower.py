"""Lower a Model to an ONNX file for ONNX Runtime."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from edgeport.errors import BadInputError
from edgeport.export.artifact import Artifact, LoweringSettings
from edgeport.export.onnx.attention import write_attention
from edgeport.export.onnx.canonical import canonicalize
from edgeport.export.onnx.decoder import cache_specs, file_model, spec_bytes, windows_of
from edgeport.export.onnx.finish import file_specs, finish, fuse, store_float16
from edgeport.export.onnx.native import write_weights
from edgeport.export.onnx.ort_format import write_ort_format
from edgeport.export.onnx.projections import initializer_names, join_projections
from edgeport.export.onnx.save import FILE, save
from edgeport.export.onnx.standard import write_standard_attention
from edgeport.export.onnx.trace import trace
from edgeport.model.types import Model
from edgeport.target import Target


def _facts(program: ir.Model, settings: LoweringSettings) -> dict[str, Any]:
    operators = Counter(
        node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}"
        for node in program.graph.all_nodes()
    )
    return {
        "opset": program.opset_imports[""],
        "ir_version": program.ir_version,
        "nodes": sum(operators.values()),
        "operators": dict(sorted(operators.items())),
        "exporter": f"torch.onnx, onnx {onnx.__version__}",
        "precision": settings.precision,
    }


def lower(model: Model, target: Target, settings: LoweringSettings, out: Path) -> Artifact:
    """Write `model.onnx` (and `model.ort` when asked) into the existing empty folder `out`.

    The file's inputs and outputs have the model's names and stay float32 whatever the precision. With
    dynamic shapes each `Axis` is a symbolic dimension of its name; with fixed shapes it has its example size.

    Raises:
        TargetRefusesError: an operator or a weight format that ONNX Runtime can't take, named.
        BadInputError: the target has no ONNX Runtime options, or the model lacks a promised output.
    """
    options = target.onnxruntime
    if options is None:
        raise BadInputError(f"The target {target.name!r} does not run ONNX Runtime.", where="[onnxruntime]")
    standard = options.attention == "standard" and model.decoder is not None
    if standard and model.decoder is not None:
        model = replace(model, decoder=replace(model.decoder, forgets=False))
    program = trace(model, settings, options.opset)
    unused = canonicalize(program, list(model.quantized))
    decoder = model.decoder
    if decoder is not None:
        (write_standard_attention if standard else write_attention)(program, decoder)
        model = file_model(model)
    if not standard:
        fuse(program, decoder=decoder is not None)
    floats = list(program.graph.initializers)
    stored = write_weights(program, model.quantized, model.activations, model.ranges)
    stored = join_projections(program, stored)
    halves = store_float16(program, floats) if settings.precision == "fp16" else 0
    finish(program, model)
    save(program, out)
    facts = _facts(program, settings)
    if unused:
        facts["unused_weights"] = unused
    if halves:
        facts["arithmetic"] = "float32; weights are stored in float16 and widened when the file is loaded"
    if standard:
        facts["attention"] = "standard"
    if decoder is not None:
        facts["cache_bytes"] = sum(spec_bytes(spec) for spec in cache_specs(decoder)[0])
        if windows := windows_of(decoder):
            facts["windows"] = windows
    if settings.ort_format:
        facts["ort_format"] = write_ort_format(program, initializer_names(stored), out)
    return Artifact(
        runtime="onnxruntime",
        delegate="cpu",
        root=out,
        entry=FILE,
        inputs=file_specs(list(program.graph.inputs), model.inputs),
        outputs=file_specs(list(program.graph.outputs), model.outputs),
        weights=stored,
        facts=facts,
        context=None if model.decoder is None else model.decoder.context,
    )
