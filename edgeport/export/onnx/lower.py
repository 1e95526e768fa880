"""Lower a Model to an ONNX file for ONNX Runtime."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from edgeport.errors import BadInputError
from edgeport.export.artifact import Artifact, EncoderPart, LoweringSettings
from edgeport.export.onnx.attention import write_attention
from edgeport.export.onnx.canonical import canonicalize
from edgeport.export.onnx.decoder import PAST, file_model, spec_bytes, windows_of
from edgeport.export.onnx.finish import file_specs, finish, fuse, store_float16
from edgeport.export.onnx.native import write_weights
from edgeport.export.onnx.ort_format import write_ort_format
from edgeport.export.onnx.projections import initializer_names, join_projections
from edgeport.export.onnx.save import FILE, save
from edgeport.export.onnx.standard import write_standard_attention
from edgeport.export.onnx.trace import trace, trace_decoder
from edgeport.model.types import Decoder, Model
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

    An encoder-decoder with a cache becomes two files, `encoder.onnx` and `decoder.onnx`.

    The file's inputs and outputs have the model's names and stay float32 whatever the precision. With
    dynamic shapes each `Axis` is a symbolic dimension of its name; with fixed shapes it has its example size.

    Raises:
        TargetRefusesError: an operator or a weight format that ONNX Runtime can't take, named.
        BadInputError: the target has no ONNX Runtime options, or the model lacks a promised output.
    """
    options = target.onnxruntime
    if options is None:
        raise BadInputError(f"The target {target.name!r} does not run ONNX Runtime.", where="[onnxruntime]")
    standard = options.attention == "standard"
    if model.decoder is not None and model.decoder.cross:
        return _lower_both(model, settings, options.opset, out)
    if standard and model.decoder is not None:
        model = replace(model, decoder=replace(model.decoder, forgets=False))
    program = trace(model, settings, options.opset)
    files = model if model.decoder is None else file_model(model)
    return _write(program, files, settings, out, FILE, decoder=model.decoder, standard=standard)


def _lower_both(model: Model, settings: LoweringSettings, opset: int, out: Path) -> Artifact:
    """An encoder and its decoder as two files."""
    from edgeport.export.onnx import encoder_decoder as both

    files = both.encoder_file(model)
    program = trace_decoder(model, files, both.export_encoder, opset)
    encoder = _write(program, files, settings, out, both.ENCODER_FILE)
    files = both.decoder_file(model)
    program = trace_decoder(model, files, both.export_decoder, opset)
    decoder = _write(program, files, settings, out, both.DECODER_FILE, decoder=model.decoder)
    places = {name: [place] for name, place in decoder.weights.items()}
    for name, place in encoder.weights.items():
        places.setdefault(name, []).append(f"{both.ENCODER_FILE}:{place}")
    facts = {**decoder.facts, "encoder": encoder.facts}
    facts.pop("unused_weights", None)
    if unused := sorted(set(model.quantized) - set(places)):
        facts["unused_weights"] = unused
    assert model.decoder is not None
    return replace(
        decoder,
        weights={name: " + ".join(places[name]) for name in model.quantized if name in places},
        facts=facts,
        encoder=EncoderPart(encoder.entry, encoder.inputs, encoder.outputs, model.decoder.start),
    )


def _write(
    program: ir.Model,
    files: Model,
    settings: LoweringSettings,
    out: Path,
    file_name: str,
    *,
    decoder: Decoder | None = None,
    standard: bool = False,
) -> Artifact:
    """Write a traced graph as one file.

    Args:
        files: the model with the inputs and outputs that the file has.
        decoder: the cache, where the graph has one.
        standard: write attention over it in operators of the ONNX standard alone.
    """
    standard = standard and decoder is not None
    unused = canonicalize(program, list(files.quantized))
    if decoder is not None:
        (write_standard_attention if standard else write_attention)(program, decoder)
    if not standard:
        fuse(program, decoder=decoder is not None)
    floats = list(program.graph.initializers)
    stored = write_weights(program, files.quantized, files.activations, files.ranges)
    stored = join_projections(program, stored)
    halves = store_float16(program, floats) if settings.precision == "fp16" else 0
    finish(program, files)
    save(program, out, file_name)
    facts = _facts(program, settings)
    if unused:
        facts["unused_weights"] = unused
    if halves:
        facts["arithmetic"] = "float32; weights are stored in float16 and widened when the file is loaded"
    if standard:
        facts["attention"] = "standard"
    if decoder is not None:
        facts["cache_bytes"] = sum(spec_bytes(spec) for spec in files.inputs if spec.name.startswith(PAST))
        if windows := windows_of(decoder):
            facts["windows"] = windows
    if settings.ort_format:
        facts["ort_format"] = write_ort_format(program, initializer_names(stored), out, file_name)
    return Artifact(
        runtime="onnxruntime",
        delegate="cpu",
        root=out,
        entry=file_name,
        inputs=file_specs(list(program.graph.inputs), files.inputs),
        outputs=file_specs(list(program.graph.outputs), files.outputs),
        weights=stored,
        facts=facts,
        context=None if decoder is None else decoder.context,
    )
