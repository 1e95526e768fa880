"""`edgeport export`, `validate`, `inspect` on a tiny model, as a shell and a CI system see them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from edgeport import errors
from edgeport.cli.main import main
from edgeport.storage import hash_tree, tree_size

ORT = "linux-x86_64-ort"
STAGES = ("Run the original", "Compress", "Lower for the target", "Measure the file", "Write the bundle")


@pytest.fixture(scope="module")
def bert(tiny_model: Callable[[str], Path]) -> str:
    return str(tiny_model("bert"))


@pytest.fixture(scope="module")
def exported(bert: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """One export in its own process, and what it printed."""
    output = tmp_path_factory.mktemp("exported") / "bundle"
    command = [sys.executable, "-m", "edgeport", "export", bert, "--target", ORT, "--recipe", "fp32"]
    command += ["--output", str(output), "--samples", "8", "--quick", "--json"]
    return output, subprocess.run(command, capture_output=True, text=True, check=False)


def test_export_answers_with_one_json_document(exported: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    output, run = exported
    assert run.returncode == 0, run.stderr
    document = json.loads(run.stdout)
    assert document["exit_code"] == 0
    assert document["verdict"]["passed"] is True
    assert document["bundle"] == str(output)
    assert Path(document["report"]).read_text().lower().startswith("<!doctype html>")
    assert document["evidence"] == json.loads((output / "evidence.json").read_text())
    for stage in STAGES:
        assert stage in run.stderr
    assert document["evidence"]["size"]["bytes"] == tree_size(output / "model")


def test_inspect_shows_the_manifest(
    exported: tuple[Path, subprocess.CompletedProcess[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    output, _ = exported
    assert main(["inspect", str(output), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["manifest"] == json.loads((output / "manifest.json").read_text())
    assert document["files_verified"] == len(document["manifest"]["files"])
    assert main(["inspect", str(output)]) == 0
    out = capsys.readouterr().out
    assert "input_ids int64 [batch 1..8" in out
    assert "PASSED" in out


def test_validate_measures_again_and_passes(
    exported: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output, _ = exported
    before = hash_tree(output)
    page = tmp_path / "here.html"
    assert main(["validate", str(output), "--quick", "--json", "--report", str(page)]) == 0
    document = json.loads(capfd.readouterr().out)
    assert document["verdict"]["passed"] is True
    assert document["evidence"]["states"]["numerics_verified"] == "yes"
    shown = json.loads(page.read_text().partition('id="evidence">')[2].partition("</script>")[0])
    assert shown["latency"] == document["evidence"]["latency"]
    assert len(shown["latency"]["calls"]["percentiles_ms"]) == 101
    assert hash_tree(output) == before


@pytest.mark.parametrize("verb", ["validate", "inspect"])
def test_a_tampered_bundle_is_named_and_refused(
    verb: str,
    exported: tuple[Path, subprocess.CompletedProcess[str]],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(exported[0], copy)
    model = copy / "model" / "model.onnx"
    data = bytearray(model.read_bytes())
    data[len(data) // 2] ^= 1
    model.write_bytes(data)
    assert main([verb, str(copy), "--json"]) == errors.EXIT_BAD_INPUT
    document = json.loads(capfd.readouterr().out)
    assert "tampered" in document["what"]
    assert document["where"] == str(model)


def test_dry_run_predicts_and_writes_nothing(bert: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "bundle"
    arguments = ["export", bert, "--target", ORT, "--recipe", "int8", "--output", str(output), "--dry-run"]
    assert main([*arguments, "--json"]) == 0
    plan = json.loads(capfd.readouterr().out)
    floats = [layer["name"] for layer in plan["layers"] if layer["format"] != "int8"]
    assert len(plan["layers"]) > 10
    assert [name.split(".")[-2] for name in floats] == ["token_type_embeddings"]
    assert plan["predicted_bytes"] > 0
    assert plan["predicted_peak_memory_bytes"] > 0
    assert plan["predicted_disk_bytes"] > 0
    assert {"lower", "validate"} <= {stage["name"] for stage in plan["stages"]}
    assert any("cosine at least 0.98" in check for check in plan["checks"])
    assert main(arguments) == 0
    assert "Nothing was written" in capfd.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_a_failed_gate_is_its_exit_code_and_says_what_failed(
    bert: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "strict.toml"
    recipe.write_text('name = "strict"\nsummary = "No file is this small."\n[gate]\nsize_ratio_max = 0.01\n')
    output = tmp_path / "bundle"
    arguments = ["export", bert, "--target", ORT, "--recipe", str(recipe), "--output", str(output)]
    assert main([*arguments, "--samples", "8", "--quick"]) == errors.EXIT_SIZE
    out = capfd.readouterr().out
    assert "FAILED" in out
    assert "size_ratio_max" in out
    assert f"exit code {errors.EXIT_SIZE}" in out


def _refused(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> tuple[int, dict[str, object]]:
    code = main(["export", *arguments, "--json"])
    captured = capfd.readouterr()
    assert "Traceback" not in captured.err
    return code, json.loads(captured.out)


def test_an_output_folder_that_exists_needs_force(bert: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    code, document = _refused([bert, "--target", ORT, "--output", str(tmp_path)], capfd)
    assert code == errors.EXIT_BAD_INPUT
    assert document["where"] == str(tmp_path)
    assert "--force" in str(document["next"])


def test_force_does_not_replace_a_folder_that_is_no_bundle(
    bert: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    precious = tmp_path / "thesis.txt"
    precious.write_text("years of work")
    code, _ = _refused([bert, "--target", ORT, "--output", str(tmp_path), "--force"], capfd)
    assert code == errors.EXIT_BAD_INPUT
    assert precious.read_text() == "years of work"


def test_a_model_that_is_not_there_is_bad_input(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, document = _refused([str(tmp_path / "none"), "--target", ORT, "--output", str(tmp_path / "out")], capfd)
    assert code == errors.EXIT_BAD_INPUT
    assert "none" in f"{document['what']} {document['where']}"
    assert not (tmp_path / "out").exists()


def test_what_the_target_cannot_take_is_exit_3_with_the_alternative(
    bert: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = [bert, "--target", ORT, "--output", str(tmp_path / "out"), "--enumerate", "16,32"]
    code, document = _refused(arguments, capfd)
    assert code == errors.EXIT_TARGET_REFUSES
    assert "--sequence" in str(document["allowed"])


def test_ctrl_c_leaves_nothing_half_made_and_the_next_run_ends_well(
    bert: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "bundle"
    command = [sys.executable, "-m", "edgeport", "export", bert, "--target", ORT, "--recipe", "fp32"]
    command += ["--output", str(output), "--samples", "8", "--quick"]
    environment = {**os.environ, "EDGEPORT_CACHE": str(tmp_path / "cache")}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if STAGES[0] in line:
                process.send_signal(signal.SIGINT)
                break
        out, err = process.communicate()
    assert process.returncode == 130
    assert out == ""
    assert err.splitlines()[-1].startswith("Interrupted.")
    assert "Traceback" not in err
    assert not output.exists()
    monkeypatch.setenv("EDGEPORT_CACHE", environment["EDGEPORT_CACHE"])
    assert main(command[3:]) == 0
    assert (output / "manifest.json").is_file()
    assert not list(tmp_path.glob(".*"))
