"""The stages that make something: reference, restructure, compress, scales, lower. Each is kept by its inputs' hash."""

from __future__ import annotations

import gc
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from edgeport.job import Job, StageName
from edgeport.progress import Progress
from edgeport.reference import write_reference
from edgeport.storage import cache_root, canonical_json, read_json

if TYPE_CHECKING:
    from edgeport.compress import LayerRecord
    from edgeport.compress.cost import Cost
    from edgeport.compress.restructure import StepRecord
    from edgeport.data.samples import SampleRecord, Samples
    from edgeport.export.artifact import Artifact, LoweringSettings
    from edgeport.model.types import Model


def make_reference(job: Job, progress: Progress) -> Path:
    """Real inputs and the uncompressed torch model's outputs on them: inputs, outputs, record.json."""
    from edgeport.data.samples import samples
    from edgeport.stages import run_stage

    def make(out: Path) -> None:
        inputs = []
        lengths = job.sequences or (None,)
        for index, length in enumerate(lengths):
            share = job.sample_count // len(lengths) + (index < job.sample_count % len(lengths))
            found = samples(job.model, count=share, split="parity", sequence=length)
            inputs.extend(found.inputs)
            record = found.record
        write_reference(out, job.model, inputs, record, progress)

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


def _last_scores(stored: Path, names: list[str], out: Path) -> None:
    """What was stored of whole texts, as a decoder with a cache is compared: without masks, and the last positions."""
    from edgeport.model.types import SCORED
    from edgeport.vectors import load_vectors, save_vectors

    inputs, outputs = (load_vectors(stored / name) for name in ("inputs.safetensors", "outputs.safetensors"))
    save_vectors(out / "inputs.safetensors", [{name: call[name] for name in names} for call in inputs])
    save_vectors(out / "outputs.safetensors", [{"logits": call["logits"][:, -SCORED:]} for call in outputs])
    (out / "record.json").write_bytes((stored / "record.json").read_bytes())


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

    key = stage_key("generated", {"model": job.tuned_key, "samples": asked.samples})
    folder = run_stage("generated", key, make, report=progress.message)
    found = Samples(load_vectors(folder / "inputs.safetensors"), SampleRecord(**read_json(folder / "record.json")))
    check_enough(found)
    return found


def make_restructured(job: Job, progress: Progress) -> Model:
    """The model (without a cache) as the recipe's pruning, factorizing and the like leave it."""
    from edgeport.compress.calibrate import as_tensors
    from edgeport.compress.cost import cost_of, save_cost
    from edgeport.compress.cuts import load_restructured, save_restructured
    from edgeport.compress.distill.data import training_samples
    from edgeport.compress.distill.lessons import Lessons
    from edgeport.compress.restructure import restructure
    from edgeport.restructuring import needs_data
    from edgeport.stages import run_stage
    from edgeport.usage import Meter

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
        meter = Meter()
        wanted = any(needs_data(step) for step in recipe.restructure)
        inputs = as_tensors(job.uncached, _calibration(job, progress)) if wanted else []
        made = restructure(job.uncached, recipe, inputs, whole=job.whole, lessons=lessons, log=progress.message)
        save_cost(out, cost_of(meter.read(), made.model, None))
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
    from edgeport.compress.cost import cost_of, load_cost, save_cost, with_steps_before
    from edgeport.compress.journal import Journal
    from edgeport.compress.saved import load_calibration, load_compressed, load_records, save_compressed
    from edgeport.stages import run_stage, stored
    from edgeport.usage import Meter

    if job.compressed is not None:
        progress.stage("compress", f"{job.request.recipe.name}, done before")
        return job.model, job.compressed.layers, job.compressed.calibration

    request = job.request
    restructured = make_restructured(job, progress)
    meter = Meter()

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
        cost = cost_of(meter.read(), model, tuned, weights_before=before)
        if job.shaped is not None:
            cost = with_steps_before(cost, load_cost(stored("restructure", job.restructure_key)))
        save_cost(out, cost)
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


def make_lowered(
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
