"""Budgets carry their unit: what each text means, and what each wrong one is told."""

import pytest

from edgeport.budgets import Budgets, load_budgets
from edgeport.errors import BadInputError
from edgeport.recipe import load_recipe
from edgeport.units import count_bytes, milliseconds, read_margin, read_nats, read_ratio, read_share

MEANINGS = [
    (read_share, 0.98, 0.98),
    (read_share, "98%", 0.98),
    (read_share, 1, 1.0),
    (read_ratio, "45%", 0.45),
    (read_ratio, "0.45x", 0.45),
    (read_ratio, 1.5, 1.5),
    (read_nats, "0.1 nats", 0.1),
    (milliseconds, "20 ms", 20.0),
    (milliseconds, "1.5 s", 1500.0),
    (milliseconds, "300us", 0.3),
    (count_bytes, "25 MB", 25e6),
    (count_bytes, "1 MiB", 1048576.0),
    (count_bytes, "800 kB", 8e5),
]


@pytest.mark.parametrize(("read", "text", "value"), MEANINGS)
def test_what_a_quantity_means(read, text, value):
    assert read(text) == pytest.approx(value, rel=1e-12)


REFUSED = [
    (read_share, 98, 'written 0.98 or "98%"'),
    (read_share, 10, 'written 0.1 or "10%"'),
    (read_share, -0.1, "from 0 to 1"),
    (read_share, "3 points", "no unit 'points'"),
    (read_share, "120%", "from 0 to 1"),
    (read_ratio, "25 MB", "no unit 'MB'"),
    (read_ratio, 0, "above 0"),
    (read_nats, "1%", "no unit '%'"),
    (milliseconds, 20, '"20 ms"'),
    (milliseconds, "20 MB", "unit 'MB'"),
    (milliseconds, "0 ms", "above 0"),
    (count_bytes, 25000000, "MB"),
    (count_bytes, "25 ms", "unit 'ms'"),
    (read_share, True, "must be a number"),
    (read_share, "many", "must be a number"),
    (read_share, None, "must be a number"),
    (read_share, "nan", "must be a number"),
]


@pytest.mark.parametrize(("read", "text", "words"), REFUSED)
def test_what_is_refused_says_what_would_be_right(read, text, words):
    with pytest.raises(ValueError, match=r".") as caught:
        read(text)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("text", "unit", "original", "margin"),
    [
        ("1 point", "share", 0.8, 0.01),
        ("2.5 points", "correlation", 0.8, 0.025),
        ("1% relative", "share", 0.8, 0.008),
        ("5% relative", "nats", 3.0, 0.15),
        ("0.05 nats", "nats", 3.0, 0.05),
        (0.01, "share", 0.8, 0.01),
        ("0.5", "score", 12.0, 0.5),
    ],
)
def test_margins_in_the_metrics_own_unit(text, unit, original, margin):
    assert read_margin(text).absolute(original, unit) == pytest.approx(margin, rel=1e-12)


@pytest.mark.parametrize(
    ("text", "unit", "words"),
    [
        (10, "share", '"10 points" or 0.1'),
        (1, "share", "whole range"),
        ("150 points", "share", "whole range"),
        ("1 point", "nats", "1% relative"),
        ("0.1 nats", "share", "1 point"),
    ],
)
def test_a_margin_that_does_not_fit_its_metric_is_refused(text, unit, words):
    with pytest.raises(ValueError, match=r".") as caught:
        read_margin(text).absolute(0.8, unit)
    assert words in str(caught.value)


def test_a_bare_percent_has_two_readings_and_is_refused():
    with pytest.raises(ValueError, match='"1% relative"') as caught:
        read_margin("1%")
    assert "points" in str(caught.value)
    for text in ("0 points", "-1 point", "100% relative", "1 ms"):
        with pytest.raises(ValueError, match=r"."):
            read_margin(text)


WRONG_FILES = [
    ("cosine_min = 98", "cosine_min", '"98%"'),
    ("latency_p90_max = 20", "latency_p90_max", '"20 ms"'),
    ('[accuracy.intents]\ndrop_max = "1%"', "accuracy.intents.drop_max", "relative"),
    ("[accuracy.intents]\nconfidence = 95", "accuracy.intents.confidence", "less than 1"),
    ('size_max = "25 ms"', "size_max", "MB"),
]


@pytest.mark.parametrize(("text", "key", "words"), WRONG_FILES)
def test_a_wrong_file_names_key_and_remedy(text, key, words, tmp_path):
    path = tmp_path / "budgets.toml"
    path.write_text(text)
    with pytest.raises(BadInputError) as caught:
        load_budgets(path)
    assert key in caught.value.what
    assert words in caught.value.what
    assert caught.value.where == str(path)


def test_an_unknown_budget_names_the_allowed_ones(tmp_path):
    path = tmp_path / "budgets.toml"
    path.write_text("[accuracy.intents]\ndrop = 0.1")
    with pytest.raises(BadInputError) as caught:
        load_budgets(path)
    assert caught.value.allowed == "drop_max, score_min, confidence"


def test_budgets_survive_the_manifest(tmp_path):
    path = tmp_path / "budgets.toml"
    path.write_text(
        'cosine_min = "98%"\nlatency_p90_max = "20 ms"\nsize_max = "25 MB"\n'
        '[accuracy."*"]\ndrop_max = "1 point"\n[regression]\nsize_growth_max = "5%"\n'
    )
    read = load_budgets(path)
    assert (read.cosine_min, read.latency_p90_max, read.regression.size_growth_max) == (0.98, "20 ms", 0.05)
    assert Budgets.model_validate_json(read.model_dump_json()) == read
    assert read.times
    assert not load_recipe("int8").gate.times
