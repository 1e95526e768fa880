"""`edgeport report` and `edgeport compare` on bundles on disk: what is written, what is bound, what is refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from edgeport.bundle.golden import Golden
from edgeport.bundle.read import read_bundle, verify_files
from edgeport.bundle.write import Contents, write_bundle
from edgeport.cli.main import main
from edgeport.errors import BadInputError
from edgeport.export.artifact import Artifact, LoweringSettings
from edgeport.gate import conclude
from edgeport.model.types import Model, Source, TensorSpec
from edgeport.recipe import load_recipe
from edgeport.report import render_report
from edgeport.report.render import _TEMPLATES
from edgeport.reporting import remake_report
from edgeport.storage import canonical_json, hash_file
from edgeport.target import load_target
from edgeport.validate.evidence import DataRecord, Interval, Machine, Measurements, OutputParity, Size, States
from edgeport.validate.evidence import WeightCheck as Weights
from edgeport.validate.tasks import score_task

DATA = DataRecord(name="d", real=True, sha256={"f": "0"}, slice="all", licence=None, samples=400)
EVIL = "</script><script>alert(1)</script>"


def measurements(wrong: int, size: int) -> Measurements:
    """Of a classifier that has `wrong` more of 400 samples wrong than its original."""
    original = [1.0] * 360 + [0.0] * 40
    near = Interval(mean=0.99999, low=0.99998, high=1.0, n=10)
    task = score_task(
        suite="intents", metric="accuracy", unit="share", chance=0.1, original=original,
        artifact=[0.0] * wrong + original[wrong:], data=DATA,
    )  # fmt: skip
    return Measurements(
        measured_at="2026-01-02T03:04:05Z",
        machine=Machine(platform="Linux", cpu="a cpu", cores=2, memory_gb=8, python="3.11", versions={}),
        states=States(lowered="yes", executed_here="runtime", numerics_verified="no", statement="Run here."),
        data=DATA,
        parity=(
            OutputParity(output="y", max_abs=1e-4, relative_l2=1e-4, cosine=near, cosine_worst=0.9999, finite=True),
        ),
        weights=Weights(checked=0, equal=0, different=()),
        size=Size(bytes=size, baseline_bytes=None, ratio=None),
        latency=None,
        latency_absent="No baseline.",
        memory=None,
        tasks=(task,),
    )


def write(folder: Path, *, wrong: int = 0, size: int = 1_000_000, source: str = "0") -> Path:
    (folder / "artifact").mkdir(parents=True)
    (folder / "artifact" / "model.onnx").write_bytes(b"x" * 100)
    inputs, outputs = (TensorSpec("x", "float32", (1, 2)),), (TensorSpec("y", "float32", (1, 2)),)
    model = Model(
        name="tiny",
        module=torch.nn.Linear(2, 2),
        source=Source("factory", "package.module:make", {"model": source}),
        task="text-classification",
        modality="other",
        inputs=inputs,
        outputs=outputs,
        example={"x": torch.zeros(1, 2)},
        huggingface=False,
    )
    recipe = load_recipe("fp32")
    call = {"x": torch.zeros(1, 2).numpy()}, {"y": torch.zeros(1, 2).numpy()}
    contents = Contents(
        model=model,
        recipe=recipe,
        target=load_target("linux-x86_64-ort"),
        settings=LoweringSettings(precision="fp32", shapes="fixed"),
        artifact=Artifact("onnxruntime", "cpu", folder / "artifact", "model.onnx", inputs, outputs),
        layers=(),
        golden=Golden((call[0],), (call[1],)),
        evidence=conclude(measurements(wrong, size), recipe.gate),
        toolchain={},
    )
    return write_bundle(folder / "bundle", contents, render=render_report)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("first"))


@pytest.fixture(scope="module")
def worse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("worse"), wrong=40, size=1_200_000)


def explain(bundle: Path, **changes: object) -> Path:
    """As `edgeport explain` writes it where next to nothing could be explained."""
    document = {
        "schema_version": 1, "bundle": "tiny", "manifest_sha256": hash_file(bundle / "manifest.json"),
        "original": None, "original_absent": EVIL, "layers": None, "flips": [], "sensitivity": None, "claims": [],
        "bytes": {
            "file": 100, "files": [], "original": 100, "before": {}, "steps": [], "cells": [], "tensors": []
        },
        **changes,
    }  # fmt: skip
    (bundle / "explain.json").write_text(canonical_json(document))
    return bundle


def block(page: str, name: str) -> str:
    found: list[str] = re.findall(f'<script type="application/json" id="{name}">(.*?)</script>', page, re.S)
    assert len(found) == 1
    return found[0]


def test_the_bundles_own_report_is_drawn_again_to_the_same_bytes(
    first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = Path(shutil.copytree(first, tmp_path / "b"))
    before = (bundle / "report.html").read_bytes()
    (bundle / "report.html").unlink()
    assert main(["report", str(bundle), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["written"] == [str(bundle / "report.html")]
    assert (document["passed"], document["exit_code_of_the_gate"]) == (True, 0)
    assert (bundle / "report.html").read_bytes() == before
    verify_files(read_bundle(bundle))


def test_the_page_holds_the_evidence_but_for_what_each_sample_scored(first: Path) -> None:
    held = json.loads(block((first / "report.html").read_text(), "evidence"))
    whole = json.loads((first / "evidence.json").read_text())
    (task,), (full,) = held.pop("tasks"), whole.pop("tasks")
    assert held == whole
    left_out = set(full) - set(task)
    assert len(full["artifact_scores"]) == 400
    assert {"original_scores", "artifact_scores"} <= left_out
    assert {key: full[key] for key in task} == task
    assert all(full[key] is None or len(full[key]) == 400 for key in left_out)


def test_an_explanation_goes_into_the_page_and_the_chain_of_hashes_holds(first: Path, tmp_path: Path) -> None:
    bundle = explain(Path(shutil.copytree(first, tmp_path / "b")))
    verify_files(read_bundle(bundle))  # the page does not have it yet
    page = remake_report(bundle).read_text()
    verify_files(read_bundle(bundle))
    assert json.loads(block(page, "explain"))["original_absent"] == EVIL
    assert EVIL not in page
    (bundle / "report.html").write_text(page.replace("alert(1)", "alert(2)", 1))
    with pytest.raises(BadInputError, match="without its evidence"):
        verify_files(read_bundle(bundle))
    # What is in the page is no longer what lies beside it: drawn again it is.
    assert main(["report", str(bundle)]) == 0
    verify_files(read_bundle(bundle))


def test_markdown_says_what_was_explained(first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cells = [{"group": "attention", "part": "codes", "bytes": 75}, {"group": "file", "part": "graph", "bytes": 25}]
    sizes = {"file": 100, "files": [], "original": 400, "before": {}, "steps": [], "cells": cells, "tensors": []}
    claim = {"metric": "accuracy_drop_max", "output": "intents", "value": 0.0, "state": "undecided", "needed": 3000}
    bundle = explain(Path(shutil.copytree(first, tmp_path / "b")), bytes=sizes, claims=[{**claim, "words": ""}])
    assert main(["report", str(bundle), "--markdown", "-"]) == 0
    text = capsys.readouterr().out
    assert "- 100 bytes, from 400 in float32: attention 75.0 %, file 25.0 %" in text
    assert "- undecided: accuracy_drop_max intents; about 3,000 samples would decide" in text


def test_an_explanation_of_another_bundle_is_refused(first: Path, tmp_path: Path) -> None:
    bundle = explain(Path(shutil.copytree(first, tmp_path / "b")), manifest_sha256="0" * 64)
    with pytest.raises(BadInputError, match="explanation is of another bundle"):
        remake_report(bundle)
    explain(bundle, layers="none")
    with pytest.raises(BadInputError, match="layers"):
        remake_report(bundle)


def test_the_page_of_another_edgeport_is_not_put_into_a_bundle(
    first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = Path(shutil.copytree(first, tmp_path / "b"))
    manifest = json.loads((bundle / "manifest.json").read_text())
    (bundle / "manifest.json").write_text(canonical_json({**manifest, "report_shell_sha256": "0" * 64}))
    evidence = json.loads((bundle / "evidence.json").read_text())
    rebound = {**evidence, "manifest_sha256": hash_file(bundle / "manifest.json")}
    (bundle / "evidence.json").write_text(canonical_json(rebound))
    assert main(["report", str(bundle), "--json"]) == 2
    assert "Another version of edgeport" in json.loads(capsys.readouterr().out)["what"]
    assert main(["report", str(bundle), "-o", str(tmp_path / "page.html")]) == 0
    assert "</html>" in (tmp_path / "page.html").read_text()


def test_against_an_older_bundle(first: Path, worse: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, text = tmp_path / "page.html", tmp_path / "page.md"
    given = ["report", str(worse), "--against", str(first)]
    assert main([*given, "-o", str(page), "--markdown", str(text), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["exit_code_of_the_gate"] == 11
    changes = {each["what"]: each for each in json.loads(block(page.read_text(), "against"))["deltas"]}
    assert changes["size"]["change"] == "+20.0 %"
    assert changes["intents: accuracy"]["direction"] == "worse"
    assert changes["intents: accuracy"]["change"].startswith("−10.0 points [")
    assert json.loads(block(page.read_text(), "evidence"))["verdict"]["exit_code"] == 11
    assert "| size | 1.00 MB | 1.20 MB | +20.0 % | worse |" in text.read_text()
    assert "not ready to ship (exit code 11)" in text.read_text()
    assert main([*given, "--json"]) == 2
    assert "Write the page elsewhere" in json.loads(capsys.readouterr().out)["next"]
    assert main([*given, "--markdown", "-"]) == 0
    assert capsys.readouterr().out == text.read_text()


def test_a_changed_file_is_found_before_a_page_is_made(
    first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = Path(shutil.copytree(first, tmp_path / "b"))
    (bundle / "model" / "model.onnx").write_bytes(b"y" * 100)
    for verb in (["report", str(bundle)], ["compare", str(bundle), str(first)]):
        assert main([*verb, "--json"]) == 2
        assert "tampered" in json.loads(capsys.readouterr().out)["what"]


def test_compare(first: Path, worse: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, text = tmp_path / "page.html", tmp_path / "page.md"
    given = ["compare", str(first), str(worse), "-o", str(page), "--markdown", str(text)]
    assert main([*given, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [(row["bytes"], row["dominated_by"]) for row in document["rows"]] == [
        (1_000_000, None),
        (1_200_000, document["rows"][0]["label"]),
    ]
    assert (document["pairs"][0]["answer"], document["pairs"][0]["worse"]) == ("worse", 40)
    assert document == json.loads(block(page.read_text(), "comparison"))
    assert text.read_text().count("| 1.00 MB |") == 1
    assert main(given) == 0
    out = capsys.readouterr().out
    assert "front" in out
    assert "worse (n = 400)" in out
    assert main(["compare", str(first), str(first)]) == 2


def test_bundles_of_different_models_are_not_compared_in_silence(
    first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write(tmp_path / "other", source="1")
    assert main(["compare", str(first), str(other), "--json"]) == 2
    assert "different models" in json.loads(capsys.readouterr().out)["what"]
    assert main(["compare", str(first), str(other), "--different-models", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["axes"], document["pairs"]) == ([], [])
    assert "Different models" in document["notes"][0]


def palettes() -> dict[str, dict[str, str]]:
    """The colours of the style sheet, by name: in the light, in the dark, and on paper."""
    style = (_TEMPLATES / "style.css").read_text()
    found = [
        dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", text)) for text in re.findall(r":root \{(.*?)\}", style, re.S)
    ]
    return dict(zip(("light", "dark", "paper"), found, strict=True))


def luminance(colour: str) -> float:
    """Relative luminance (WCAG 2.2)."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("where", ["light", "dark", "paper"])
def test_text_and_marks_have_the_contrast_that_wcag_asks_for(where: str) -> None:
    colours = palettes()[where]
    pairs = [(text, ground) for text in ("text", "muted") for ground in ("page", "card", "track")]
    pairs += [(text, ground) for text in ("pass", "fail", "warn", "accent") for ground in ("page", "card")]
    pairs += [(each, f"{each}-soft") for each in ("pass", "fail", "warn")]
    pairs += [("text", "pass-soft"), ("text", "fail-soft"), ("muted", "fail-soft")]
    assert {pair: contrast(*(colours[name] for name in pair)) for pair in pairs if contrast(
        *(colours[name] for name in pair)) < 4.5} == {}  # fmt: skip
    marks = [("accent", "page"), ("base", "page"), ("control", "card")]
    assert {pair: contrast(*(colours[name] for name in pair)) for pair in marks if contrast(
        *(colours[name] for name in pair)) < 3} == {}  # fmt: skip
