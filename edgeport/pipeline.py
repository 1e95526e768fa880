"""The one place that says the order of things.

load -> reference -> compress -> scales -> lower -> baseline -> validate -> gate -> bundle. Every stage's output is kept
under the hash of its inputs, so a killed run resumes where it was and a repeated run is quick.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeport import suites
from edgeport.job import ExportRequest, Job
from edgeport.making import (
    compression_cost,
    make_compressed,
    make_lowered,
    make_reference,
    restructuring_steps,
    with_scales,
)
from edgeport.measuring import make_measured
from edgeport.planning import check_resources, make_plan
from edgeport.prepare import prepare
from edgeport.progress import Progress, Silent
from edgeport.storage import read_json

if TYPE_CHECKING:
    from edgeport.model.types import Model
    from edgeport.plan import Plan
    from edgeport.validate.evidence import Verdict


@dataclass(frozen=True)
class ExportResult:
    """What came out: the bundle's folder, its two documents, and the gate's answer."""

    bundle: Path
    manifest: Mapping[str, Any]
    evidence: Mapping[str, Any]
    verdict: Verdict
    exit_code: int
    seconds: float


def plan(request: ExportRequest, progress: Progress | None = None) -> Plan:
    """What `export` would do, without doing it.

    Raises:
        BadInputError, TargetRefusesError: what `export` would refuse.
    """
    from edgeport.bundle.write import check_destination

    check_destination(request.output, force=request.force)
    return make_plan(prepare(request, progress or Silent()))


def export(request: ExportRequest, progress: Progress | None = None) -> ExportResult:
    """Run the whole pipeline and write the bundle. The bundle is written even when the gate fails.

    Raises:
        BadInputError: something the user gave can't be used (exit 2).
        TargetRefusesError: the target can't take it (exit 3).
        MeasurementError: a measurement could not be made (exit 15).
    """
    from edgeport.bundle.golden import MOST_SAMPLES, Golden
    from edgeport.bundle.write import Contents, check_destination, write_bundle
    from edgeport.compress.apply import check_finite
    from edgeport.device_memory import check_fits, planned_by
    from edgeport.gate import conclude
    from edgeport.report import render_report
    from edgeport.stages import toolchain_versions
    from edgeport.validate.evidence import CompressionCost, Measurements
    from edgeport.vectors import load_vectors

    started = time.monotonic()
    progress = progress or Silent()
    check_destination(request.output, force=request.force)
    job = prepare(request, progress)
    check_finite(job.model.module)
    suites.check(job)
    planned = make_plan(job)
    check_resources(planned)
    for warning in planned.warnings:
        progress.message(warning)

    reference = make_reference(job, progress)
    model, layers, calibration = make_compressed(job, progress)
    model = with_scales(job, model, progress)
    artifact = make_lowered("lower", job.lower_key, model, job, job.settings, progress)
    device = planned_by(planned.memory, artifact)
    check_fits(device, request.target)
    baseline = make_lowered("baseline", job.baseline_key, job.baseline_model, job, job.baseline_settings, progress)
    measured = make_measured(job, artifact, baseline, model, reference, planned.predicted_bytes, progress)

    tasks = suites.ask(job, artifact, calibration, progress)

    progress.stage("bundle", str(request.output))
    measurements = Measurements(**read_json(measured / "measurements.json"))
    measurements = measurements.model_copy(update={"memory_plan": device, "tasks": tasks})
    cost = compression_cost(job)
    if cost is not None:
        measurements = measurements.model_copy(update={"compression": CompressionCost(**asdict(cost))})
    own = measured / "outputs.safetensors"
    vectors = measured / "tokenizer.json"
    contents = Contents(
        model=job.model,
        recipe=request.recipe,
        target=request.target,
        settings=job.settings,
        artifact=artifact,
        layers=layers,
        calibration=calibration,
        steps=restructuring_steps(job),
        golden=Golden(
            inputs=tuple(load_vectors(reference / "inputs.safetensors")[:MOST_SAMPLES]),
            outputs=tuple(load_vectors(reference / "outputs.safetensors")[:MOST_SAMPLES]),
            artifact_outputs=tuple(load_vectors(own)) if own.is_file() else (),
        ),
        evidence=conclude(measurements, request.recipe.gate),
        toolchain=toolchain_versions(),
        tokenizer=read_json(vectors) if vectors.is_file() else None,
        generation=_generation(job, model),
    )
    write_bundle(request.output, contents, render=render_report, force=request.force)
    return _result(request.output, contents.evidence.verdict, time.monotonic() - started)


def _generation(job: Job, model: Model) -> dict[str, str]:
    """Settings of the generation library that belongs to the runtime, as files beside the tokenizer."""
    if model.decoder is None or model.decoder.cross or job.request.target.runtime != "onnxruntime":
        return {}
    from edgeport.export.onnx.genai import GENAI_CONFIG, genai_config
    from edgeport.export.onnx.save import FILE
    from edgeport.model.decoder import end_tokens

    options = job.request.target.onnxruntime
    grows = options is not None and options.attention == "standard"
    text = genai_config(model, FILE, end_tokens(model), grows=grows)
    return {} if text is None else {GENAI_CONFIG: text}


def _result(bundle: Path, verdict: Verdict, seconds: float) -> ExportResult:
    manifest, evidence = (json.loads((bundle / name).read_text()) for name in ("manifest.json", "evidence.json"))
    return ExportResult(bundle, manifest, evidence, verdict, verdict.exit_code, seconds)
