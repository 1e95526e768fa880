"""The whole pipeline on tiny models: proof, determinism, resuming after SIGKILL, faults that must not pass."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgeport.errors import EXIT_PARITY, BadInputError, TargetRefusesError
from edgeport.job import ExportRequest
from edgeport.pipeline import export, plan
from edgeport.recipe import Recipe, load_recipe
from edgeport.report import strip_evidence
from edgeport.storage import hash_file, list_files
from edgeport.target import load_target
from edgeport.validating import validate_bundle

ORT = "linux-x86_64-ort"


def for_tiny(recipe: Recipe) -> Recipe:
    """The recipe without the size budget: a tiny model's file is mostly graph, whatever its weights are."""
    return recipe.model_copy(update={"gate": recipe.gate.model_copy(update={"size_ratio_max": None})})


def request(model: Path | str, output: Path, *, target: str = ORT, recipe: str = "int8", **options) -> ExportRequest:
    return ExportRequest(
        model=str(model),
        target=load_target(target),
        recipe=for_tiny(load_recipe(recipe)),
        output=output,
        **{"samples": 16, "quick": True, **options},
    )


DRIVER = textwrap.dedent(
    """
    import os, signal, sys, threading
    from pathlib import Path
    from edgeport.job import ExportRequest
    from edgeport.pipeline import export
    from edgeport.recipe import load_recipe
    from edgeport.target import load_target

    model, output, target, recipe, kill_in = sys.argv[1:6]

    class Watch:
        def stage(self, name, detail=""):
            print("stage", name, flush=True)
            if name == kill_in:
                # In the middle of the stage, not on its edge.
                threading.Timer(0.02, os.kill, (os.getpid(), signal.SIGKILL)).start()
        def update(self, done, total, detail=""):
            pass
        def message(self, text):
            print("message", text, flush=True)

    plain = load_recipe(recipe)
    plain = plain.model_copy(update={"gate": plain.gate.model_copy(update={"size_ratio_max": None})})
    request = ExportRequest(model=model, target=load_target(target), recipe=plain,
                            output=Path(output), samples=16, quick=True)
    export(request, Watch())
    """
)


def drive(
    model: Path, output: Path, cache: Path, *, kill_in: str = "-", seed: str = "0"
) -> subprocess.CompletedProcess:
    environment = {**os.environ, "EDGEPORT_CACHE": str(cache), "PYTHONHASHSEED": seed}
    arguments = [sys.executable, "-c", DRIVER, str(model), str(output), ORT, "int8", kill_in]
    return subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)


def comparable(bundle: Path) -> dict[str, str]:
    """Every file's content but evidence.json; of report.html what is not evidence."""
    files = {}
    for path in list_files(bundle):
        name = path.relative_to(bundle).as_posix()
        if name == "report.html":
            files[name] = strip_evidence(path.read_text())
        elif name != "evidence.json":
            files[name] = hash_file(path)
    return files


@pytest.fixture(scope="session")
def bert_bundle(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("bundles") / "bert"
    result = export(request(tiny_model("bert"), output))
    assert result.verdict.passed, result.verdict
    return output


def test_a_bundle_carries_its_proof(bert_bundle: Path, tiny_model: Callable[[str], Path]):
    manifest = json.loads((bert_bundle / "manifest.json").read_text())
    evidence = json.loads((bert_bundle / "evidence.json").read_text())
    for name, entry in manifest["files"].items():
        assert hash_file(bert_bundle / name) == entry["sha256"]
    assert evidence["manifest_sha256"] == hash_file(bert_bundle / "manifest.json")
    assert evidence["states"] == {
        "lowered": "yes",
        "executed_here": "runtime",
        "numerics_verified": "yes",
        "statement": load_target(ORT).execution.statement,
    }
    weights = evidence["weights"]
    assert (
        weights["checked"] == weights["equal"] == sum(1 for row in manifest["layers"] if row["format"] == "int8") > 10
    )
    assert evidence["latency"]["valid"] is False, "a quick run is no claim"
    cost = evidence["compression"]
    assert cost["weights"] == weights["checked"]
    assert (cost["samples"], cost["tokens"], cost["weights_before"]) == (0, 0, 0)
    assert cost["peak_rss_mb"] >= cost["start_rss_mb"] > 50
    assert (bert_bundle / "assets" / "tokenizer.json").read_bytes() == (
        tiny_model("bert") / "tokenizer.json"
    ).read_bytes()


def test_golden_vectors_agree_with_transformers_own_model(bert_bundle: Path, tiny_model: Callable[[str], Path]):
    import torch
    from transformers import AutoModelForSequenceClassification

    from edgeport.vectors import load_vectors

    model = AutoModelForSequenceClassification.from_pretrained(tiny_model("bert")).eval()
    inputs = load_vectors(bert_bundle / "golden" / "inputs.safetensors")
    outputs = load_vectors(bert_bundle / "golden" / "outputs.safetensors")
    for call, expected in zip(inputs, outputs, strict=True):
        with torch.no_grad():
            logits = model(**{name: torch.from_numpy(value) for name, value in call.items()}).logits.numpy()
        np.testing.assert_allclose(expected["logits"], logits, rtol=1e-4, atol=1e-5)


def test_validating_a_bundle_measures_it_again(bert_bundle: Path):
    result = validate_bundle(bert_bundle, quick=True)
    assert result.exit_code == 0
    weights = result.evidence["weights"]
    assert weights["checked"] == weights["equal"] > 10
    first = json.loads((bert_bundle / "evidence.json").read_text())["parity"][0]
    assert result.evidence["parity"][0]["cosine"]["mean"] == pytest.approx(first["cosine"]["mean"], abs=0.02)


def test_a_bundle_is_the_same_bytes_in_two_processes(tiny_model: Callable[[str], Path], tmp_path: Path):
    for seed in ("1", "2"):
        done = drive(tiny_model("bert"), tmp_path / f"bundle-{seed}", tmp_path / f"cache-{seed}", seed=seed)
        assert done.returncode == 0, done.stderr
    first, second = comparable(tmp_path / "bundle-1"), comparable(tmp_path / "bundle-2")
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []


@pytest.mark.timeout(600)
def test_a_run_killed_in_each_stage_ends_with_the_same_bundle(
    tiny_model: Callable[[str], Path], bert_bundle: Path, tmp_path: Path
):
    output, cache = tmp_path / "bundle", tmp_path / "cache"
    for stage in ("load", "reference", "compress", "lower", "baseline", "validate", "bundle"):
        done = drive(tiny_model("bert"), output, cache, kill_in=stage)
        if done.returncode == 0:
            # The stage was over in less than the 20 ms that it was given.
            assert stage in ("compress", "bundle"), (stage, done.stdout)
            break
        assert done.returncode == -signal.SIGKILL, (stage, done.stderr)
        assert not output.exists(), f"a run killed in {stage} left an output folder"
    if not output.exists():
        done = drive(tiny_model("bert"), output, cache)
        assert done.returncode == 0, done.stderr
    assert comparable(output) == comparable(bert_bundle)
    leftovers = [path.name for path in tmp_path.iterdir() if path.name.endswith(".edgeport")]
    assert leftovers == []


def test_a_second_identical_run_computes_nothing(tiny_model: Callable[[str], Path], bert_bundle: Path, tmp_path: Path):
    again = request(tiny_model("bert"), tmp_path / "again")
    planned = plan(again)
    assert {stage.name: stage.cached for stage in planned.stages} == {
        "reference": True,
        "compress": True,
        "lower": True,
        "baseline": True,
        "validate": True,
    }
    export(again)
    assert comparable(tmp_path / "again") == comparable(bert_bundle)
    # Not measured again either: the evidence is the first run's.
    assert (tmp_path / "again" / "evidence.json").read_bytes() == (bert_bundle / "evidence.json").read_bytes()


def test_the_plan_predicts_the_size_and_writes_nothing(
    tiny_model: Callable[[str], Path], bert_bundle: Path, tmp_path: Path
):
    planned = plan(request(tiny_model("bert"), tmp_path / "planned"))
    assert not (tmp_path / "planned").exists()
    evidence = json.loads((bert_bundle / "evidence.json").read_text())
    assert planned.predicted_bytes == pytest.approx(evidence["size"]["bytes"], rel=0.35)
    assert any("bit for bit" in check for check in planned.checks)


def _break_weights(path: Path) -> None:
    """Set the largest int8 initializer of an ONNX file to zero."""
    import onnx
    from onnx import numpy_helper

    model = onnx.load(path)
    largest = max(
        (t for t in model.graph.initializer if t.data_type in (onnx.TensorProto.INT8, onnx.TensorProto.UINT8)),
        key=lambda t: np.prod(t.dims),
    )
    zeroed = np.zeros_like(numpy_helper.to_array(largest))
    largest.CopyFrom(numpy_helper.from_array(zeroed, largest.name))
    onnx.save(model, path)


def test_a_tampered_bundle_is_refused(bert_bundle: Path, tmp_path: Path):
    import shutil

    copy = tmp_path / "tampered"
    shutil.copytree(bert_bundle, copy)
    _break_weights(copy / "model" / "model.onnx")
    with pytest.raises(BadInputError, match=r"model\.onnx"):
        validate_bundle(copy, quick=True)


def test_a_broken_model_with_hashes_to_match_fails_the_gate(bert_bundle: Path, tmp_path: Path):
    import shutil

    copy = tmp_path / "broken"
    shutil.copytree(bert_bundle, copy)
    model = copy / "model" / "model.onnx"
    _break_weights(model)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["files"]["model/model.onnx"] = {"sha256": hash_file(model), "bytes": model.stat().st_size}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    for name in ("evidence.json", "report.html"):
        (copy / name).unlink()
    result = validate_bundle(copy, quick=True)
    assert result.exit_code == EXIT_PARITY
    assert {check.metric for check in result.verdict.checks if not check.passed} >= {"weights_equal", "cosine_min"}


def test_what_a_target_cannot_take_is_refused_before_anything_is_written(
    tiny_model: Callable[[str], Path], tmp_path: Path
):
    with pytest.raises(TargetRefusesError):
        export(request(tiny_model("bert"), tmp_path / "x", target="raspberry-pi-5-executorch", recipe="fp16"))
    with pytest.raises(TargetRefusesError, match="dynamic shapes"):
        export(request(tiny_model("bert"), tmp_path / "x", target="ios18-executorch-coreml", shapes="dynamic"))
    assert list(tmp_path.iterdir()) == []


def test_too_little_disk_is_said_before_the_run(tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch):
    import shutil

    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    with pytest.raises(BadInputError, match="GB of disk"):
        export(request(tiny_model("bert"), tmp_path / "x"))
