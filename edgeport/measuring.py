"""The stage that measures an artifact, kept under the hash of its inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgeport.job import Job
from edgeport.progress import Progress
from edgeport.storage import canonical_json, read_json

if TYPE_CHECKING:
    import numpy as np

    from edgeport.export.artifact import Artifact
    from edgeport.model.types import Model
    from edgeport.validate.evidence import DataRecord, FreeText, Measurements, Products, TokenizerParity, Work


def make_measured(
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


def _data(job: Job, reference: Path) -> DataRecord:
    """The inputs that evidence is measured on."""
    from edgeport.validate.evidence import DataRecord

    record = DataRecord(**read_json(reference / "record.json"))
    if job.compressed is None:
        return record
    words = f"{record.slice}; the uncompressed model's outputs were stored when it was compressed"
    return record.model_copy(update={"slice": words})


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


def _tokenizers(job: Job, out: Path) -> tuple[TokenizerParity, ...]:
    """What device tokenizers make of the assets as a bundle holds them; the expected ids are kept in tokenizer.json."""
    import shutil
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
