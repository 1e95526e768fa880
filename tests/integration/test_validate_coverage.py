"""Simulation: confidence intervals hold the truth about as often as they say."""

import numpy as np
import pytest

from edgeport.validate.intervals import mean_interval, ratio_of_medians, share_interval


def coverage(draw, truth, repeats=200):
    """Share of intervals, each from fresh data, that hold the truth."""
    random = np.random.default_rng(11)
    hits = 0
    for _ in range(repeats):
        interval = draw(random)
        hits += interval.low <= truth <= interval.high
    return hits / repeats


# With 200 repeats the standard error of a coverage of 95% is 1.5 points: three of them are 4.6 points.
@pytest.mark.parametrize("n", [8, 20, 64])
def test_mean_interval_covers(n):
    assert coverage(lambda random: mean_interval(random.normal(2.0, 3.0, size=n)), 2.0) == pytest.approx(
        0.95, abs=0.046
    )


def test_share_of_positions_covers_with_texts_as_the_unit():
    """Positions of one text agree together; an interval that took each as independent would be far too narrow."""

    def draw(random):
        rates = random.beta(8, 2, size=50)
        tokens = random.integers(20, 60, size=50)
        return share_interval(random.binomial(tokens, rates), tokens)

    assert coverage(draw, 0.8) == pytest.approx(0.95, abs=0.046)


def test_ratio_of_medians_covers():
    def draw(random):
        common = random.gamma(20, size=60)
        return ratio_of_medians(0.5 * common * random.normal(1, 0.05, 60), common * random.normal(1, 0.05, 60))

    assert coverage(draw, 0.5, repeats=150) == pytest.approx(0.95, abs=0.055)
