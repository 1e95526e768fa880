"""What makes a latency run invalid, and the order of calls. No clock is asserted."""

import numpy as np
import pytest

from edgeport.validate.latency import MOST_QUERIES, Timings, interleave, problems

MS = 1_000_000


def timings(wall_ms, cpu_share=1.0):
    wall = (np.asarray(wall_ms) * MS).astype(np.int64)
    return Timings(wall, (wall * cpu_share).astype(np.int64))


QUIET = timings(np.full(100, 20.0))


def test_a_quiet_run_is_valid():
    assert problems(QUIET, timings(np.full(100, 40.0)), 1) == []


@pytest.mark.parametrize(
    ("ours", "theirs", "threads", "word"),
    [
        (timings(np.full(29, 100.0)), timings(np.full(29, 100.0)), 1, "only 29 calls"),
        (timings(np.full(40, 1.0)), timings(np.full(40, 2.0)), 1, "only 0.12 s"),
        (timings(np.r_[np.full(50, 20.0), np.full(50, 25.0)]), QUIET, 1, "the artifact's p50 drifted by +25%"),
        (QUIET, timings(np.r_[np.full(50, 20.0), np.full(50, 16.0)]), 1, "the fp32 artifact's p50 drifted by -20%"),
        (timings(np.full(100, 20.0), 0.8), QUIET, 1, "busy elsewhere for 20% of the artifact's time"),
        (timings(np.full(100, 20.0), 2.0), QUIET, 1, "the artifact used 2.0 processors; 1 thread"),
    ],
)
def test_each_defect_is_named(ours, theirs, threads, word):
    found = problems(ours, theirs, threads)
    assert len(found) == 1
    assert word in found[0]


def test_threads_that_were_asked_for_are_fine():
    assert problems(timings(np.full(100, 20.0), 2.0), timings(np.full(100, 20.0), 1.9), 2) == []


class Recorder:
    name, vendor_kernels = "recorder", True

    def __init__(self, letter, calls):
        self.letter, self.calls = letter, calls

    def run(self, inputs):
        self.calls.append(self.letter)
        return {}


def call_both(**changes):
    calls = []
    limits = {"queries": 6, "warmup": 1, "seconds": 0.0, "limit_seconds": 60.0, **changes}
    a, b = interleave(Recorder("a", calls), Recorder("b", calls), {}, **limits)
    return "".join(calls), a, b


def test_calls_alternate_in_both_orders():
    calls, a, b = call_both()
    assert calls == "ab" + "abbaabbaabba"
    assert len(a.wall) == len(b.wall) == len(a.cpu) == 6


def test_fast_calls_go_on_until_the_most():
    _, a, _ = call_both(warmup=0, seconds=60.0)
    assert len(a.wall) == MOST_QUERIES


def test_the_time_limit_stops_a_slow_model_after_one_pair_at_least():
    _, a, _ = call_both(limit_seconds=0.0)
    assert len(a.wall) == 1
