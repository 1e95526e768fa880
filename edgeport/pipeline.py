"""The one place that says the order of things.

load -> reference -> compress -> scales -> lower -> baseline -> validate -> gate -> bundle. Every stage's output is kept
under the hash of its inputs, so a killed run resumes where it was and a repeated run is quick.
"""

from __future__ import annotations

import gc
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeport import suites
from edgeport.job import ExportRequest, Job, Progress, Silent, StageName, check_resources, make_plan, prepare
from edgeport.storage import cache_root, canonical_json, hash_file, read_json

if TYPE_CHECKING:
    import numpy as np

    from edgeport.compress import LayerRecord
    from edgeport.compress.cost import Cost
    from edgeport.compress.restructure import StepRecord
    from edgeport.data.samples import SampleRecord, Samples
    from edgeport.export.artifact import Artifact, LoweringSettings
    from edgeport.model.types import Model
    from edgeport.plan import Plan
    from edgeport.validate.evidence import (
        DataRecord,
        FreeText,
        Measurements,
        Products,
        TokenizerParity,
        Verdict,
        Work,
    )

__all__ = ["ExportRequest", "ExportResult", "Progress", "export", "plan", "validate_bundle"]


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


def make_reference(job: Job, progress: Progress) -> Path:
    """Real inputs and the uncompressed torch model's outputs on them: inputs, outputs, record.json."""
    from edgeport.data.samples import samples
    from edgeport.runtime.torch import TorchSession
    from edgeport.stages import run_stage
    from edgeport.vectors import save_vectors

    def make(out: Path) -> None:
        inputs = []
        lengths = job.sequences or (None,)
        for index, length in enumerate(lengths):
            share = job.sample_count // len(lengths) + (index < job.sample_count % len(lengths))
            found = samples(job.model, count=share, split="parity", sequence=length)
            inputs.extend(found.inputs)
            record = found.record
        session = TorchSession(job.model)
        outputs = []
        for index, call in enumerate(inputs):
            outputs.append(session.run(call))
            progress.update(index + 1, len(inputs), "torch, float32")
        save_vectors(out / "inputs.safetensors", inputs)
        save_vectors(out / "outputs.safetensors", outputs)
        (out / "record.json").write_text(canonical_json({**asdict(record), "samples": len(inputs)}))

    if job.compressed is not None:
        progress.stage("reference", "stored with the compressed model")
        stored = job.compressed.reference
        if job.model.decoder is None:
            return stored
        names = [spec.name for spec in job.model.inputs]
        return run_stage(
            "reference", job.reference_key, lambda out: _last_scores(stored, names, out), report=progress.message
        )
    progress.stage("reference", f"{job.sample_count} inputs")
    return run_stage("reference", job.reference_key, make, report=progress.message)


def _calibration(job: Job, progress: Progress) -> Samples:
    """What the recipe's methods tune on. Texts that the model writes are kept: every recipe and target can use them."""
    from edgeport.compress.calibrate import calibration_samples, check_enough
    from edgeport.data.generated import generated_samples
    from edgeport.data.samples import SampleRecord, Samples
    from edgeport.stages import run_stage, stage_key
    from edgeport.vectors import load_vectors, save_vectors

    asked = job.request.recipe.calibration
    if asked.source == "data":
        return calibration_samples(job.uncached, job.request.recipe)

    def make(out: Path) -> None:
        written = generated_samples(job.uncached, count=asked.samples, progress=progress.update)
        save_vectors(out / "inputs.safetensors", written.inputs)
        (out / "record.json").write_text(canonical_json(asdict(written.record)))

    key = stage_key("generated", {"model": job.uncached_key, "samples": asked.samples})
    folder = run_stage("generated", key, make, report=progress.message)
    found = Samples(load_vectors(folder / "inputs.safetensors"), SampleRecord(**read_json(folder / "record.json")))
    check_enough(found)
    return found


def _last_scores(stored: Path, names: list[str], out: Path) -> None:
    """What was stored of whole texts, as a decoder with a cache is compared: without masks, and the last positions."""
    from edgeport.model.types import SCORED
    from edgeport.vectors import load_vectors, save_vectors

    inputs, outputs = (load_vectors(stored / name) for name in ("inputs.safetensors", "outputs.safetensors"))
    save_vectors(out / "inputs.safetensors", [{name: call[name] for name in names} for call in inputs])
    save_vectors(out / "outputs.safetensors", [{"logits": call["logits"][:, -SCORED:]} for call in outputs])
    (out / "record.json").write_bytes((stored / "record.json").read_bytes())


def make_restructured(job: Job, progress: Progress) -> Model:
    """The model (without a cache) as the recipe's pruning, factorizing and the like leave it."""
    from edgeport.compress.calibrate import as_tensors
    from edgeport.compress.cuts import load_restructured, save_restructured
    from edgeport.compress.distill.data import training_samples
    from edgeport.compress.distill.lessons import Lessons
    from edgeport.compress.restructure import restructure
    from edgeport.restructuring import needs_data
    from edgeport.stages import run_stage

    recipe = job.request.recipe
    if job.shaped is None:
        return job.uncached
    checkpoints = cache_root() / "trainings" / job.restructure_key
    lessons = Lessons(
        teachers=job.teachers,
        samples=lambda student, teacher, step: training_samples(student, teacher, step, progress=progress.update),
        checkpoints=checkpoints,
        progress=lambda done, steps, loss: progress.update(done, steps, f"training, loss {loss:.4g}"),
    )

    def make(out: Path) -> None:
        wanted = any(needs_data(step) for step in recipe.restructure)
        inputs = as_tensors(job.uncached, _calibration(job, progress)) if wanted else []
        made = restructure(job.uncached, recipe, inputs, whole=job.whole, lessons=lessons, log=progress.message)
        save_restructured(out, job.uncached, made)

    progress.stage("restructure", ", ".join(step.method for step in recipe.restructure))
    folder = run_stage("restructure", job.restructure_key, make, report=progress.message)
    shutil.rmtree(checkpoints, ignore_errors=True)
    return load_restructured(folder, job.uncached).model


def restructuring_steps(job: Job) -> tuple[StepRecord, ...]:
    """What `make_restructured` did, in this run or one before; what is on record of a model that came compressed."""
    from edgeport.compress.cuts import load_steps
    from edgeport.stages import stored

    if job.compressed is not None:
        return job.compressed.steps
    return () if job.shaped is None else load_steps(stored("restructure", job.restructure_key))


def make_compressed(job: Job, progress: Progress) -> tuple[Model, tuple[LayerRecord, ...], SampleRecord | None]:
    """The compressed model, what happened to each layer, and what methods were tuned on."""
    from edgeport.compress import apply_recipe
    from edgeport.compress.cost import cost_of, save_cost
    from edgeport.compress.journal import Journal
    from edgeport.compress.saved import load_calibration, load_compressed, load_records, save_compressed
    from edgeport.stages import run_stage
    from edgeport.usage import Meter

    if job.compressed is not None:
        progress.stage("compress", f"{job.request.recipe.name}, done before")
        return job.model, job.compressed.layers, job.compressed.calibration

    request = job.request
    meter = Meter()
    restructured = make_restructured(job, progress)

    def make(out: Path) -> None:
        tuned = _calibration(job, progress) if request.recipe.calibrates else None
        journal = Journal(cache_root() / "journals" / job.compress_key)
        before = journal.finished()
        model, records = apply_recipe(
            restructured,
            request.recipe,
            request.target,
            calibration=tuned,
            progress=progress.update,
            log=progress.message,
            journal=journal,
            training=lambda done, steps, loss: progress.update(done, steps, f"training, loss {loss:.4g}"),
        )
        save_cost(out, cost_of(meter.read(), model, tuned, weights_before=before))
        save_compressed(out, restructured, model, records, None if tuned is None else tuned.record)
        journal.close()

    progress.stage("compress", request.recipe.name)
    folder = run_stage("compress", job.compress_key, make, report=progress.message)
    base = job.model if job.shaped is None else job.as_lowered(restructured)
    return load_compressed(folder, base, job.assignments), load_records(folder), load_calibration(folder)


def with_scales(job: Job, model: Model, progress: Progress) -> Model:
    """The model with the steps to which its cache rounds keys and values, where the runtime takes fixed ones."""
    from dataclasses import replace

    from edgeport.compress.cache import cache_scales, load_scales, save_scales
    from edgeport.compress.calibrate import as_tensors
    from edgeport.stages import run_stage

    decoder = model.decoder
    if job.scales_key is None or decoder is None:
        return model

    def make(out: Path) -> None:
        found = as_tensors(job.uncached, _calibration(job, progress))
        texts = [call["input_ids"][:1] for call in found]
        save_scales(
            out / "scales.safetensors",
            cache_scales(model, texts, decoder.cache, progress=lambda done, total: progress.update(done, total, "")),
        )

    progress.stage("scales", f"keys and values in {decoder.cache}")
    folder = run_stage("scales", job.scales_key, make, report=progress.message)
    return replace(model, decoder=replace(decoder, scales=load_scales(folder / "scales.safetensors", decoder)))


def compression_cost(job: Job) -> Cost | None:
    """What the job's compression took when `make_compressed` made it, in this run or one before; None where it
    compresses nothing or the model came compressed."""
    from edgeport.compress.cost import load_cost
    from edgeport.stages import stored

    if job.compressed is not None or not job.compresses:
        return None
    return load_cost(stored("compress", job.compress_key))


def _data(job: Job, reference: Path) -> DataRecord:
    """The inputs that evidence is measured on."""
    from edgeport.validate.evidence import DataRecord

    record = DataRecord(**read_json(reference / "record.json"))
    if job.compressed is None:
        return record
    words = f"{record.slice}; the uncompressed model's outputs were stored when it was compressed"
    return record.model_copy(update={"slice": words})


def _lower(
    name: StageName, key: str, model: Model, job: Job, settings: LoweringSettings, progress: Progress
) -> Artifact:
    """The artifact of a model in the store."""
    from edgeport.export.artifact import Artifact
    from edgeport.export.dispatch import lower
    from edgeport.stages import run_stage

    def make(out: Path) -> None:
        files = out / "files"
        files.mkdir()
        artifact = lower(model, job.request.target, settings, files)
        # The exporters' graphs hold the weights and each other: without this they live on through the measurement.
        gc.collect()
        (out / "artifact.json").write_text(canonical_json(artifact.to_json()))

    progress.stage(name, f"{job.request.target.runtime}, {settings.precision}")
    folder = run_stage("lower", key, make, report=progress.message)
    return Artifact.from_json(read_json(folder / "artifact.json"), folder / "files")


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


def _tokenizers(job: Job, out: Path) -> tuple[TokenizerParity, ...]:
    """What device tokenizers make of the assets as a bundle holds them; the expected ids are kept in tokenizer.json."""
    import tempfile

    from edgeport.bundle.write import write_assets
    from edgeport.data.strings import CONVERSATIONS, STRINGS
    from edgeport.validate.tokenizer import replay, tokenizer_vectors

    assets = job.model.assets
    # A speech model's tokenizer makes no tokens of texts.
    if "tokenizer.json" not in assets or job.model.modality != "text":
        return ()
    with tempfile.TemporaryDirectory() as folder:
        original, shipped = Path(folder) / "original", Path(folder) / "shipped"
        original.mkdir()
        for name, path in assets.items():
            shutil.copyfile(path, original / name)
        vectors = tokenizer_vectors(original, STRINGS, CONVERSATIONS)
        write_assets(assets, shipped)
        (out / "tokenizer.json").write_text(canonical_json(vectors))
        return replay(vectors, shipped, job.request.target.runtime)


def _work(
    job: Job, artifact: Artifact, model: Model, inputs: Sequence[Mapping[str, np.ndarray]], measured: Measurements
) -> Work:
    """Operations and bytes of one inference at the shapes that latency was timed with."""
    from edgeport.plan import packed_bytes
    from edgeport.validate.run import Effort, largest
    from edgeport.validate.size import model_bytes
    from edgeport.validate.work import count_work, machine_limits

    half = job.settings.precision == "fp16"
    tables = {
        item.name: packed_bytes(item) // (2 if half and not item.format.quantized else 1)
        for item in job.assignments
        if item.kinds == ("embedding",)
    }
    work = count_work(model, largest(inputs), file_bytes=model_bytes(artifact), stored=tables)
    if measured.latency is None:
        return work
    peak, bandwidth = machine_limits(Effort().threads)
    return work.model_copy(update={"peak_gflops": peak, "bandwidth_gb_s": bandwidth})


def _products(
    job: Job, artifact: Artifact, model: Model, inputs: Sequence[Mapping[str, np.ndarray]]
) -> Products | None:
    """Operations of the products with weights, in the file and in the model; None where the file can't be run here."""
    from edgeport.validate.products import count_products
    from edgeport.validate.run import largest

    return None if job.request.target.execution.here == "none" else count_products(artifact, model, largest(inputs))


def _free_text(
    job: Job, artifact: Artifact, inputs: Sequence[Mapping[str, np.ndarray]], progress: Progress
) -> FreeText | None:
    """What an encoder-decoder writes by itself beside the original, where that is at hand."""
    from edgeport.data.samples import prompt_tokens
    from edgeport.model.tokenizer import end_tokens
    from edgeport.runtime.session import open_encoded
    from edgeport.validate.free_text import MOST, compare_texts, original_text

    model = job.uncached
    if artifact.encoder is None or job.compressed is not None or job.request.target.execution.here == "none":
        return None
    progress.update(len(inputs), len(inputs), "texts of its own")
    settings = model.assets.get("generation_config.json")
    stop = end_tokens(settings, getattr(model.module.config, "eos_token_id", None))
    named = {} if settings is None else read_json(settings)
    rules = {name: named[name] for name in ("suppress_tokens", "begin_suppress_tokens") if named.get(name)}
    start = prompt_tokens(model) or artifact.encoder.start
    tokens = open_encoded(artifact)
    most = min(MOST, tokens.context - len(start))
    return compare_texts(
        tokens,
        [sample[model.inputs[0].name] for sample in inputs],
        lambda source: original_text(model.module, source, start, stop, rules, most),
        start=start,
        stop=stop,
        never=rules.get("suppress_tokens", ()),
        never_first=rules.get("begin_suppress_tokens", ()),
        most=most,
    )


def _measure(
    job: Job,
    artifact: Artifact,
    baseline: Artifact,
    model: Model,
    reference: Path,
    predicted_bytes: int,
    progress: Progress,
) -> Path:
    """The measurements of an artifact: measurements.json, and its own outputs on the first samples."""
    from edgeport.bundle.golden import MOST_SAMPLES
    from edgeport.runtime.session import open_session
    from edgeport.stages import run_stage
    from edgeport.validate.generation import full_cache, measure_generation
    from edgeport.validate.run import effort_of, measure
    from edgeport.vectors import load_vectors, save_vectors

    def make(out: Path) -> None:
        inputs = load_vectors(reference / "inputs.safetensors")
        measurements = measure(
            artifact,
            samples=inputs,
            reference=load_vectors(reference / "outputs.safetensors"),
            task=model.task,
            execution=job.request.target.execution,
            logical=model.quantized,
            data=_data(job, reference),
            baseline=baseline,
            predicted_bytes=predicted_bytes,
            memory_inputs=None if artifact.context is None else full_cache(inputs, artifact.context),
            effort=effort_of(quick=job.request.quick, full=job.request.full or job.request.recipe.gate.times),
            watch=progress.update,
        )
        # What a token beside an encoder reads is not counted: the encoder's part of the files is not read again.
        if model.decoder is None or not model.decoder.cross:
            counted = {
                "work": _work(job, artifact, model, inputs, measurements),
                "products": _products(job, artifact, model, inputs),
            }
            measurements = measurements.model_copy(update=counted)
        if model.decoder is not None:
            generation = measure_generation(
                artifact,
                inputs,
                cache=model.decoder.cache,
                quick=job.request.quick,
                watch=lambda detail: progress.update(len(inputs), len(inputs), detail),
            )
            generation = generation.model_copy(update={"free_text": _free_text(job, artifact, inputs, progress)})
            added = {"tokenizers": _tokenizers(job, out), "generation": generation}
            measurements = measurements.model_copy(update=added)
        (out / "measurements.json").write_text(canonical_json(measurements.model_dump(mode="json")))
        if job.request.target.execution.here != "none":
            session = open_session(artifact)
            save_vectors(out / "outputs.safetensors", [session.run(call) for call in inputs[:MOST_SAMPLES]])

    progress.stage("validate", job.request.target.execution.statement)
    return run_stage("validate", job.validate_key, make, report=progress.message)


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
    artifact = _lower("lower", job.lower_key, model, job, job.settings, progress)
    device = planned_by(planned.memory, artifact)
    check_fits(device, request.target)
    baseline = _lower("baseline", job.baseline_key, job.baseline_model, job, job.baseline_settings, progress)
    measured = _measure(job, artifact, baseline, model, reference, planned.predicted_bytes, progress)

    tasks = suites.ask(job, artifact, None if calibration is None else calibration.name, progress)

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


def validate_bundle(
    bundle: Path,
    *,
    names: Sequence[str] = (),
    original: str | None = None,
    quick: bool = False,
    full: bool = False,
    progress: Progress | None = None,
) -> ExportResult:
    """Measure a bundle again on this machine, from what it carries: its files, golden vectors and hashes.

    The fp32 artifact is not in the bundle, so no ratio to its latency can be measured; its size is known from the
    evidence of the export.

    Args:
        names: suites to run beside those that the recipe has budgets on.
        original: the model that the bundle was made of, for the suites; of the zoo it need not be named.
        quick: a short latency run, flagged not valid; full: one that is valid by MLPerf's measure, as a recipe
            with a latency budget asks for anyway.

    Raises:
        BadInputError: the folder is no bundle, or a file of it is missing, changed or added.
    """
    from edgeport.bundle.golden import TOKENIZER
    from edgeport.bundle.manifest import GOLDEN_FOLDER
    from edgeport.bundle.read import read_bundle, verify_files
    from edgeport.bundle.write import MANIFEST
    from edgeport.gate import conclude
    from edgeport.validate.generation import full_cache, measure_generation
    from edgeport.validate.run import effort_of, measure
    from edgeport.validate.tokenizer import replay

    started = time.monotonic()
    progress = progress or Silent()
    found = read_bundle(bundle)
    manifest = found.manifest
    verify_files(found)
    progress.stage("validate", manifest.target.execution.statement)
    golden = found.golden()
    data = manifest.data.model_copy(
        update={"samples": len(golden.inputs), "slice": f"the bundle's golden vectors, from: {manifest.data.slice}"}
    )
    measurements = measure(
        found.artifact,
        samples=golden.inputs,
        reference=golden.outputs,
        task=manifest.task,
        execution=manifest.target.execution,
        logical={layer.name: layer.sha256 for layer in manifest.layers if layer.sha256 is not None},
        data=data,
        baseline_bytes=None if found.evidence is None else found.evidence.size.baseline_bytes,
        memory_inputs=None if manifest.context is None else full_cache(golden.inputs, manifest.context),
        effort=effort_of(quick=quick, full=full or manifest.recipe.gate.times),
        manifest_sha256=hash_file(bundle / MANIFEST),
        watch=progress.update,
    )
    if (vectors := bundle / GOLDEN_FOLDER / TOKENIZER).is_file():
        found_tokenizers = replay(read_json(vectors), bundle / manifest.assets, manifest.runtime)
        measurements = measurements.model_copy(update={"tokenizers": found_tokenizers})
    if manifest.context is not None and manifest.target.execution.here != "none":
        generation = measure_generation(
            found.artifact,
            golden.inputs,
            cache=manifest.settings.kv_cache,
            quick=quick,
            watch=lambda detail: progress.update(len(golden.inputs), len(golden.inputs), detail),
        )
        measurements = measurements.model_copy(update={"generation": generation})
    if found.evidence is not None:
        measurements = measurements.model_copy(update={"memory_plan": found.evidence.memory_plan})
    tasks = suites.ask_bundle(found, names, original, quick=quick, progress=progress)
    evidence = conclude(measurements.model_copy(update={"tasks": tasks}), manifest.recipe.gate)
    return ExportResult(
        bundle=bundle,
        manifest=manifest.to_json(),
        evidence=evidence.model_dump(mode="json"),
        verdict=evidence.verdict,
        exit_code=evidence.verdict.exit_code,
        seconds=time.monotonic() - started,
    )


def _result(bundle: Path, verdict: Verdict, seconds: float) -> ExportResult:
    manifest, evidence = (json.loads((bundle / name).read_text()) for name in ("manifest.json", "evidence.json"))
    return ExportResult(bundle, manifest, evidence, verdict, verdict.exit_code, seconds)
