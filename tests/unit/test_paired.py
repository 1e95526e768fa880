"""Paired statistics against published values, slow independent implementations, and their own promise by simulation."""

import math

import numpy as np
import pytest
from scipy import optimize, stats

from edgeport.validate.paired import (
    LEAST_CHANGED,
    compare_scores,
    mcnemar,
    pseudo_values,
    rarely,
    studentized,
    tango,
)

MARGIN = 0.02


def likelihood_score(worse, better, n, difference):
    """Tango's statistic, with the nuisance share found by maximising the multinomial likelihood numerically."""

    def negative(share):
        same = 1 - 2 * share - difference
        return -stats.multinomial.logpmf([worse, better, n - worse - better], n, [share, share + difference, same])

    low, high = max(0.0, -difference), (1 - difference) / 2
    share = optimize.minimize_scalar(negative, bounds=(low, high), method="bounded", options={"xatol": 1e-12}).x
    return (better - worse - n * difference) / math.sqrt(n * (2 * share + difference - difference**2))


@pytest.mark.parametrize(("worse", "better", "n"), [(12, 2, 44), (30, 21, 400), (3, 16, 100), (60, 5, 200)])
def test_the_ends_of_tangos_interval_are_where_his_score_is_the_quantile(worse, better, n):
    low, high = tango(worse, better, n, 0.95)
    assert low < (better - worse) / n < high
    quantile = stats.norm.ppf(0.95)
    assert likelihood_score(worse, better, n, low) == pytest.approx(quantile, abs=1e-4)
    assert likelihood_score(worse, better, n, high) == pytest.approx(-quantile, abs=1e-4)


def test_tangos_interval_of_no_change_and_of_everything():
    # No change in n: the score is sqrt(n d / (1 - d)), so the end is z^2 / (n + z^2).
    z = stats.norm.ppf(0.975)
    assert tango(0, 0, 44, 0.975) == pytest.approx((-(z**2) / (44 + z**2), z**2 / (44 + z**2)), abs=1e-9)
    assert tango(50, 0, 50, 0.95)[0] == -1.0
    assert tango(0, 50, 50, 0.95)[1] == 1.0


def test_mcnemars_exact_test():
    # Agresti, Categorical Data Analysis: 9 against 1 discordant pairs, 2 * 11 / 1024.
    assert mcnemar(1, 9) == pytest.approx(22 / 1024, rel=1e-12)
    assert mcnemar(0, 0) == mcnemar(7, 7) == 1.0


def test_the_studentized_bootstrap_agrees_with_student_on_normal_differences():
    values = np.random.default_rng(4).normal(0.3, 1.0, (400, 1))
    low, high = studentized(values, np.ones(400), confidence=0.95)
    expected = stats.t.interval(0.90, 399, values.mean(), stats.sem(values[:, 0]))
    assert (low[0], high[0]) == pytest.approx(expected, abs=0.012)


def test_weights_are_whole_samples_not_repeated_ones():
    """Ten times the weight on all samples changes nothing; the mean is the weighted one."""
    random = np.random.default_rng(2)
    before, after, weights = random.normal(size=60), random.normal(size=60), random.integers(1, 9, 60).astype(float)
    one = compare_scores(before, after, unit="score", confidence=0.95, weights=weights)
    ten = compare_scores(before, after, unit="score", confidence=0.95, weights=10 * weights)
    assert one.mean == pytest.approx(np.average(after - before, weights=weights), rel=1e-12)
    assert (one.lower, one.upper, one.deviation) == pytest.approx((ten.lower, ten.upper, ten.deviation), rel=1e-9)
    assert one.lower < one.mean < one.upper


def test_what_rarely_changes_claims_no_certainty():
    same = np.ones(100)
    found = compare_scores(same, same, unit="share", confidence=0.95)
    exact = stats.beta.ppf(0.975, 1, 100)
    assert (found.lower, found.upper) == pytest.approx((-exact, exact), rel=1e-12)
    assert found.decide(0.01) == "undecided"
    assert found.decide(0.05) == "no worse"
    needed = found.samples_needed(0.01, 0.95)
    many = np.ones(needed)
    assert compare_scores(many, many, unit="share", confidence=0.95).decide(0.01) == "no worse"
    assert rarely(9, 0, 100, 0.95, least=1.0, most=1.0)[1] < 0 < rarely(9, 0, 100, 0.95, least=0.0, most=1.0)[1]
    assert LEAST_CHANGED > 9


def test_one_sample_decides_nothing():
    found = compare_scores(np.array([1.0]), np.array([0.0]), unit="share", confidence=0.95)
    assert (found.lower, found.upper) == (-math.inf, math.inf)
    assert found.decide(0.5) == "undecided"


def flips(random, n, worse, better, runs):
    """(worse, better) counts of right-or-wrong scores, one row a run."""
    return random.multinomial(n, [worse, better, 1 - worse - better], size=runs)[:, :2]


def decisions(counts, n, margin):
    ends = {pair: tango(*pair, n, 0.95) if sum(pair) >= LEAST_CHANGED else None for pair in set(map(tuple, counts))}
    for pair, end in ends.items():
        ends[pair] = rarely(*pair, n, 0.95, least=1.0, most=1.0) if end is None else end
    found = np.array([ends[tuple(pair)] for pair in counts])
    return (found[:, 0] >= -margin).mean(), (found[:, 1] < -margin).mean()


LEVEL = 0.05 + 2.6 * math.sqrt(0.05 * 0.95 / 1000)
"""What a test that is wrong in exactly 5% stays below in 99.5 of 100 simulations of 1000 runs."""


@pytest.mark.parametrize("changed", [0.03, 0.1, 0.3])
def test_right_or_wrong_scores_are_misjudged_no_more_often_than_stated(changed):
    """At the very margin both errors are largest: "no worse" is then wrong, and so is "worse"."""
    counts = flips(np.random.default_rng(11), 600, (changed + MARGIN) / 2, (changed - MARGIN) / 2, 1000)
    passed, failed = decisions(counts, 600, MARGIN)
    assert passed <= LEVEL
    assert failed <= LEVEL


def test_an_equal_artifact_is_almost_never_called_worse_and_mostly_passes():
    """The false alarms that CI would see, and the power, with the number of samples that is asked for."""
    random = np.random.default_rng(12)
    needed = compare_scores(
        np.repeat([1.0, 0.0, 1.0], [5, 5, 90]), np.repeat([0.0, 1.0, 1.0], [5, 5, 90]), unit="share", confidence=0.95
    ).samples_needed(MARGIN, 0.95)
    passed, failed = decisions(flips(random, needed, 0.05, 0.05, 1000), needed, MARGIN)
    assert failed <= 0.005
    assert passed >= 0.8 - 2.6 * math.sqrt(0.8 * 0.2 / 1000)
    # Twice the margin worse: found, and not passed.
    passed, failed = decisions(flips(random, needed, 0.07, 0.03, 1000), needed, MARGIN)
    assert passed <= 0.005
    assert failed >= 0.8 - 2.6 * math.sqrt(0.8 * 0.2 / 1000)


@pytest.mark.parametrize(
    "draw",
    [
        lambda random, shape: random.normal(0.0, 1.0, shape),
        lambda random, shape: random.uniform(-1.0, 1.0, shape),
        lambda random, shape: np.where(random.random(shape) < 0.1, random.normal(-1.0, 1.0, shape), 0.0) + 0.1,
    ],
    ids=["normal", "uniform", "one in ten"],
)
def test_other_scores_are_misjudged_no_more_often_than_stated(draw):
    """All differences have the mean 0: the margin's edge, moved there. 1000 runs share their resamples."""
    values = draw(np.random.default_rng(13), (200, 1000))
    low, high = studentized(values, np.ones(200), confidence=0.95, resamples=500)
    assert (low > 0).mean() <= LEVEL
    assert (high < 0).mean() <= LEVEL
    # And it is no empty promise: bounds as wide as that would be far rarer.
    assert (low > 0).mean() + (high < 0).mean() >= 0.05


def test_pseudo_values_of_a_mean_are_the_scores_and_of_a_correlation_have_its_error():
    random = np.random.default_rng(5)
    scores = random.normal(size=30)
    without = np.array([np.delete(scores, at).mean() for at in range(30)])
    assert pseudo_values(scores.mean(), without) == pytest.approx(scores, rel=1e-9)
    x = random.normal(size=300)
    y = 0.8 * x + 0.6 * random.normal(size=300)
    correlation = np.corrcoef(x, y)[0, 1]
    without = np.array([np.corrcoef(np.delete(x, at), np.delete(y, at))[0, 1] for at in range(300)])
    values = pseudo_values(correlation, without)
    assert values.mean() == pytest.approx(correlation, abs=0.003)
    # Fisher: the standard error of a correlation of normal variables is (1 - r^2) / sqrt(n).
    assert values.std(ddof=1) / math.sqrt(300) == pytest.approx((1 - correlation**2) / math.sqrt(300), rel=0.15)


def test_bounds_are_the_same_every_time():
    values = np.random.default_rng(1).normal(size=(50, 1))
    first, second = (studentized(values, np.ones(50), confidence=0.95) for _ in range(2))
    assert np.array_equal(first, second)
