"""Golden inputs that several jobs of one model share, and the torch model's outputs on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from edgeport.job import Job
from edgeport.model.digest import state_digest
from edgeport.progress import Progress
from edgeport.reference import write_reference

if TYPE_CHECKING:
    import numpy as np

    from edgeport.model.types import Model

    Arrays = Mapping[str, np.ndarray]

GOLDEN = ("inputs.safetensors", "outputs.safetensors")
LEAST_SAMPLES = 4
MOST_BYTES = 400_000_000
"""Of the torch model's outputs; `LEAST_SAMPLES` are kept whatever they take."""


def make_golden(model: Model, jobs: Sequence[Job], count: int, progress: Progress) -> Path:
    """Inputs that every job takes, and the torch model's outputs on them: inputs, outputs, record.json.

    Texts are as long as the jobs' shortest limit allows; where a target takes one length only, all are padded to it.
    """
    from edgeport.data.samples import samples, sequence_axis
    from edgeport.model.shapes import with_limit
    from edgeport.plan import reference_bytes
    from edgeport.stages import run_stage, stage_key

    axes = [axis for job in jobs if (axis := sequence_axis(job.model)) is not None and axis.name == "sequence"]
    limited = with_limit(model, "sequence", min(axis.maximum for axis in axes)) if axes else model
    length = min((size for job in jobs for size in job.sequences), default=None)
    kept = max(LEAST_SAMPLES, min(count, MOST_BYTES // max(reference_bytes(limited, 1), 1)))

    def make(out: Path) -> None:
        found = samples(limited, count=kept, split="parity", sequence=length)
        write_reference(out, limited, found.inputs, found.record, progress)

    progress.stage("golden", f"{kept} inputs through the torch model")
    values = {
        "files": dict(model.source.files),
        "state": state_digest(model.module),
        "task": model.task,
        "inputs": [asdict(spec) for spec in limited.inputs],
        "outputs": [spec.name for spec in limited.outputs],
        "samples": kept,
        "sequence": length,
    }
    return run_stage("golden", stage_key("golden", values), make, report=progress.message)


def as_taken(model: Model, inputs: Arrays, outputs: Arrays) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """A golden input and its outputs in the form of one job's model.

    A decoder with a cache takes a text without padding or masks, and scores its last positions.
    """
    from edgeport.model.types import SCORED

    if model.decoder is None:
        return {spec.name: inputs[spec.name] for spec in model.inputs}, dict(outputs)
    taken = {spec.name: _unpadded(spec.name, inputs) for spec in model.inputs}
    read = taken[model.inputs[-1].name].shape[1]
    return taken, {"logits": outputs["logits"][:, :read][:, -SCORED:]}


def _unpadded(name: str, inputs: Arrays) -> np.ndarray:
    mask = inputs.get(name.replace("input_ids", "attention_mask"))
    value = inputs[name]
    if mask is None or mask.shape != value.shape:
        return value
    return value[:, mask[0] != 0]
