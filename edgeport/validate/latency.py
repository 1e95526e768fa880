"""Latency of the artifact as MLPerf's single stream measures it, beside the fp32 artifact of the same runtime.

The next call starts when the last one is done; the metric is the measured p90 over at least 1024 calls and at least
60 s (MLPerf Mobile, single stream). Shorter runs are for a first look and are flagged: their numbers are there, and no
claim. Both artifacts are loaded in one process and called in turn, A B then B A, so that whatever the machine does
meets both alike; their *ratio* says more than times in milliseconds, which are this machine's. A run that drifted, had
to share its processor, or went on while a fixed piece of arithmetic took now more, now less time, is marked not valid,
in words.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from edgeport.errors import MeasurementError
from edgeport.validate.evidence import CallTimes, Interval, Latency, Noise
from edgeport.validate.intervals import percentile_interval, ratio_of_medians
from edgeport.validate.timing import Timings, interleave, pinned

if TYPE_CHECKING:
    import numpy as np

    from edgeport.export.artifact import Artifact
    from edgeport.runtime.session import Session

    Arrays = Mapping[str, np.ndarray]

LEAST_QUERIES = 1024
LEAST_SECONDS = 60.0
"""MLPerf's min_query_count and min_duration for a valid single-stream run."""
LEAST_FOR_CPU = 30
"""Calls from which a ratio of processor times is told: it needs no quiet machine, only some calls."""
MOST_DRIFT = 0.15
"""Largest relative change of a p50 between the first and the second half of a run."""
MOST_WAITING = 0.10
"""Largest share of wall time in which the process did not run."""
MOST_EXTRA_CPU = 0.25
"""Largest share of processor time beyond threads x wall time, before the runtime is said to use more threads."""
MOST_OUTLIERS = 0.05
"""Largest share of calls that took more than twice the median: with 10% of them the p90 is one of them."""
MOST_SPREAD, MOST_KERNEL_DRIFT = 0.25, 0.10
"""Of the calibration kernel: its p90 over its median, and the change of its median over the run."""
LEAST_KERNEL_RUNS = 20
STRETCHES = 60
"""Parts of a run whose medians are kept, so that a reader can see when it was slow."""


def query(session: Session, inputs: Arrays) -> Callable[[], object]:
    """What is timed: a call; of a decoder with a cache, the last token of its text, the others being in the cache."""
    from edgeport.runtime.decoder import DecoderSession

    if isinstance(session, DecoderSession):
        return session.step(inputs)
    return lambda: session.run(inputs)


def drift_of(values: np.ndarray) -> float:
    """Median of the second half over the first's, minus 1; 0 of fewer than two."""
    import numpy as np

    half = len(values) // 2
    return float(np.median(values[half:]) / np.median(values[:half]) - 1) if half else 0.0


def outliers(timings: Timings) -> float:
    """Share of the calls that took more than twice the median."""
    import numpy as np

    return float((timings.wall > 2 * np.median(timings.wall)).mean())


def call_times(wall: np.ndarray) -> CallTimes:
    """All calls in brief.

    Args:
        wall: nanoseconds in order, int64 (n,).
    """
    import numpy as np

    milliseconds = wall / 1e6
    stretches = np.array_split(milliseconds, min(STRETCHES, len(wall)))
    return CallTimes(
        percentiles_ms=tuple(np.percentile(milliseconds, range(101)).tolist()),
        course_ms=tuple(float(np.median(stretch)) for stretch in stretches),
    )


def noise_of(kernel: np.ndarray) -> Noise | None:
    """What the calibration kernel's nanoseconds say; None of too few runs."""
    import numpy as np

    if len(kernel) < LEAST_KERNEL_RUNS:
        return None
    median, p90 = np.percentile(kernel, [50, 90])
    return Noise(
        runs=len(kernel), median_us=float(median) / 1e3, spread=float(p90 / median) - 1, drift=drift_of(kernel)
    )


def too_short(timings: Timings) -> list[str]:
    """What MLPerf's protocol misses in this run, in words."""
    found = []
    if len(timings.wall) < LEAST_QUERIES:
        found.append(f"only {len(timings.wall)} calls; {LEAST_QUERIES} are needed")
    seconds = float(timings.wall.sum()) / 1e9
    if seconds < LEAST_SECONDS:
        found.append(f"only {seconds:.3g} s were timed; {LEAST_SECONDS:g} s are needed")
    return found


def disturbances(timings: Timings, baseline: Timings | None, noise: Noise | None, threads: int) -> list[str]:
    """What disturbed these timings so far that they are no claim, in words."""
    found = []
    if noise is not None and noise.spread > MOST_SPREAD:
        found.append(f"the machine was noisy: a fixed piece of arithmetic took {noise.spread:.0%} longer at its p90")
    if noise is not None and abs(noise.drift) > MOST_KERNEL_DRIFT:
        found.append(f"the machine changed: a fixed piece of arithmetic drifted by {noise.drift:+.0%}")
    for name, each in (("artifact", timings), ("fp32 artifact", baseline)):
        if each is None:
            continue
        wall, cpu = float(each.wall.sum()), float(each.cpu.sum())
        drift = drift_of(each.wall)
        if abs(drift) > MOST_DRIFT:
            found.append(f"the {name}'s p50 drifted by {drift:+.0%} between the halves of the run")
        if (stalled := outliers(each)) > MOST_OUTLIERS:
            found.append(f"{stalled:.0%} of the {name}'s calls took more than twice the median")
        if 1 - cpu / wall > MOST_WAITING:
            found.append(f"the processor was busy elsewhere for {1 - cpu / wall:.0%} of the {name}'s time")
        if cpu / (wall * threads) - 1 > MOST_EXTRA_CPU:
            found.append(f"the {name} used {cpu / wall:.1f} processors; {threads} thread(s) were asked for")
    return found


def measure_latency(
    artifact: Artifact,
    baseline: Artifact | None,
    inputs: Arrays,
    *,
    threads: int = 1,
    queries: int = 128,
    warmup: int = 10,
    seconds: float = 2.0,
    limit_seconds: float = 60.0,
    progress: Callable[[int, int], None] | None = None,
) -> Latency:
    """Time an artifact, beside the fp32 artifact of the same runtime where there is one.

    Args:
        inputs: one call's inputs, which both take.
        queries: calls of each, at least, of which the artifact's take `seconds` together; fewer past `limit_seconds`.
        warmup: untimed calls of each.

    Raises:
        MeasurementError: an artifact runs in a reference evaluator, or the two belong to different runtimes.
        BadInputError: a file can't be loaded.
    """
    from edgeport.runtime.session import open_session

    if baseline is not None and (artifact.runtime, artifact.delegate) != (baseline.runtime, baseline.delegate):
        raise MeasurementError(
            "Latency is compared within one runtime only.",
            where=f"{artifact.runtime} ({artifact.delegate}), {baseline.runtime} ({baseline.delegate})",
        )
    with pinned(threads) as cores:
        # Opened here, so that the runtimes' own threads are held to the same processors.
        sessions = [open_session(each, threads=threads) for each in (artifact, baseline) if each is not None]
        for session in sessions:
            if not session.vendor_kernels:
                raise MeasurementError("A reference evaluator's time says nothing about a device.", where=session.name)
        one, *rest = [query(session, inputs) for session in sessions]
        timings, reference, kernel = interleave(
            one,
            rest[0] if rest else None,
            queries=queries,
            warmup=warmup,
            seconds=seconds,
            limit_seconds=limit_seconds,
            progress=progress,
        )
    shapes = {name: tuple(value.shape) for name, value in inputs.items()}
    return summarise(timings, reference, kernel, threads=threads, warmup=warmup, cores=cores, input_shapes=shapes)


def summarise(
    timings: Timings,
    baseline: Timings | None,
    kernel: np.ndarray,
    *,
    threads: int,
    warmup: int,
    cores: tuple[int, ...],
    input_shapes: dict[str, tuple[int, ...]],
) -> Latency:
    """The evidence of a run.

    Args:
        kernel: nanoseconds of the calibration kernel, in order.
    """
    import numpy as np

    noise = noise_of(kernel)
    short, disturbed = too_short(timings), disturbances(timings, baseline, noise, threads)
    count, seconds = len(timings.wall), float(timings.wall.sum()) / 1e9
    theirs = None if baseline is None else np.percentile(baseline.wall, [50, 90]) / 1e6
    return Latency(
        threads=threads,
        queries=count,
        warmup=warmup,
        seconds=seconds,
        cores=cores,
        p50_ms=float(np.percentile(timings.wall, 50)) / 1e6,
        p90_ms=float(np.percentile(timings.wall, 90)) / 1e6,
        p90=percentile_interval(timings.wall / 1e6, 0.9),
        cpu_ms=float(np.median(timings.cpu)) / 1e6,
        baseline_p50_ms=None if theirs is None else float(theirs[0]),
        baseline_p90_ms=None if theirs is None else float(theirs[1]),
        baseline_cpu_ms=None if baseline is None else float(np.median(baseline.cpu)) / 1e6,
        ratio=None if baseline is None else ratio(timings.wall, baseline.wall),
        cpu_ratio=None if baseline is None or count < LEAST_FOR_CPU else ratio(timings.cpu, baseline.cpu),
        outliers=outliers(timings),
        noise=noise,
        calls=call_times(timings.wall),
        baseline_calls=None if baseline is None else call_times(baseline.wall),
        min_queries_met=count >= LEAST_QUERIES,
        min_duration_met=seconds >= LEAST_SECONDS,
        valid=not short and not disturbed,
        note="; ".join([*short, *disturbed]),
        input_shapes=input_shapes,
    )


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> Interval | None:
    """Ratio of two medians of nanoseconds; None where the clock was too coarse to see any time pass."""
    import numpy as np

    if np.median(denominator) == 0:
        return None
    return ratio_of_medians(numerator.astype(np.float64), denominator.astype(np.float64))
