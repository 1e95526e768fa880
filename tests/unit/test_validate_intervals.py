"""Confidence intervals against scipy and by hand."""

import numpy as np
import pytest
from scipy import stats

from edgeport.validate.intervals import mean_interval, ratio_of_medians, share_interval, tail_probability, wilson


def test_mean_interval_agrees_with_student_t_on_normal_data():
    values = np.random.default_rng(5).normal(size=200)
    interval = mean_interval(values)
    low, high = stats.t.interval(0.95, len(values) - 1, values.mean(), stats.sem(values))
    assert interval.mean == pytest.approx(values.mean(), rel=1e-12)
    assert interval.low == pytest.approx(low, abs=0.01)
    assert interval.high == pytest.approx(high, abs=0.01)


def test_wilson_agrees_with_scipy():
    for hits, n in [(20, 20), (0, 7), (19, 20), (5, 9)]:
        expected = stats.binomtest(hits, n).proportion_ci(0.95, method="wilson")
        assert wilson(hits, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_full_agreement_claims_no_certainty():
    interval = share_interval([1] * 20, [1] * 20)
    assert (interval.mean, interval.high) == (1.0, 1.0)
    assert interval.low == pytest.approx(0.8389, abs=1e-4)
    assert share_interval([0, 0], [5, 5]).low == 0.0


def test_weights_are_positions():
    interval = mean_interval([10.0, 1.0], [20, 1])
    assert interval.mean == pytest.approx(11 / 21, rel=1e-12)


def test_one_sample_has_no_spread():
    interval = mean_interval([0.25])
    assert (interval.mean, interval.low, interval.high, interval.n) == (0.25, 0.25, 0.25, 1)


def test_small_samples_get_wider_percentiles():
    assert tail_probability(5) < tail_probability(20) < tail_probability(1000) < 0.025
    assert tail_probability(100000) == pytest.approx(0.025, abs=1e-4)


def test_intervals_are_the_same_every_time():
    values = np.random.default_rng(1).normal(size=30)
    assert mean_interval(values) == mean_interval(values)
    assert ratio_of_medians(values**2 + 1, values**2 + 2) == ratio_of_medians(values**2 + 1, values**2 + 2)
