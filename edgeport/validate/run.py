"""Measure one artifact: everything that the evidence says of it, before the gate judges."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Literal

from edgeport.errors import EdgeportError, MeasurementError
from edgeport.validate.evidence import DataRecord, Latency, Measurements, Memory, OutputParity, States
from edgeport.validate.latency import LEAST_QUERIES, LEAST_SECONDS, measure_latency
from edgeport.validate.machine import this_machine
from edgeport.validate.memory import measure_memory
from edgeport.validate.parity import compare
from edgeport.validate.size import measure_size, model_bytes
from edgeport.validate.weights import check_weights

if TYPE_CHECKING:
    import numpy as np

    from edgeport.export.artifact import Artifact
    from edgeport.quantized import QuantizedTensor
    from edgeport.runtime.session import Session
    from edgeport.target import Execution

    Arrays = Mapping[str, np.ndarray]
    Watch = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Effort:
    """How long to measure.

    Attributes:
        threads: of the runtime.
        queries, warmup: timed and untimed calls of each artifact; seconds: least time of the artifact's calls.
        limit_seconds: when to stop timing at the latest.
        probes: fresh processes for memory and load time of the artifact; 0 leaves them out.
    """

    threads: int = 1
    queries: int = 128
    warmup: int = 10
    seconds: float = 2.0
    limit_seconds: float = 60.0
    probes: int = 3


QUICK = Effort(queries=10, warmup=2, seconds=0.0, limit_seconds=10.0, probes=1)
FULL = Effort(queries=LEAST_QUERIES, seconds=LEAST_SECONDS, limit_seconds=1800.0)
"""Only the last is a valid run by MLPerf's measure; the others are for a look, and their latency says so."""


def effort_of(*, quick: bool, full: bool) -> Effort:
    """The effort that was asked for."""
    return QUICK if quick else FULL if full else Effort()


STEPS = 4
"""Steps of `measure` beside one for each sample: size, weights, latency, memory."""

Executed = Literal["runtime", "reference", "none"]
ABSENT = {
    "none": "The artifact is not executed here.",
    "reference": "A reference evaluator's time and memory say nothing about a device.",
}
"""Why there is no latency and no memory."""


def ignore(done: int, total: int, detail: str) -> None:
    """A watcher that shows nothing."""


def measure(
    artifact: Artifact,
    *,
    samples: Sequence[Arrays],
    reference: Sequence[Arrays],
    task: str,
    execution: Execution,
    logical: Mapping[str, QuantizedTensor | str],
    data: DataRecord,
    baseline: Artifact | None = None,
    baseline_bytes: int | None = None,
    predicted_bytes: int | None = None,
    timing_inputs: Arrays | None = None,
    effort: Effort = Effort(),
    manifest_sha256: str | None = None,
    watch: Watch = ignore,
) -> Measurements:
    """Measure an artifact against the uncompressed model and against the fp32 artifact of the same runtime.

    Args:
        samples: real inputs, one mapping a call.
        reference: outputs of the uncompressed torch model on `samples`.
        task: optimum's task name.
        execution: the target's word on where and in what sense the artifact runs here.
        logical: the compressed weights (or their digests), by parameter name; empty when nothing was compressed.
        data: where the samples come from.
        baseline: the fp32 artifact of the same runtime; without it there are no ratios of latency and memory.
        baseline_bytes: its size, where only that is known.
        timing_inputs: inputs for latency and memory; the largest sample when left out.
        watch: told (steps done, steps in all, what).

    Raises:
        MeasurementError: the reference is degenerate, or outputs don't fit it; see `parity.compare`.
        BadInputError: the artifact can't be loaded or takes other inputs.
    """
    from edgeport.export.dispatch import read_weights

    steps = len(samples) + STEPS
    watch(0, steps, "size")
    if baseline is not None:
        baseline_bytes = model_bytes(baseline)
    size = measure_size(artifact, baseline_bytes, predicted_bytes)
    watch(1, steps, "weights in the file")
    weights = check_weights(logical, read_weights(artifact), unused=artifact.facts.get("unused_weights", ()))

    executed, parity = execute(artifact, samples, reference, task, execution, effort, watch)
    inputs = timing_inputs if timing_inputs is not None else largest(samples)
    watch(len(samples) + 2, steps, "latency")
    latency, latency_absent = timed(artifact, baseline, inputs, executed, effort)
    watch(len(samples) + 3, steps, "memory")
    memory, memory_absent = weighed(artifact, baseline, inputs, executed, effort)
    watch(steps, steps, "measured")
    return Measurements(
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=this_machine(),
        manifest_sha256=manifest_sha256,
        states=States(lowered="yes", executed_here=executed, numerics_verified="no", statement=execution.statement),
        data=data,
        parity=parity,
        weights=weights,
        size=size,
        latency=latency,
        latency_absent=latency_absent,
        memory=memory,
        memory_absent=memory_absent,
    )


def execute(
    artifact: Artifact,
    samples: Sequence[Arrays],
    reference: Sequence[Arrays],
    task: str,
    execution: Execution,
    effort: Effort,
    watch: Watch,
) -> tuple[Executed, tuple[OutputParity, ...]]:
    """Run the artifact on all samples and compare. Where the target can't be run here, nothing is measured.

    Raises:
        MeasurementError: the target's word on how the artifact runs here is not what happened.
    """
    from edgeport.runtime.session import open_session

    if execution.here == "none":
        return "none", ()
    session = open_session(artifact, threads=effort.threads)
    executed: Executed = "runtime" if session.vendor_kernels else "reference"
    if executed != execution.here:
        raise MeasurementError(
            f"The target says that the artifact runs here by {execution.here!r}, but it ran by {executed!r}.",
            where=session.name,
            next_step="Correct [execution] in the target's file: its statement goes into the evidence.",
        )
    return executed, compare(reference, answers(session, samples, watch), task=task, inputs=samples)


def answers(session: Session, samples: Sequence[Arrays], watch: Watch) -> Iterator[dict[str, np.ndarray]]:
    """The session's outputs, one sample after the other."""
    for index, sample in enumerate(samples):
        watch(index + 2, len(samples) + STEPS, f"sample {index + 1} of {len(samples)}")
        yield session.run(sample)


def largest(samples: Sequence[Arrays]) -> Arrays:
    """The first of the samples with the most numbers."""
    return max(samples, key=lambda sample: sum(value.size for value in sample.values()))


def timed(
    artifact: Artifact, baseline: Artifact | None, inputs: Arrays, executed: Executed, effort: Effort
) -> tuple[Latency | None, str | None]:
    """Latency, or why there is none."""
    if executed != "runtime":
        return None, ABSENT[executed]
    try:
        latency = measure_latency(
            artifact,
            baseline,
            inputs,
            threads=effort.threads,
            queries=effort.queries,
            warmup=effort.warmup,
            seconds=effort.seconds,
            limit_seconds=effort.limit_seconds,
        )
    except EdgeportError as error:
        return None, error.what
    return latency, None


def weighed(
    artifact: Artifact, baseline: Artifact | None, inputs: Arrays, executed: Executed, effort: Effort
) -> tuple[Memory | None, str | None]:
    """Memory, or why there is none."""
    if executed != "runtime":
        return None, ABSENT[executed]
    if effort.probes == 0:
        return None, "No fresh process was asked for."
    try:
        return measure_memory(artifact, baseline, inputs, threads=effort.threads, runs=effort.probes), None
    except EdgeportError as error:
        return None, error.what
