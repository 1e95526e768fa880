"""`edgeport compress` with data: what it says while it runs and of its cost, and calibration that the model writes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from edgeport.cli.main import main
from edgeport.compression import CompressRequest, compress
from edgeport.errors import BadInputError
from edgeport.model.compressed import RECORD
from edgeport.recipe import Recipe
from edgeport.schema import parse_mapping
from edgeport.storage import cache_root, hash_tree, read_json
from edgeport.vectors import load_vectors

FORMATS = {"linear": "int4_g32", "embedding": "int4_g32", "activations": ["dynamic_int8", "float"]}
GENERATED = {"samples": 12, "source": "generated"}


def recipe(*steps: dict[str, object], calibration: dict[str, object]) -> Recipe:
    values = {"name": "x", "summary": "x", "compress": list(steps), "calibration": calibration, "gate": {}}
    return parse_mapping(Recipe, values, "test")


def written() -> dict[Path, int]:
    """The calibration texts in the cache, and when they were written."""
    return {path: path.stat().st_mtime_ns for path in (cache_root() / "stages" / "generated").rglob("*.safetensors")}


def test_texts_that_the_model_writes_are_made_once_and_recorded(
    tiny_model: Callable[[str], Path], tmp_path: Path, own_cache: Path
):
    model = str(tiny_model("llama"))
    gptq = recipe({"method": "gptq", **FORMATS}, calibration=GENERATED)
    first = compress(CompressRequest(model, gptq, tmp_path / "one", samples=4))
    texts = written()
    assert len(texts) == 1
    stored = load_vectors(next(iter(texts)))
    tokens = sum(text["input_ids"].size for text in stored)
    assert len(stored) == 12
    assert (first.cost.samples, first.cost.tokens, first.cost.weights_before) == (12, tokens, 0)
    assert first.cost.weights == sum(layer.sha256 is not None for layer in first.layers)
    assert first.cost.cpu_seconds > 0
    assert first.cost.peak_rss_mb >= first.cost.start_rss_mb > 50

    # The same again, from the cache: the cost is that of the run that made it.
    again = compress(CompressRequest(model, gptq, tmp_path / "two", samples=4))
    assert again.cost == first.cost
    assert hash_tree(tmp_path / "one") == hash_tree(tmp_path / "two")
    record = read_json(tmp_path / "one" / RECORD)
    assert record["calibration"]["name"] == "generated"
    assert record["calibration"]["real"] is False
    assert not re.search("cpu_seconds|rss_mb", (tmp_path / "one" / RECORD).read_text())

    # Another recipe reads the same texts; training on them goes through to the folder.
    train = {"method": "qat", "steps": 8}
    tuned = compress(
        CompressRequest(
            model, recipe({"method": "gptq", **FORMATS}, train, calibration=GENERATED), tmp_path / "three", samples=4
        )
    )
    assert written() == texts
    methods = {layer.method for layer in tuned.layers}
    assert methods & {"gptq+qat", "gptq"}
    assert tuned.bytes_after == first.bytes_after


def test_a_model_that_writes_nothing_is_refused_before_anything_runs(
    tiny_model: Callable[[str], Path], tmp_path: Path, own_cache: Path
):
    asked = recipe({"method": "gptq", **FORMATS}, calibration=GENERATED)
    with pytest.raises(BadInputError, match="does not write texts"):
        compress(CompressRequest(str(tiny_model("bert")), asked, tmp_path / "out"))
    assert not (own_cache / "stages").exists()


def test_the_command_says_how_each_block_went_and_what_it_cost(
    tiny_model: Callable[[str], Path], tmp_path: Path, own_cache: Path, capfd: pytest.CaptureFixture[str]
):
    path = tmp_path / "mine.toml"
    path.write_text(
        'schema_version = 1\nname = "mine"\nsummary = "x"\n[[compress]]\nmethod = "gptq"\nlinear = "int4_g32"\n'
        'embedding = "int8"\n[calibration]\nsamples = 12\nsource = "generated"\n[gate]\n'
    )
    arguments = ["compress", str(tiny_model("llama")), "--recipe", str(path), "--samples", "4"]
    assert main([*arguments, "-o", str(tmp_path / "out"), "--json"]) == 0
    out, err = capfd.readouterr()
    document = json.loads(out)
    assert document["cost"]["samples"] == 12
    assert document["cost"]["weights"] == 15
    blocks = re.findall(r"\] (model\.layers\.\d): 7 weights, output error ([\d.]+), worst", err)
    assert [name for name, _ in blocks] == ["model.layers.0", "model.layers.1"]
    for name, mean in blocks:
        errors = [layer["output_error"] for layer in document["layers"] if layer["name"].startswith(name)]
        assert float(mean) == pytest.approx(sum(errors) / 7, abs=5.1e-5)
    assert main([*arguments, "-o", str(tmp_path / "table")]) == 0
    out, _ = capfd.readouterr()
    assert re.search(r"cost\s.*s of processor time; peak \d+ MB, \d+ MB when it began; 15 weights; 12 inputs", out)
