"""One checkpoint in several runtimes and precisions, held against the same golden inputs: `edgeport parity`.

The golden inputs and the torch model's outputs on them are made once. Each cell is lowered by the pipeline and
measured as a stage of its own, so an interrupted run goes on with the next cell; one that is refused or fails says why
and stops no other.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from shutil import copyfile
from typing import TYPE_CHECKING, Any, TypeVar

from edgeport.errors import EXIT_BUG, BadInputError, EdgeportError, TargetRefusesError, first_line
from edgeport.golden import GOLDEN, as_taken, make_golden
from edgeport.job import ExportRequest, Job
from edgeport.prepare import prepare
from edgeport.progress import Progress, Silent
from edgeport.storage import canonical_json, hash_file, new_folder, read_json

if TYPE_CHECKING:
    import numpy as np

    from edgeport.export.artifact import Artifact
    from edgeport.model.types import Model
    from edgeport.runtime.session import Session
    from edgeport.target import Target
    from edgeport.validate.evidence import OutputParity
    from edgeport.validate.matrix import Cell, ParityMatrix, Precision

    Arrays = Mapping[str, np.ndarray]

T = TypeVar("T")

DEFAULT_TARGETS = ("linux-x86_64-ort", "android-arm64-executorch", "ios18-coreml")
"""One a runtime."""

DOCUMENT = "parity.json"


@dataclass(frozen=True)
class ParityRequest:
    """What the user asked for; see `edgeport.job.ExportRequest`.

    Attributes:
        precisions: the recipes of these names say how a file is made and what parity it owes.
        samples: golden inputs; a model with large outputs uses fewer.
    """

    model: str
    targets: tuple[Target, ...]
    output: Path
    precisions: tuple[Precision, ...] = ("fp32", "fp16")
    force: bool = False
    name: str | None = None
    task: str | None = None
    example_inputs: Path | None = None
    allow_pickle: bool = False
    context: int | None = None
    samples: int = 16


def parity(request: ParityRequest, progress: Progress | None = None) -> ParityMatrix:
    """Fill the matrix and write it: parity.json, parity.md, parity.html, and the golden vectors in golden/.

    Raises:
        BadInputError: the model can't be loaded or is compressed, a target or a precision is named twice, or the output
            folder is taken. What goes wrong in one cell is in its `reason`.
    """
    from edgeport.bundle.write import check_destination
    from edgeport.compress.apply import check_finite
    from edgeport.model.compressed import compressed_folder
    from edgeport.model.load import load_model
    from edgeport.report.matrix import html, markdown
    from edgeport.validate.evidence import DataRecord
    from edgeport.validate.machine import this_machine
    from edgeport.validate.matrix import ParityMatrix, overall

    progress = progress or Silent()
    check_destination(request.output, force=request.force, marker=DOCUMENT, what="parity matrix")
    names = [target.name for target in request.targets]
    for asked, option in ((names, "--target"), (list(request.precisions), "--precision")):
        if not asked or len(set(asked)) < len(asked):
            raise BadInputError("One or more are needed, each once.", where=f"{option} {' '.join(asked)}")
    if compressed_folder(request.model) is not None:
        raise BadInputError(
            "The original of a compressed folder is not in it, so there is nothing to hold all files against.",
            where=request.model,
            next_step="Give the model that it was made of.",
        )
    progress.stage("load", request.model)
    model = load_model(
        request.model,
        name=request.name,
        task=None if (request.task or "").endswith("-with-past") else request.task,
        example_inputs=request.example_inputs,
        allow_pickle=request.allow_pickle,
    )
    check_finite(model.module)
    planned = [
        _plan(request, model, target, precision, progress)
        for target in request.targets
        for precision in request.precisions
    ]
    jobs = [item for item in planned if isinstance(item, Job)]
    golden = make_golden(model, jobs, request.samples, progress)
    cells = [
        _or_why_not(item.request.target, item.settings.precision, partial(_measure, item, golden, progress))
        if isinstance(item, Job)
        else item
        for item in planned
    ]
    matrix = ParityMatrix(
        model=model.source.reference,
        task=model.task,
        parameters=sum(parameter.numel() for parameter in model.module.parameters()),
        source_files=dict(model.source.files),
        data=DataRecord(**read_json(golden / "record.json")),
        golden={name: hash_file(golden / name) for name in GOLDEN},
        cells=tuple(cells),
        machine=this_machine(),
        exit_code=overall(cells),
    )
    with new_folder(request.output, replace=request.force) as out:
        (out / DOCUMENT).write_text(canonical_json(matrix.model_dump(mode="json")))
        (out / "parity.md").write_text(markdown(matrix))
        (out / "parity.html").write_text(html(matrix))
        (out / "golden").mkdir()
        for name in GOLDEN:
            copyfile(golden / name, out / "golden" / name)
    return matrix


def _plan(request: ParityRequest, model: Model, target: Target, precision: Precision, progress: Progress) -> Job | Cell:
    """What to do for a cell, or the cell itself where there is nothing to do."""
    from edgeport.recipe import load_recipe

    if precision not in target.precisions:
        reason = f"the target's file lists {' and '.join(target.precisions)} only"
        return _empty(target, precision, "not offered", reason)
    asked = ExportRequest(
        model=request.model,
        target=target,
        recipe=load_recipe(precision),
        output=request.output,
        name=request.name,
        task=request.task,
        context=request.context if target.cache else None,
        samples=request.samples,
    )
    return _or_why_not(target, precision, lambda: prepare(asked, progress, at_hand=model))


def _or_why_not(target: Target, precision: Precision, make: Callable[[], T]) -> T | Cell:
    """What `make` gives, or the cell that says why it gave nothing."""
    try:
        return make()
    except EdgeportError as error:
        outcome = "refused" if isinstance(error, TargetRefusesError) else "error"
        where = "" if error.where is None else f" ({error.where})"
        found = {"exit_code": error.exit_code, "next_step": error.next_step}
        return _empty(target, precision, outcome, f"{error.what}{where}").model_copy(update=found)
    except Exception as error:  # noqa: BLE001 - one runtime's failure is a finding, and must not hide the others'
        found = {"exit_code": EXIT_BUG, "next_step": "`edgeport export --debug` shows all of it."}
        reason = f"{type(error).__name__}: {first_line(error)}"
        return _empty(target, precision, "error", reason).model_copy(update=found)
    finally:
        # A runtime's buffers and an exporter's graphs would otherwise stay until the next cell is done.
        gc.collect()


def _measure(job: Job, golden: Path, progress: Progress) -> Cell:
    from edgeport.gate import judge_parity
    from edgeport.making import make_lowered
    from edgeport.runtime.session import open_session
    from edgeport.stages import run_stage, stage_key
    from edgeport.validate.evidence import OutputParity
    from edgeport.validate.machine import this_machine
    from edgeport.validate.size import model_bytes
    from edgeport.vectors import load_vectors

    target, precision = job.request.target, job.settings.precision
    artifact = make_lowered("lower", job.lower_key, job.model, job, job.settings, progress)
    size = model_bytes(artifact)
    if target.execution.here == "none":
        made = _empty(target, precision, "not executed", "nothing on this machine runs the file")
        return made.model_copy(update={"file_bytes": size})

    def make(out: Path) -> None:
        taken = [
            as_taken(job.model, *pair) for pair in zip(*(load_vectors(golden / name) for name in GOLDEN), strict=True)
        ]
        found = {"outputs": _compare(job, open_session(artifact), taken, progress)}
        if artifact.runtime == "coreml" and precision == "fp16":
            found["unrounded"] = _compare(job, _unrounded(artifact), taken, progress)
        rows = {name: [row.model_dump(mode="json") for row in parity] for name, parity in found.items()}
        (out / "parity.json").write_text(canonical_json(rows))

    progress.stage("validate", f"{target.name}, {precision}: {target.execution.statement}")
    values = {
        "artifact": job.lower_key,
        "golden": [hash_file(golden / name) for name in GOLDEN],
        "machine": this_machine().model_dump(),
    }
    rows = read_json(run_stage("parity", stage_key("parity", values), make, report=progress.message) / "parity.json")
    outputs = tuple(OutputParity(**row) for row in rows["outputs"])
    verdict = judge_parity(outputs, job.request.recipe.gate)
    failed = [check.message for check in verdict.checks if not check.passed]
    made = _empty(target, precision, "passed" if verdict.passed else "failed", "; ".join(failed) or None)
    return made.model_copy(
        update={
            "file_bytes": size,
            "outputs": outputs,
            "unrounded": tuple(OutputParity(**row) for row in rows.get("unrounded", ())),
            "checks": verdict.checks,
            "next_step": next((check.advice for check in verdict.checks if not check.passed), None),
            "exit_code": verdict.exit_code,
        }
    )


def _compare(
    job: Job, session: Session, taken: Sequence[tuple[Arrays, Arrays]], progress: Progress
) -> tuple[OutputParity, ...]:
    from edgeport.validate.parity import compare

    def measured() -> Iterator[dict[str, np.ndarray]]:
        for index, (inputs, _) in enumerate(taken):
            yield session.run(inputs)
            progress.update(index + 1, len(taken), session.name)

    return compare(
        [outputs for _, outputs in taken],
        measured(),
        task=job.model.task,
        inputs=[inputs for inputs, _ in taken],
    )


def _unrounded(artifact: Artifact) -> Session:
    """A Core ML package in the reference evaluator, with no value rounded to float16 on the way."""
    from edgeport.model.types import SCORED
    from edgeport.runtime.coreml.decoder import CoreMLReferenceTokens
    from edgeport.runtime.coreml.session import CoreMLReferenceSession
    from edgeport.runtime.decoder import DecoderSession

    if artifact.context is None:
        return CoreMLReferenceSession(artifact, "fp32")
    return DecoderSession(CoreMLReferenceTokens(artifact, "fp32"), scored=SCORED)


def _empty(target: Target, precision: Precision, outcome: Any, reason: str | None) -> Cell:
    from edgeport.validate.machine import this_machine
    from edgeport.validate.matrix import Cell, executed_by

    ran = outcome in ("passed", "failed", "not executed")
    return Cell(
        target=target.name,
        title=target.title,
        runtime=target.runtime,
        precision=precision,
        outcome=outcome,
        executed_by=executed_by(target.execution, target.runtime, this_machine().versions) if ran else "not executed",
        reason=reason,
    )
