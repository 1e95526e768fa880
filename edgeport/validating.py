"""Measure a bundle again, on this machine, from what it carries: `edgeport validate`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from edgeport import suites
from edgeport.pipeline import ExportResult
from edgeport.progress import Progress, Silent
from edgeport.storage import hash_file, read_json


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
