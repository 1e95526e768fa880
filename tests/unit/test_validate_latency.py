"""What makes a latency run invalid, the order of calls, and what is told of a run. No clock is asserted."""

import os

import numpy as np
import pytest
from scipy import stats

from edgeport.validate.intervals import percentile_interval, ratio_of_medians
from edgeport.validate.latency import (
    LEAST_KERNEL_RUNS,
    LEAST_QUERIES,
    call_times,
    disturbances,
    noise_of,
    ratio,
    summarise,
    too_short,
)
from edgeport.validate.run import effort_of
from edgeport.validate.timing import Timings, calibration_kernel, interleave, pinned

MS = 1_000_000


def timings(wall_ms, cpu_share=1.0):
    wall = (np.asarray(wall_ms) * MS).astype(np.int64)
    return Timings(wall, (wall * cpu_share).astype(np.int64))


LONG = timings(np.full(LEAST_QUERIES, 60.0))
QUIET = timings(np.full(100, 20.0))
STEADY = np.full(100, 150_000)


def run(ours=LONG, theirs=LONG, kernel=STEADY):
    return summarise(ours, theirs, kernel, threads=1, warmup=3, cores=(1,), input_shapes={"x": (1,)})


def test_a_long_quiet_run_is_valid():
    found = run()
    assert (found.valid, found.note) == (True, "")
    assert (found.min_queries_met, found.min_duration_met) == (True, True)
    assert found.seconds == pytest.approx(61.44)
    assert (found.noise.runs, found.noise.spread, found.noise.drift, found.outliers) == (100, 0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("ours", "queries_met", "duration_met", "word"),
    [
        (timings(np.full(LEAST_QUERIES - 1, 60.0)), False, True, "only 1023 calls; 1024 are needed"),
        (timings(np.full(LEAST_QUERIES, 50.0)), True, False, "only 51.2 s were timed; 60 s are needed"),
    ],
)
def test_mlperfs_two_demands(ours, queries_met, duration_met, word):
    found = run(ours, ours)
    assert (found.min_queries_met, found.min_duration_met, found.valid) == (queries_met, duration_met, False)
    assert too_short(ours) == [word] == [found.note]


def test_the_full_effort_is_mlperfs_and_no_other_is():
    full = effort_of(quick=False, full=True)
    assert (full.queries, full.seconds) == (1024, 60.0)
    for other in (effort_of(quick=True, full=True), effort_of(quick=False, full=False)):
        assert other.queries < 1024
        assert other.seconds < 60.0


def test_a_short_run_is_flagged_and_keeps_its_numbers():
    found = run(QUIET, timings(np.full(100, 40.0)))
    assert not found.valid
    assert (found.p50_ms, found.p90_ms, found.ratio.mean, found.cpu_ratio.mean) == (20.0, 20.0, 0.5, 0.5)


def test_without_a_baseline_there_is_no_ratio():
    found = run(theirs=None)
    assert found.valid
    assert (found.ratio, found.cpu_ratio, found.baseline_p50_ms, found.baseline_cpu_ms) == (None, None, None, None)


@pytest.mark.parametrize(
    ("ours", "theirs", "threads", "word"),
    [
        (timings(np.r_[np.full(50, 20.0), np.full(50, 25.0)]), QUIET, 1, "the artifact's p50 drifted by +25%"),
        (QUIET, timings(np.r_[np.full(50, 20.0), np.full(50, 16.0)]), 1, "the fp32 artifact's p50 drifted by -20%"),
        (timings(np.full(100, 20.0), 0.8), QUIET, 1, "busy elsewhere for 20% of the artifact's time"),
        (timings(np.full(100, 20.0), 2.0), QUIET, 1, "the artifact used 2.0 processors; 1 thread"),
        (timings(np.tile([20.0] * 9 + [50.0], 10)), QUIET, 1, "10% of the artifact's calls took more than twice"),
    ],
)
def test_each_defect_is_named(ours, theirs, threads, word):
    found = disturbances(ours, theirs, None, threads)
    assert len(found) == 1
    assert word in found[0]


@pytest.mark.parametrize(
    ("kernel", "word"),
    [
        (np.tile([100_000] * 8 + [140_000] * 2, 10), "took 40% longer at its p90"),
        (np.r_[np.full(50, 100_000), np.full(50, 120_000)], "drifted by +20%"),
    ],
)
def test_a_machine_that_was_not_steady_makes_the_run_invalid(kernel, word):
    """The model's own calls are perfectly steady: only the fixed arithmetic between them tells."""
    found = run(kernel=kernel)
    assert not found.valid
    assert found.min_queries_met
    assert word in found.note


def test_too_few_runs_of_the_kernel_say_nothing():
    assert noise_of(STEADY[: LEAST_KERNEL_RUNS - 1]) is None
    assert noise_of(STEADY[:LEAST_KERNEL_RUNS]).runs == LEAST_KERNEL_RUNS


def test_threads_that_were_asked_for_are_fine():
    assert disturbances(timings(np.full(100, 20.0), 2.0), timings(np.full(100, 20.0), 1.9), None, 2) == []


def test_processor_times_too_short_for_the_clock_have_no_ratio():
    assert ratio(np.zeros(40, np.int64), np.zeros(40, np.int64)) is None


def test_the_p90s_interval_covers_it_as_often_as_stated():
    random = np.random.default_rng(3)
    true = stats.expon.ppf(0.9)
    found = [percentile_interval(random.exponential(size=300), 0.9) for _ in range(400)]
    covered = np.mean([each.low <= true <= each.high for each in found])
    assert 0.93 <= covered <= 0.995
    assert percentile_interval(np.arange(1.0, 1001.0), 0.9).mean == pytest.approx(900.1)


def test_a_long_run_is_resampled_within_bounds_of_memory():
    random = np.random.default_rng(4)
    ours, theirs = random.normal(10, 1, 60_000), random.normal(20, 1, 60_000)
    found = ratio_of_medians(ours, theirs)
    assert found.mean == pytest.approx(0.5, abs=0.002)
    # A median's standard error is 1.2533 sigma / sqrt(n); relative errors of 10% and 5% add in squares.
    expected = 2 * 1.96 * 0.5 * 1.2533 * np.hypot(0.1, 0.05) / np.sqrt(60_000)
    assert found.high - found.low == pytest.approx(expected, rel=0.3)


def call_both(other=True, **changes):
    calls = []
    limits = {"queries": 6, "warmup": 1, "seconds": 0.0, "limit_seconds": 60.0, **changes}
    found = interleave(lambda: calls.append("a"), (lambda: calls.append("b")) if other else None, **limits)
    return "".join(calls), *found


def test_calls_alternate_in_both_orders():
    calls, a, b, _ = call_both()
    assert calls == "ab" + "abbaabbaabba"
    assert len(a.wall) == len(b.wall) == len(a.cpu) == 6


def test_one_alone_is_called_alone():
    calls, a, b, _ = call_both(other=False)
    assert calls == "a" * 7
    assert (len(a.wall), b) == (6, None)


def test_fast_calls_go_on_until_they_took_long_enough():
    _, a, _, kernel = call_both(warmup=0, seconds=0.02)
    assert a.wall.sum() >= 0.02e9
    assert len(a.wall) > 6
    assert (kernel > 0).all()


def test_the_time_limit_stops_a_slow_model_after_one_pair_at_least():
    _, a, _, _ = call_both(seconds=60.0, limit_seconds=0.0)
    assert len(a.wall) == 1


def test_the_kernel_takes_time():
    assert calibration_kernel()() > 1000


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system has no processor affinity")
def test_the_run_is_held_to_its_processors_and_let_go():
    before = os.sched_getaffinity(0)
    with pinned(1) as cores:
        assert os.sched_getaffinity(0) == set(cores) <= before
        assert len(cores) == 1
    with pinned(len(before)) as cores:
        assert set(cores) == before
    assert os.sched_getaffinity(0) == before


def test_all_calls_are_kept_in_brief():
    wall = np.concatenate([np.full(500, 2_000_000), np.full(499, 4_000_000), [90_000_000]])
    kept = call_times(wall)
    assert len(kept.percentiles_ms) == 101
    assert list(kept.percentiles_ms) == [float(np.percentile(wall, p)) / 1e6 for p in range(101)]
    # The second half was slower, and the course says so; one slow call does not hide it.
    assert (kept.course_ms[0], kept.course_ms[-1], len(kept.course_ms)) == (2.0, 4.0, 60)
    assert call_times(wall[:3]).course_ms == (2.0, 2.0, 2.0)


def test_a_run_keeps_the_calls_of_both():
    both = summarise(
        Timings(np.arange(1, 11) * 1_000_000, np.arange(1, 11)),
        Timings(np.arange(1, 11) * 2_000_000, np.arange(1, 11)),
        np.array([], dtype=np.int64),
        threads=1,
        warmup=0,
        cores=(),
        input_shapes={},
    )
    assert both.calls is not None
    assert both.baseline_calls is not None
    assert (both.calls.percentiles_ms[0], both.calls.percentiles_ms[100]) == (1.0, 10.0)
    assert both.calls.percentiles_ms[90] == pytest.approx(both.p90_ms)
    assert both.baseline_calls.percentiles_ms[50] == pytest.approx(both.baseline_p50_ms)
