"""`edgeport compress`: the first half of the pipeline, and a folder that the second half begins with.

load -> reference -> compress -> folder. The stages are those of an export, with the same keys: an export of the same
model with the same recipe and target finds them done. The folder is loaded again before it gets its name.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgeport.errors import BadInputError, EdgeportError
from edgeport.job import ExportRequest, Job
from edgeport.prepare import prepare
from edgeport.progress import Progress, Silent
from edgeport.storage import new_folder

if TYPE_CHECKING:
    from edgeport.compress import LayerRecord
    from edgeport.compress.cost import Cost
    from edgeport.compress.folder import Compressed
    from edgeport.compress.restructure import StepRecord
    from edgeport.plan import PlannedLayer
    from edgeport.recipe import Recipe
    from edgeport.target import Target

REFERENCE_BYTES = 100_000_000
"""Most bytes of stored reference outputs; at least four samples are kept."""


@dataclass(frozen=True)
class CompressRequest:
    """What the user asked for.

    Attributes:
        model: a reference as `edgeport.model.load.load_model` takes it.
        output: the folder to write.
        target: whose grids to use; None for those that every backend can store.
        sequence: length of the sequence axis of the reference inputs; None for natural lengths, or the length of a
            target that only takes fixed shapes.
        samples: real inputs whose outputs are stored; a model with large outputs stores fewer.
    """

    model: str
    recipe: Recipe
    output: Path
    target: Target | None = None
    force: bool = False
    name: str | None = None
    task: str | None = None
    allow_pickle: bool = False
    sequence: int | None = None
    samples: int = 64


@dataclass(frozen=True)
class CompressResult:
    """What came out.

    Attributes:
        layers: what happened to each weight that can be compressed, after the steps.
        steps: what pruning, factorizing and the like did before.
        bytes_before: of all parameters in float32.
        bytes_after: of the file of weights.
        samples: inputs stored with the uncompressed model's outputs.
        files: sha256 of every file of the folder but edgeport.json.
        cost: what the compression itself took; from the run that made it, where the cache had it.
    """

    folder: Path
    model: str
    layers: tuple[LayerRecord, ...]
    bytes_before: int
    bytes_after: int
    samples: int
    files: Mapping[str, str]
    seconds: float
    cost: Cost
    steps: tuple[StepRecord, ...] = ()


@dataclass(frozen=True)
class CompressPlan:
    """What `compress` would do.

    Attributes:
        bytes_before: of all parameters in float32.
        bytes_after: of the file of weights, predicted; without its header of names.
        cached: the compression lies in the cache already.
    """

    model: str
    recipe: str
    target: str | None
    layers: tuple[PlannedLayer, ...]
    bytes_before: int
    bytes_after: int
    samples: int
    cached: bool


def plan(request: CompressRequest, progress: Progress | None = None) -> CompressPlan:
    """What `compress` would do, without doing it.

    Raises:
        BadInputError, TargetRefusesError: what `compress` would refuse.
    """
    from edgeport.compress.restructure import dense_bytes
    from edgeport.plan import planned_layers
    from edgeport.stages import is_stored

    job = _prepare(request, progress or Silent())
    layers = planned_layers(job.assignments)
    shaped = dense_bytes(job.shape)
    return CompressPlan(
        model=job.model.name,
        recipe=request.recipe.name,
        target=None if request.target is None else request.target.name,
        layers=layers,
        bytes_before=_float_bytes(job),
        bytes_after=shaped - sum(layer.bytes_before - layer.bytes_after for layer in layers),
        samples=job.sample_count,
        cached=is_stored("compress", job.compress_key),
    )


def compress(request: CompressRequest, progress: Progress | None = None) -> CompressResult:
    """Compress a model and write the folder. Nothing is left when it fails or is interrupted.

    Raises:
        BadInputError: something the user gave can't be used (exit 2).
        TargetRefusesError: the target can't take it (exit 3).
    """
    from edgeport.compress.apply import check_finite
    from edgeport.compress.folder import Compressed, write_compressed
    from edgeport.compress.portable import make_portable
    from edgeport.making import compression_cost, make_compressed, make_reference, restructuring_steps
    from edgeport.stages import toolchain_versions

    started = time.monotonic()
    progress = progress or Silent()
    job = _prepare(request, progress)
    check_finite(job.model.module)
    reference = make_reference(job, progress)
    model, layers, calibration = make_compressed(job, progress)
    cost = compression_cost(job)
    assert cost is not None, "a job that compresses has run its compression"
    if request.target is None:
        model, layers = make_portable(model, layers)
    contents = Compressed(
        original=job.model,
        model=model,
        recipe=request.recipe,
        target=None if request.target is None else request.target.name,
        layers=layers,
        steps=restructuring_steps(job),
        calibration=calibration,
        reference=reference,
        toolchain=toolchain_versions(),
    )
    progress.stage("folder", str(request.output))
    try:
        with new_folder(request.output, replace=request.force) as folder:
            record = write_compressed(folder, contents)
            size = (folder / record.weights).stat().st_size
            _read_back(folder, contents)
    except OSError as error:
        raise BadInputError(
            f"The folder can't be written: {error.strerror or error}.",
            where=error.filename or request.output,
            next_step="Free some space, or choose another output folder.",
        ) from error
    return CompressResult(
        folder=request.output,
        model=model.name,
        layers=layers,
        bytes_before=_float_bytes(job),
        bytes_after=size,
        samples=job.sample_count,
        files=record.files,
        steps=contents.steps,
        seconds=time.monotonic() - started,
        cost=cost,
    )


def _float_bytes(job: Job) -> int:
    whole = job.whole or job.model
    return sum(parameter.numel() * 4 for parameter in whole.module.parameters())


def _prepare(request: CompressRequest, progress: Progress) -> Job:
    """The job of an export, as far as it goes here; what can't be compressed or stored is refused."""
    from edgeport.bundle.write import check_destination
    from edgeport.compress.folder import check_can_be_stored
    from edgeport.compress.portable import check_some_target_takes, portable_target
    from edgeport.model.compressed import RECORD, compressed_folder

    check_destination(request.output, force=request.force, marker=RECORD, what="compressed model")
    if compressed_folder(request.model) is not None:
        raise BadInputError(
            "The model is already compressed.",
            where=request.model,
            next_step="Export it (`edgeport export`), or give the original model.",
        )
    job = prepare(
        ExportRequest(
            model=request.model,
            target=request.target or portable_target(request.recipe),
            recipe=request.recipe,
            output=request.output,
            name=request.name,
            task=request.task,
            allow_pickle=request.allow_pickle,
            sequence=request.sequence,
            samples=request.samples,
            reference_bytes=REFERENCE_BYTES,
        ),
        progress,
        cache=False,
    )
    check_can_be_stored(job.model)
    if request.target is None:
        check_some_target_takes(job.assignments)
    if not job.compresses:
        raise BadInputError(
            f"The recipe {request.recipe.name!r} compresses no weight of this model.",
            where="--recipe",
            next_step="Choose a recipe that does (`edgeport recipes`), or export the model as it is.",
        )
    return job


def _read_back(folder: Path, contents: Compressed) -> None:
    """Load the folder as another machine would: every code and every weight must be there again.

    Raises:
        BadInputError: this kind of model does not come back out of its config.
    """
    from edgeport.model.compressed import load_compressed
    from edgeport.model.digest import state_digest
    from edgeport.quantized import digest

    model = contents.model
    try:
        found = load_compressed(folder)
    except EdgeportError as error:
        raise _unusable(model.name, error.what) from error
    for name, tensor in model.quantized.items():
        if digest(found.quantized[name]) != digest(tensor):
            raise _unusable(model.name, f"other codes or scales in {name}")
    if dict(found.sparse) != dict(model.sparse):
        raise _unusable(model.name, "other sparse weights")
    if state_digest(found.module) != state_digest(model.module):
        raise _unusable(model.name, "other float weights")
    interfaces = [[(spec.name, spec.dtype) for spec in (*one.inputs, *one.outputs)] for one in (found, model)]
    if interfaces[0] != interfaces[1]:
        raise _unusable(model.name, "other inputs or outputs")


def _unusable(name: str, why: str) -> BadInputError:
    return BadInputError(
        f"The compressed {name} can't be read back: {why}.",
        where="MODEL",
        next_step="Compress and export it in one run: `edgeport export` takes it. Please report this.",
    )
