"""Timed calls, and what they say of the machine: two sessions in turn, held to their processors, with a fixed piece of
arithmetic between the calls that shows how steady the machine was while no model ran.
"""

from __future__ import annotations

import contextlib
import os
import time
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

KERNEL_SIZE = 16384
KERNEL_EVERY_NS = 25_000_000
"""Time between two runs of the calibration kernel; it takes about 1% of that."""
BUSY_SECONDS = 0.1
"""How long to watch which processors are busy."""


@dataclass(frozen=True)
class Timings:
    """Nanoseconds of each call, in order: wall time and processor time of the whole process, int64 (n,)."""

    wall: np.ndarray
    cpu: np.ndarray


def time_call(call: Callable[[], object]) -> tuple[int, int]:
    """Wall and processor nanoseconds of one call."""
    cpu, wall = time.process_time_ns(), time.perf_counter_ns()
    call()
    return time.perf_counter_ns() - wall, time.process_time_ns() - cpu


def calibration_kernel() -> Callable[[], int]:
    """A fixed piece of single-threaded arithmetic that times itself: sorting the same 16384 numbers, nanoseconds.

    Each is run twice and the second timed, so that what a model left in the cache does not count.
    """
    import numpy as np

    numbers = np.random.default_rng(0).random(KERNEL_SIZE)

    def run() -> int:
        np.sort(numbers)
        start = time.perf_counter_ns()
        np.sort(numbers)
        return time.perf_counter_ns() - start

    return run


@contextlib.contextmanager
def pinned(threads: int) -> Iterator[tuple[int, ...]]:
    """Hold this thread, and those that it starts from now on, to as many processors as it computes with: the least
    busy ones. Yields their numbers; none where the system has no such call or there is nothing to choose.
    """
    if not hasattr(os, "sched_setaffinity"):
        yield ()
        return
    before = os.sched_getaffinity(0)
    if len(before) <= threads:
        yield tuple(sorted(before))
        return
    import psutil

    busy = psutil.cpu_percent(interval=BUSY_SECONDS, percpu=True)
    # A container may count its processors otherwise than it names them: an unknown one counts as idle.
    load = {core: busy[core] if core < len(busy) else 0.0 for core in before}
    chosen = sorted(sorted(before, key=lambda core: (load[core], core))[:threads])
    os.sched_setaffinity(0, chosen)
    try:
        yield tuple(chosen)
    finally:
        os.sched_setaffinity(0, before)


def interleave(
    one: Callable[[], object],
    other: Callable[[], object] | None,
    *,
    queries: int,
    warmup: int,
    seconds: float,
    limit_seconds: float,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Timings, Timings | None, np.ndarray]:
    """Call the first, and the second in turn with it, changing the order each time.

    Stops after `queries` calls of each of which the first's took `seconds` together, or at `limit_seconds`.

    Args:
        other: None times the first alone.

    Returns:
        Timings of both, and of the calibration kernel, int64 (runs,).
    """
    import numpy as np

    kernel = calibration_kernel()
    for _ in range(warmup):
        one()
        if other is not None:
            other()
        kernel()
    rows, noise = array("q"), array("q")
    count, own = 0, 0
    start = last = time.perf_counter_ns()
    while True:
        now = time.perf_counter_ns()
        enough = count >= queries and own >= seconds * 1e9
        if count and (enough or now - start > limit_seconds * 1e9):
            break
        if now - last >= KERNEL_EVERY_NS:
            noise.append(kernel())
            last = time.perf_counter_ns()
        if other is None:
            a = b = time_call(one)
        elif count % 2 == 0:
            a, b = time_call(one), time_call(other)
        else:
            b, a = time_call(other), time_call(one)
        rows.extend((*a, *b))
        count += 1
        own += a[0]
        if progress is not None:
            progress(count, max(queries, count))
    table = np.array(rows, dtype=np.int64).reshape(-1, 4)
    second = None if other is None else Timings(table[:, 2], table[:, 3])
    return Timings(table[:, 0], table[:, 1]), second, np.array(noise, dtype=np.int64)
