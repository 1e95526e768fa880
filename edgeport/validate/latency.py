"""Latency of the artifact against the fp32 artifact of the same runtime, on one machine at one time.

Both are loaded in one process and called in turn, A B then B A, so that whatever the machine does meets
both alike; the *ratio* is the claim. Times in milliseconds say little about a device. A run that was too
short, drifted, or had to share its processor is marked not valid, in words.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgeport.errors import MeasurementError
from edgeport.validate.evidence import Latency
from edgeport.validate.intervals import ratio_of_medians

if TYPE_CHECKING:
    import numpy as np

    from edgeport.export.artifact import Artifact
    from edgeport.runtime.session import Session

    Arrays = Mapping[str, np.ndarray]

LEAST_QUERIES = 30
LEAST_SECONDS = 1.0
MOST_QUERIES = 5000
MOST_DRIFT = 0.15
"""Largest relative change of a p50 between the first and the second half of a run."""
MOST_WAITING = 0.10
"""Largest share of wall time in which the process did not run."""
MOST_EXTRA_CPU = 0.25
"""Largest share of processor time beyond threads x wall time, before the runtime is said to use more threads."""


@dataclass(frozen=True)
class Timings:
    """Nanoseconds of each call, in order: wall time and processor time of the whole process, int64 (n,)."""

    wall: np.ndarray
    cpu: np.ndarray


def query(session: Session, inputs: Arrays) -> Callable[[], object]:
    """What is timed: a call; of a decoder with a cache, the last token of its text, the others being in the cache."""
    from edgeport.runtime.decoder import DecoderSession

    if isinstance(session, DecoderSession):
        return session.step(inputs)
    return lambda: session.run(inputs)


def time_call(call: Callable[[], object]) -> tuple[int, int]:
    """Wall and processor nanoseconds of one call."""
    cpu, wall = time.process_time_ns(), time.perf_counter_ns()
    call()
    return time.perf_counter_ns() - wall, time.process_time_ns() - cpu


def interleave(
    first: Session,
    second: Session,
    inputs: Arrays,
    *,
    queries: int,
    warmup: int,
    seconds: float,
    limit_seconds: float,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Timings, Timings]:
    """Query two sessions in turn, changing the order each time.

    Stops after `queries` calls of each that took `seconds` together, or at `limit_seconds`, or MOST_QUERIES.
    """
    import numpy as np

    one, other = query(first, inputs), query(second, inputs)
    for _ in range(warmup):
        one()
        other()
    rows: list[tuple[int, int, int, int]] = []
    start = time.perf_counter()
    while len(rows) < MOST_QUERIES:
        elapsed = time.perf_counter() - start
        if rows and (elapsed > limit_seconds or (len(rows) >= queries and elapsed >= seconds)):
            break
        if len(rows) % 2 == 0:
            a, b = time_call(one), time_call(other)
        else:
            b, a = time_call(other), time_call(one)
        rows.append((*a, *b))
        if progress is not None:
            progress(len(rows), max(queries, len(rows)))
    table = np.array(rows, dtype=np.int64)
    return Timings(table[:, 0], table[:, 1]), Timings(table[:, 2], table[:, 3])


def problems(timings: Timings, baseline: Timings, threads: int) -> list[str]:
    """Why these timings are no claim, in words; empty when they are one."""
    import numpy as np

    found = []
    count = len(timings.wall)
    if count < LEAST_QUERIES:
        found.append(f"only {count} calls each; {LEAST_QUERIES} are needed")
    seconds = float(timings.wall.sum() + baseline.wall.sum()) / 1e9
    if seconds < LEAST_SECONDS:
        found.append(f"only {seconds:.2f} s were timed; {LEAST_SECONDS:g} s are needed")
    for name, each in (("artifact", timings), ("fp32 artifact", baseline)):
        wall, cpu = float(each.wall.sum()), float(each.cpu.sum())
        half = count // 2
        if half:
            early, late = float(np.median(each.wall[:half])), float(np.median(each.wall[half:]))
            drift = late / early - 1
            if abs(drift) > MOST_DRIFT:
                found.append(f"the {name}'s p50 drifted by {drift:+.0%} between the halves of the run")
        if 1 - cpu / wall > MOST_WAITING:
            found.append(f"the processor was busy elsewhere for {1 - cpu / wall:.0%} of the {name}'s time")
        if cpu / (wall * threads) - 1 > MOST_EXTRA_CPU:
            found.append(f"the {name} used {cpu / wall:.1f} processors; {threads} thread(s) were asked for")
    return found


def measure_latency(
    artifact: Artifact,
    baseline: Artifact,
    inputs: Arrays,
    *,
    threads: int = 1,
    queries: int = 100,
    warmup: int = 10,
    seconds: float = 3.0,
    limit_seconds: float = 60.0,
    progress: Callable[[int, int], None] | None = None,
) -> Latency:
    """Time an artifact beside the fp32 artifact of the same runtime.

    Args:
        inputs: one call's inputs, which both take.
        queries: calls of each, at least, that `seconds` together also ask for; fewer past `limit_seconds`.
        warmup: untimed calls of each.

    Raises:
        MeasurementError: an artifact runs in a reference evaluator, or the two belong to different runtimes.
        BadInputError: a file can't be loaded.
    """
    import numpy as np

    from edgeport.runtime.session import open_session

    if artifact.runtime != baseline.runtime or artifact.delegate != baseline.delegate:
        raise MeasurementError(
            "Latency is compared within one runtime only.",
            where=f"{artifact.runtime} ({artifact.delegate}), {baseline.runtime} ({baseline.delegate})",
        )
    first, second = open_session(artifact, threads=threads), open_session(baseline, threads=threads)
    if not (first.vendor_kernels and second.vendor_kernels):
        raise MeasurementError("A reference evaluator's time says nothing about a device.", where=first.name)
    timings, reference = interleave(
        first,
        second,
        inputs,
        queries=queries,
        warmup=warmup,
        seconds=seconds,
        limit_seconds=limit_seconds,
        progress=progress,
    )
    found = problems(timings, reference, threads)
    p50, p90 = np.percentile(timings.wall, [50, 90]) / 1e6
    baseline_p50, baseline_p90 = np.percentile(reference.wall, [50, 90]) / 1e6
    return Latency(
        threads=threads,
        queries=len(timings.wall),
        warmup=warmup,
        p50_ms=float(p50),
        p90_ms=float(p90),
        cpu_ms=float(np.median(timings.cpu)) / 1e6,
        baseline_p50_ms=float(baseline_p50),
        baseline_p90_ms=float(baseline_p90),
        baseline_cpu_ms=float(np.median(reference.cpu)) / 1e6,
        ratio=ratio_of_medians(timings.wall.astype(np.float64), reference.wall.astype(np.float64)),
        valid=not found,
        note="; ".join(found),
        input_shapes={name: tuple(value.shape) for name, value in inputs.items()},
    )
