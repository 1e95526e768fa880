"""The bench of structured compression: its recipes can be read, and its words say who is better."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from edgeport.recipe import load_recipe

BENCH = Path(__file__).resolve().parents[2] / "scripts" / "bench"


@pytest.fixture(scope="module", autouse=True)
def _scripts_find_each_other() -> Iterator[None]:
    sys.path.insert(0, str(BENCH))
    yield
    sys.path.remove(str(BENCH))


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, BENCH / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def test_every_row_is_a_recipe_and_compares_with_a_row_that_is_there(tmp_path: Path) -> None:
    bench = load("structured")
    rows = bench.ROWS
    labels = [row.label for row in rows]
    assert len({bench.slug(label) for label in labels}) == len(labels)
    for row in rows:
        recipe = load_recipe(str(bench.recipe_file(row, tmp_path)))
        assert [step.method for step in recipe.compress] == [step["method"] for step in row.steps]
        for other in (*row.against, None if row.source == bench.PUBLISHED_L3 else row.source):
            assert other is None or f"{row.model} {other}" in labels
        # Times are held against the original's file of the same runtime.
        original = rows[labels.index(f"{row.model} {bench.ORIGINAL}")]
        assert set(row.targets) <= set(original.targets)


def task(scores: np.ndarray, unit: str, *, higher: bool) -> dict[str, Any]:
    mean = float(scores.mean())
    score = {"mean": mean, "low": mean - 0.1, "high": mean + 0.1, "n": len(scores)}
    kept = {"scores": scores.tolist(), "weights": None, "n": len(scores)}
    return {"unit": unit, "higher_is_better": higher, "score": score, **kept}


def record(scores: np.ndarray, unit: str, *, higher: bool, file: int = 100) -> dict[str, Any]:
    cell = {
        "bytes": 2_500_000,
        "likeness": "cosine",
        "parity": {"mean": 0.5, "low": 0.4, "high": 0.6, "n": 9},
        "time_ratio": {"mean": 0.5, "low": 0.4, "high": 0.625, "n": 9},
        "products": {"file": file * 1_000_000, "model": 100_000_000},
    }
    name = "language" if unit == "nats" else "sentiment"
    return {
        "parameters": 1_000_000,
        "cells": {"linux-x86_64-ort": cell},
        "tasks": {name: task(scores, unit, higher=higher)},
    }


@pytest.mark.parametrize(("unit", "higher"), [("nats", False), ("share", True)])
def test_who_is_better_is_said_in_the_direction_of_the_metric(unit: str, higher: bool) -> None:
    table, rows = load("structured_table"), load("structured_rows")
    random = np.random.default_rng(0)
    low = (random.random(200) < 0.2).astype(float) if unit == "share" else random.normal(2.0, 0.1, 200)
    high = (random.random(200) < 0.9).astype(float) if unit == "share" else random.normal(3.0, 0.1, 200)
    pair = [
        (rows.Row("minilm", "a"), record(low, unit, higher=higher)),
        (rows.Row("minilm", "b", against=("a",)), record(high, unit, higher=higher)),
    ]
    (words,) = table.verdicts(pair)
    assert ("better by +" if higher else "worse by -") in words
    same = [pair[0], (rows.Row("minilm", "b", against=("a",)), pair[0][1])]
    assert "can't be told apart" in table.verdicts(same)[0]


def test_a_table_has_speed_up_and_says_where_a_file_makes_more_products() -> None:
    table, rows = load("structured_table"), load("structured_rows")
    scores = np.linspace(2.0, 3.0, 20)
    made = [
        (rows.Row("minilm", "a"), record(scores, "nats", higher=False)),
        (rows.Row("minilm", "b"), record(scores, "nats", higher=False, file=130)),
    ]
    lines = table.table(made).splitlines()
    assert "| 2.00x (1.60 to 2.50) |" in lines[2]
    # The exponential of a mean loss of 2.5 nats.
    assert "| 12.2 (11.0 to 13.5) |" in lines[2]
    assert "100 |" in lines[2]
    assert "130 (100 in the model)" in lines[3]
