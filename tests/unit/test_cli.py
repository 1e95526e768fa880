"""The command line without a model: help, listings, and how every failure ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from edgeport import errors
from edgeport.cli import export, main
from edgeport.resources import PACKAGE, data_folder

HEAVY = ("torch", "transformers", "onnx", "onnxruntime", "executorch", "torchao", "coremltools", "numpy", "scipy")
VERBS = (
    ["export"],
    ["validate"],
    ["gate"],
    ["inspect"],
    ["targets"],
    ["targets", "show"],
    ["recipes"],
    ["recipes", "show"],
    ["zoo"],
    ["zoo", "fetch"],
    ["doctor"],
)


def test_help_imports_nothing_heavy() -> None:
    code = "import sys; from edgeport.cli.main import main; main(['--help']); print(*sys.modules, file=sys.stderr)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(run.stderr.split())
    assert "edgeport.cli.export" in loaded
    assert not loaded & {*HEAVY, "pydantic", "rich"}


@pytest.mark.parametrize("arguments", [["targets", "--json"], ["recipes", "--json"], ["zoo", "--json"]], ids=" ".join)
def test_listings_import_nothing_heavy(arguments: list[str]) -> None:
    code = f"import sys; from edgeport.cli.main import main; main({arguments}); print(*sys.modules, file=sys.stderr)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(run.stderr.split()) & set(HEAVY)
    assert len(json.loads(run.stdout)) > 2


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_every_verb_has_help_with_its_options(verb: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main([*verb, "--help"]) == 0
    out = capsys.readouterr().out
    for option in ("--json", "--verbose", "--debug"):
        assert option in out
    if "show" not in verb and "fetch" not in verb:
        examples = out[out.index("Examples:") :]
        assert f"edgeport {' '.join(verb)}" in examples


def test_python_m_edgeport_prints_the_version() -> None:
    run = subprocess.run([sys.executable, "-m", "edgeport", "--version"], capture_output=True, text=True, check=True)
    assert run.stdout == "edgeport 0.1.0\n"


def test_no_verb_prints_the_help_and_is_bad_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main([]) == errors.EXIT_BAD_INPUT
    assert "Commands:" in capsys.readouterr().out


def test_targets_lists_every_file_with_what_it_takes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["targets", "--json"]) == 0
    listed = {target["name"]: target for target in json.loads(capsys.readouterr().out)}
    files = {path.stem: tomllib.loads(path.read_text()) for path in data_folder("targets").glob("*.toml")}
    assert set(listed) == set(files)
    assert {"android-arm64-ort", "android-arm64-executorch", "ios17-coreml", "ios18-coreml"} <= set(listed)
    assert {"raspberry-pi-5-ort", "raspberry-pi-5-executorch", "linux-x86_64-ort"} <= set(listed)
    for name, file in files.items():
        for field in ("runtime", "os", "arch"):
            assert listed[name][field] == file[field]
        for kind, formats in file["weights"].items():
            assert listed[name]["weights"][kind] == formats
        assert listed[name]["runtime"] in ("onnxruntime", "executorch", "coreml")
        for kind, formats in file["activations"].items():
            assert listed[name]["activations"][kind] == formats


def test_recipes_lists_every_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["recipes", "--json"]) == 0
    listed = {recipe["name"]: recipe for recipe in json.loads(capsys.readouterr().out)}
    files = {path.stem: tomllib.loads(path.read_text()) for path in (PACKAGE / "recipes").glob("*.toml")}
    assert set(listed) == set(files) >= {"fp32", "fp16", "int8", "int4"}
    for name, file in files.items():
        assert listed[name]["summary"] == file["summary"]
        for budget, value in file["gate"].items():
            assert listed[name]["gate"][budget] == value


@pytest.mark.parametrize("verb", ["targets", "recipes"])
def test_listings_for_people_name_everything(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main([verb, "--json"]) == 0
    names = [row["name"] for row in json.loads(capsys.readouterr().out)]
    assert main.main([verb]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in names)


@pytest.mark.parametrize(
    ("verb", "path"),
    [
        ("targets", data_folder("targets") / "android-arm64-ort.toml"),
        ("recipes", PACKAGE / "recipes" / "int8.toml"),
    ],
)
def test_show_prints_a_file_that_can_be_used_again(verb: str, path: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "edgeport", verb, "show"]
    shown = subprocess.run([*command, path.stem], capture_output=True, check=True).stdout
    assert shown == path.read_bytes()
    mine = tmp_path / "mine.toml"
    mine.write_bytes(shown)
    again = subprocess.run([*command, str(mine), "--json"], capture_output=True, check=True).stdout
    assert json.loads(again)["name"] == path.stem


def _fails(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any], str]:
    """The exit code, the JSON document on stdout, and what a person reads on stderr without --json."""
    code = main.main([*arguments, "--json"])
    document = json.loads(capsys.readouterr().out)
    assert document["exit_code"] == code
    assert main.main(arguments) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    return code, document, captured.err


def test_an_unknown_target_is_one_error_with_the_alternatives(capsys: pytest.CaptureFixture[str]) -> None:
    code, document, text = _fails(["targets", "show", "android-arm64-orf"], capsys)
    assert code == errors.EXIT_BAD_INPUT
    assert "Did you mean 'android-arm64-ort'?" in document["what"]
    assert "ios18-coreml" in document["allowed"]
    assert text.startswith("error: There is no target 'android-arm64-orf'.")
    assert document["next"] in text


def test_a_wrong_key_in_a_recipe_names_the_allowed_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.toml"
    path.write_text((PACKAGE / "recipes" / "int8.toml").read_text().replace("cosine_min", "cosine_mim"))
    code, document, _ = _fails(["recipes", "show", str(path)], capsys)
    assert code == errors.EXIT_BAD_INPUT
    assert "cosine_mim" in document["what"]
    assert "cosine_min" in document["allowed"]
    assert document["where"] == str(path)


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["expor"], "expor"),
        (["export", "zoo:minilm", "--output", "out"], "--target"),
        (["export", "zoo:minilm", "--target", "linux-x86_64-ort"], "--output"),
        (["export", "zoo:minilm", "--target", "t", "--output", "o", "--samples", "many"], "--samples"),
        (["export", "zoo:minilm", "--target", "t", "--output", "o", "--shapes", "round"], "--shapes"),
        (["targets", "--nonsense"], "--nonsense"),
        (["validate"], "BUNDLE"),
    ],
)
def test_bad_usage_is_one_line_and_exit_2(arguments: list[str], names: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, document, text = _fails(arguments, capsys)
    assert code == errors.EXIT_BAD_INPUT
    assert document["error"] == "UsageError"
    assert names in document["what"]
    assert len(text.splitlines()) == 1


@pytest.mark.parametrize(
    "arguments", [["validate", "nowhere"], ["export", "zoo:minilm", "-t", "linux-x86_64-ort", "-o", "out"]]
)
def test_a_latency_run_is_short_or_valid_not_both(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code, document, _ = _fails([*arguments, "--quick", "--full"], capsys)
    assert code == errors.EXIT_BAD_INPUT
    assert document["where"] == "--quick --full"


def test_a_bug_of_ours_is_exit_70_and_the_traceback_only_with_debug(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> list[str]:
        raise RuntimeError("a planted bug")

    monkeypatch.setattr("edgeport.target.target_names", broken)
    code, document, text = _fails(["targets"], capsys)
    assert code == errors.EXIT_BUG
    assert document["what"] == "RuntimeError: a planted bug"
    assert "--debug shows the traceback." in text
    assert main.main(["targets", "--debug"]) == errors.EXIT_BUG
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_an_interrupt_is_one_line_and_exit_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted() -> list[str]:
        raise KeyboardInterrupt

    monkeypatch.setattr("edgeport.target.target_names", interrupted)
    code, _, text = _fails(["targets"], capsys)
    assert code == 130
    assert len(text.splitlines()) == 1


def test_a_reader_that_leaves_early_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "edgeport", "targets", "--json"]
    run = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (run.returncode, run.stderr) == (0, "")


def test_enumerated_lengths_are_sorted_and_unique() -> None:
    assert export._lengths("128, 32,32") == (32, 128)
    assert export._lengths(None) == ()


@pytest.mark.parametrize("text", ["", "32,", "0", "-1", "32;64", "many"])
def test_enumerated_lengths_refuse_what_is_no_list_of_lengths(text: str) -> None:
    with pytest.raises(errors.BadInputError) as caught:
        export._lengths(text)
    assert caught.value.where == "--enumerate"
