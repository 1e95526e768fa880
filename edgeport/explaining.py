"""Explain a bundle: where its bytes went, where the error grows, which inputs flipped, what decides."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from edgeport.errors import BadInputError, EdgeportError

if TYPE_CHECKING:
    from edgeport.bundle.read import Bundle
    from edgeport.explain.document import Bytes, Changes, Explanation, LayerErrors, Sensitivity, SuiteFlips
    from edgeport.explain.shipped import Shipped
    from edgeport.model.types import Model
    from edgeport.progress import Progress
    from edgeport.validate.evidence import TaskScore

PartName = Literal["bytes", "layers", "flips", "sensitivity", "claims"]
PARTS: tuple[PartName, ...] = ("bytes", "layers", "flips", "sensitivity", "claims")
RUN: tuple[PartName, ...] = ("layers", "sensitivity")
"""What the original is run for."""
NOT_ASKED = "It was not asked for."
NEEDED = "Errors of layers and measured sensitivity compare with the original, which is not in the bundle."
NO_SUITE = "No suite was run on this bundle: give one with --suite (`edgeport suites` lists them)."


@dataclass(frozen=True)
class _Explained:
    """One bundle's share of an explanation."""

    bundle: Bundle
    shipped: Shipped
    tasks: tuple[TaskScore, ...]
    sizes: Bytes
    layers: LayerErrors | None
    layers_absent: str | None
    sensitivity: Sensitivity | None
    sensitivity_absent: str | None


def explain_bundle(
    path: Path,
    *,
    against: Path | None = None,
    suites: Sequence[str] = (),
    original: str | None = None,
    parts: Collection[PartName] = PARTS,
    quick: bool = False,
    progress: Progress | None = None,
) -> Explanation:
    """The explanation of a bundle.

    Args:
        against: another bundle of the same task; the tables are then told as differences, too.
        suites: to run where the evidence lacks them; of a suite of the user's own the path finds its rows again.
        original: the model that the bundle was made of; of the zoo it need not be named.
        parts: what to explain.
        quick: few rows of each suite that is run.

    Raises:
        BadInputError: a folder is no bundle, or a file of it was changed; the two bundles have different tasks; an
            original that was named is not there, or another one; a suite is wrong.
    """
    from edgeport.bundle.read import read_bundle, verify_files
    from edgeport.bundle.write import MANIFEST
    from edgeport.explain.claims import make_claims
    from edgeport.explain.document import Explanation
    from edgeport.progress import Silent
    from edgeport.storage import hash_file

    progress = progress or Silent()
    found = read_bundle(path)
    # Not the report: an explanation that was made again stands in no page yet.
    verify_files(found, report=False)
    older = None
    if against is not None:
        older = read_bundle(against)
        verify_files(older, report=False)
        if older.manifest.task != found.manifest.task:
            raise BadInputError(
                f"The bundles have different tasks: {found.manifest.task} and {older.manifest.task}.", where=against
            )
    model, absent = _original(found, original, suites, parts, progress)
    this = _explain(found, model, absent, suites, parts, quick, progress)
    flips = _flips(this, suites, progress) if "flips" in parts else ()
    changes = None
    if older is not None:
        progress.stage("against", str(against))
        same = dict(older.manifest.source.files) == dict(found.manifest.source.files)
        why = absent if same else "The other bundle was made of another original."
        compared = [name for name in parts if name != "sensitivity"]
        other = _explain(older, model if same else None, why, suites, compared, quick, progress)
        changes = _changes(this, other, suites, str(against), parts)
    return Explanation(
        bundle=found.manifest.name,
        manifest_sha256=hash_file(path / MANIFEST),
        original=None if model is None else model.source.reference,
        original_absent=absent,
        bytes=this.sizes,
        layers=this.layers,
        layers_absent=this.layers_absent,
        flips=flips,
        flips_absent=None if flips else NOT_ASKED if "flips" not in parts else NO_SUITE,
        sensitivity=this.sensitivity,
        sensitivity_absent=this.sensitivity_absent,
        claims=() if found.evidence is None or "claims" not in parts else make_claims(found.evidence),
        changes=changes,
    )


def write_explanation(explanation: Explanation, path: Path) -> None:
    """Write the document.

    Raises:
        BadInputError: the place can't be written.
    """
    from edgeport.storage import canonical_json, write_text

    try:
        write_text(path, canonical_json(explanation.model_dump(mode="json")))
    except OSError as error:
        raise BadInputError(
            f"The explanation can't be written: {error.strerror}.", where=path, next_step="Write it elsewhere: -o FILE."
        ) from error


def shipped_of(bundle: Bundle) -> Shipped:
    """What explaining a bundle needs of it."""
    from edgeport.compress.apply import LayerRecord
    from edgeport.compress.mixed import Option
    from edgeport.compress.restructure import PartRecord, StepRecord
    from edgeport.explain.shipped import Shipped

    manifest = bundle.manifest
    layers = tuple(
        LayerRecord(**{**dict(layer), "options": tuple(Option(**dict(option)) for option in layer.options)})
        for layer in manifest.layers
    )
    steps = tuple(
        StepRecord(**{**dict(step), "parts": tuple(PartRecord(**dict(part)) for part in step.parts)})
        for step in manifest.steps
    )
    return Shipped(
        artifact=bundle.artifact,
        task=manifest.task,
        recipe=manifest.recipe,
        parameters=manifest.parameters,
        layers=layers,
        steps=steps,
        samples=bundle.golden().inputs,
    )


def _original(
    bundle: Bundle, original: str | None, suites: Sequence[str], parts: Collection[PartName], progress: Progress
) -> tuple[Model | None, str | None]:
    """The original, or why it is not there. One that the user named, or that a suite needs, must be there."""
    from edgeport.suites import original_of

    unmeasured = _unmeasured(bundle, suites) if "flips" in parts else ()
    if not unmeasured and not any(part in parts for part in RUN):
        return None, NOT_ASKED
    try:
        return original_of(bundle, original, NEEDED, progress), None
    except EdgeportError as error:
        if original is not None or unmeasured:
            raise
        return None, " ".join(part for part in (error.what, error.next_step) if part)


def _unmeasured(bundle: Bundle, suites: Sequence[str]) -> tuple[str, ...]:
    """Of these suites those that the evidence lacks."""
    from edgeport.validate.suites.definition import load_suite

    known = set() if bundle.evidence is None else {task.suite for task in bundle.evidence.tasks}
    return tuple(name for name in suites if load_suite(name)[0].name not in known)


def _explain(
    bundle: Bundle,
    model: Model | None,
    absent: str | None,
    suites: Sequence[str],
    parts: Collection[PartName],
    quick: bool,
    progress: Progress,
) -> _Explained:
    from edgeport.explain.layers import layer_errors
    from edgeport.explain.sensitivity import measure_sensitivity, read_sensitivity
    from edgeport.explain.sizes import read_bytes
    from edgeport.suites import score_suites

    shipped = shipped_of(bundle)
    tasks = () if bundle.evidence is None else bundle.evidence.tasks
    unmeasured = _unmeasured(bundle, suites) if "flips" in parts else ()
    if unmeasured and model is not None and bundle.manifest.target.execution.here != "none":
        tasks += score_suites(bundle, model, unmeasured, quick=quick, progress=progress)
    progress.stage("bytes", bundle.manifest.entry)
    sizes = read_bytes(shipped, None if model is None else model.module.state_dict())
    layers, layers_absent = None, absent if "layers" in parts else NOT_ASKED
    if "layers" in parts and model is not None:
        progress.stage("layers", "values inside the shipped file")
        try:
            layers, layers_absent = layer_errors(shipped, model, progress.update), None
        except EdgeportError as error:
            layers_absent = error.what
    sensitivity: Sensitivity | None = None
    sensitivity_absent: str | None = NOT_ASKED
    if "sensitivity" in parts:
        sensitivity_absent = None
        if model is None:
            sensitivity = read_sensitivity(shipped, "the original is not here")
        else:
            progress.stage("sensitivity", "one layer at a time")
            sensitivity = measure_sensitivity(shipped, model, progress.update)
    return _Explained(bundle, shipped, tasks, sizes, layers, layers_absent, sensitivity, sensitivity_absent)


def _flips(
    this: _Explained, suites: Sequence[str], progress: Progress, other: tuple[str, Sequence[TaskScore]] | None = None
) -> tuple[SuiteFlips, ...]:
    """Of every suite, against the original, or against the other bundle's scores."""
    from edgeport.data.text import open_tokenizer
    from edgeport.explain.flips import ORIGINAL, suite_flips
    from edgeport.explain.inputs import asked

    path = this.bundle.root / this.bundle.manifest.assets / "tokenizer.json"
    tokenizer = open_tokenizer(path, MOST_TOKENS) if path.is_file() else None
    length = None if tokenizer is None else lambda text: len(tokenizer.encode(text).ids)
    found = []
    older = {} if other is None else {task.suite: task for task in other[1]}
    for task in this.tasks:
        if other is not None and task.suite not in older:
            continue
        progress.stage("flips", task.suite)
        inputs, why = asked(task, suites, length)
        name = ORIGINAL if other is None else other[0]
        found.append(suite_flips(task, inputs, why, older=older.get(task.suite), other=name))
    return tuple(found)


MOST_TOKENS = 1 << 20
"""No text of a suite is cut while its tokens are counted."""


def _changes(
    this: _Explained, other: _Explained, suites: Sequence[str], name: str, parts: Collection[PartName]
) -> Changes:
    from edgeport.bundle.write import MANIFEST
    from edgeport.explain.changes import make_changes
    from edgeport.gate.regression import same_samples
    from edgeport.progress import Silent
    from edgeport.storage import hash_file

    notes, shared = [], []
    before = {task.suite: task for task in other.tasks}
    for task in this.tasks if "flips" in parts else ():
        old = before.get(task.suite)
        if old is None:
            notes.append(f"suite {task.suite}: the other bundle was not measured on it")
        elif not same_samples(task.data, old.data) or (task.metric, task.n, task.weights) != (
            old.metric,
            old.n,
            old.weights,
        ):
            notes.append(f"suite {task.suite}: the samples or the metric are not the same")
        else:
            shared.append(old)
    if "layers" in parts:
        notes += [f"layers: {told}" for told in (other.layers_absent,) if told is not None]
    return make_changes(
        name,
        hash_file(other.bundle.root / MANIFEST),
        (other.sizes, this.sizes),
        (other.shipped, this.shipped),
        (other.layers, this.layers),
        _flips(this, suites, Silent(), (name, shared)),
        tuple(notes),
    )
