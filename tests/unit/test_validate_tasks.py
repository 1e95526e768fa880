"""A suite's evidence: scores in, intervals out, and a broken original refused."""

import numpy as np
import pytest
from scipy import stats

from edgeport.errors import BadInputError
from edgeport.storage import canonical_json
from edgeport.validate.evidence import DataRecord, TaskScore
from edgeport.validate.tasks import differences, score_bounds, score_task

DATA = DataRecord(name="d", real=True, sha256={"f": "0"}, slice="all", licence=None, samples=200)
RIGHT = np.repeat([1.0, 0.0], [160, 40])
"""160 of 200 right; the artifact loses 12 of them and gains 4 others."""
FLIPPED = np.r_[np.zeros(12), np.ones(148), np.ones(4), np.zeros(36)]


def task(original=RIGHT, artifact=FLIPPED, **changes):
    fields = {"suite": "s", "metric": "accuracy", "unit": "share", "chance": 0.5, "data": DATA, **changes}
    return score_task(original=list(original), artifact=list(artifact), **fields)


def test_right_or_wrong_scores():
    found = task()
    assert (found.original.mean, found.artifact.mean, found.n) == (0.8, 0.76, 200)
    assert (found.worse, found.better) == (12, 4)
    assert found.mcnemar_p == pytest.approx(stats.binomtest(4, 16, 0.5).pvalue, rel=1e-12)
    assert found.difference.mean == pytest.approx(-0.04)
    assert found.difference.low < -0.04 < found.difference.high < 0.002
    assert found.baseline_problem is None
    assert TaskScore.model_validate_json(canonical_json(found.model_dump(mode="json"))) == found


def test_an_error_rate_is_the_same_mirrored():
    right, wrong = task(), task(1 - RIGHT, 1 - FLIPPED, metric="error", higher_is_better=False)
    assert (wrong.worse, wrong.better, wrong.mcnemar_p) == (right.worse, right.better, right.mcnemar_p)
    assert wrong.difference.mean == pytest.approx(0.04)
    assert wrong.difference.low == pytest.approx(-right.difference.high, abs=1e-9)
    assert differences(wrong, confidence=0.95) == differences(right, confidence=0.95)
    assert wrong.baseline_problem is None


def test_weighted_scores_are_a_weighted_mean():
    errors, words = np.array([0.5, 0.0, 0.25, 0.1] * 10), np.array([4, 10, 8, 20] * 10)
    found = task(errors, errors + 0.1, metric="wer", higher_is_better=False, weights=list(words), chance=1.0)
    assert found.original.mean == pytest.approx((errors * words).sum() / words.sum(), rel=1e-12)
    assert found.difference.mean == pytest.approx(0.1, rel=1e-9)
    assert found.mcnemar_p is None
    assert (found.worse, found.better) == (40, 0)


BROKEN = [
    (np.repeat([1.0, 0.0], [105, 95]), {}, "not better than chance"),
    (np.repeat([1.0, 0.0], [60, 140]), {"chance": 1 / 3}, "not better than chance"),
    (np.r_[RIGHT[:-1], np.nan], {}, "not finite on 1 of 200"),
    (RIGHT, {"answers": ["yes"] * 200}, "same answer ('yes') to all 200"),
    (np.r_[np.full(100, 3.2), np.full(100, 3.0)], {"unit": "nats", "chance": 3.0, "higher_is_better": False}, "chance"),
    ([0.4], {"chance": 0.1}, "chance"),
]


@pytest.mark.parametrize(("original", "changes", "words"), BROKEN)
def test_a_broken_original_is_no_yardstick(original, changes, words):
    found = task(original, np.ones(len(original)), **changes)
    assert words in found.baseline_problem


def test_a_sound_original_is_one():
    assert task(answers=["yes", "no"] * 100).baseline_problem is None
    assert task(np.repeat([1.0, 0.0], [90, 110]), chance=1 / 3).baseline_problem is None
    losses = np.random.default_rng(1).normal(2.0, 0.3, 200)
    found = task(losses, losses, unit="nats", chance=3.0, higher_is_better=False)
    assert found.baseline_problem is None
    assert (found.worse, found.better) == (0, 0)


def test_an_artifact_that_gives_nothing_usable_keeps_its_document_whole():
    found = task(artifact=np.r_[FLIPPED[:-1], np.inf])
    assert found.artifact is None
    assert found.difference is None
    assert found.artifact_scores[-1] is None
    assert found.baseline_problem is None
    assert differences(found, confidence=0.95) is None
    assert score_bounds(found, confidence=0.95) is None
    assert TaskScore.model_validate_json(canonical_json(found.model_dump(mode="json"))) == found


def test_bounds_of_the_score_itself():
    low, high = score_bounds(task(), confidence=0.975)
    expected = stats.binomtest(152, 200).proportion_ci(0.95, method="wilson")
    assert (low, high) == pytest.approx((expected.low, expected.high), rel=1e-9)


@pytest.mark.parametrize("changes", [{"artifact": [1.0]}, {"original": [], "artifact": []}, {"weights": [1.0, 2.0]}])
def test_scores_that_do_not_belong_together_are_refused(changes):
    with pytest.raises(BadInputError, match="suite needs"):
        task(**changes)
