"""`edgeport gate` on bundles on disk: exit codes, documents, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from edgeport.bundle.golden import Golden
from edgeport.bundle.write import Contents, write_bundle
from edgeport.cli.main import main
from edgeport.export.artifact import Artifact, LoweringSettings
from edgeport.gate import conclude
from edgeport.model.types import Model, Source, TensorSpec
from edgeport.recipe import load_recipe
from edgeport.report import render_report
from edgeport.target import load_target
from edgeport.validate.evidence import (
    DataRecord,
    Interval,
    Machine,
    Measurements,
    OutputParity,
    Size,
    States,
    WeightCheck,
)
from edgeport.validate.tasks import score_task

DATA = DataRecord(name="d", real=True, sha256={"f": "0"}, slice="all", licence=None, samples=400)


def interval(mean: float) -> Interval:
    return Interval(mean=mean, low=mean - 1e-5, high=mean + 1e-6, n=10)


def measurements(wrong: int, size: int) -> Measurements:
    """Of a classifier that has `wrong` more of 400 samples wrong than its original, in a file of `size` bytes."""
    original = [1.0] * 360 + [0.0] * 40
    artifact = [0.0] * wrong + original[wrong:]
    return Measurements(
        measured_at="2026-01-02T03:04:05Z",
        machine=Machine(platform="Linux", cpu="a cpu", cores=2, memory_gb=8, python="3.11", versions={}),
        states=States(lowered="yes", executed_here="runtime", numerics_verified="no", statement="Run here."),
        data=DATA,
        parity=(
            OutputParity(
                output="y",
                max_abs=1e-4,
                relative_l2=1e-4,
                cosine=interval(0.99999),
                cosine_worst=0.9999,
                finite=True,
            ),
        ),
        weights=WeightCheck(checked=0, equal=0, different=()),
        size=Size(bytes=size, baseline_bytes=None, ratio=None),
        latency=None,
        latency_absent="No baseline.",
        memory=None,
        tasks=(
            score_task(
                suite="intents",
                metric="accuracy",
                unit="share",
                chance=0.1,
                original=original,
                artifact=artifact,
                data=DATA,
            ),
        ),
    )


def write(folder: Path, *, wrong: int = 0, size: int = 1_000_000, task: str = "text-classification") -> Path:
    (folder / "artifact").mkdir(parents=True)
    (folder / "artifact" / "model.onnx").write_bytes(b"x" * 100)
    inputs, outputs = (TensorSpec("x", "float32", (1, 2)),), (TensorSpec("y", "float32", (1, 2)),)
    module = torch.nn.Linear(2, 2)
    model = Model(
        name="tiny",
        module=module,
        source=Source("factory", "package.module:make", {}),
        task=task,
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
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("sound"))


@pytest.fixture(scope="module")
def worse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("worse"), wrong=40, size=1_200_000)


@pytest.fixture
def budgets(tmp_path: Path) -> Path:
    path = tmp_path / "budgets.toml"
    path.write_text('cosine_min = "98%"\nsize_max = "1.1 MB"\n[accuracy.intents]\ndrop_max = "3 points"\n')
    return path


def gate(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict]:
    code = main(["gate", *(str(argument) for argument in arguments), "--json"])
    return code, json.loads(capsys.readouterr().out)


def failed(document: dict) -> dict[str, int]:
    return {check["metric"]: check["exit_code"] for check in document["checks"] if not check["passed"]}


def test_a_sound_bundle_passes(sound: Path, budgets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, document = gate(capsys, sound, "--budget", budgets)
    assert (code, document["exit_code"], document["passed"]) == (0, 0, True)
    assert {check["metric"] for check in document["checks"]} >= {"cosine_min", "size_max", "accuracy_drop_max"}


def test_a_worse_one_fails_with_the_lowest_code_and_lists_all(
    worse: Path, budgets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    junit, markdown = tmp_path / "gate.xml", tmp_path / "gate.md"
    code, document = gate(capsys, worse, "--budget", budgets, "--junit", junit, "--markdown", markdown)
    assert code == 11
    assert failed(document) == {"accuracy_drop_max": 11, "size_max": 13}
    suite = ElementTree.parse(junit).getroot().find("testsuite")
    assert suite is not None
    assert (suite.get("failures"), suite.get("errors"), suite.get("tests")) == ("2", "0", str(len(document["checks"])))
    text = markdown.read_text()
    for check in document["checks"]:
        if not check["passed"]:
            assert check["message"] in text
            assert check["advice"] in text


def test_for_people_every_failure_names_measured_allowed_and_what_to_try(
    worse: Path, budgets: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["gate", str(worse), "--budget", str(budgets)]) == 11
    out = capsys.readouterr().out
    assert "intents: accuracy is 0.8, 0.1 worse than the original" in out
    assert "worse by more than 3 points at confidence 0.95. Look at the samples that flipped" in out
    assert "size_max is 1.2 MB; at most 1.1 MB is allowed. Compress the largest layer group" in out
    assert "(exit code 11)" in out


def test_regression_mode(sound: Path, worse: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, document = gate(capsys, sound, "--against", sound)
    assert (code, document["against"]) == (0, str(sound))
    assert [note.partition(":")[0] for note in document["notes"]] == ["latency", "memory"]
    code, document = gate(capsys, worse, "--against", sound)
    assert code == 11
    assert failed(document) == {"regression.accuracy_drop_max": 11, "regression.size_growth_max": 13}


def test_a_budget_on_what_was_not_measured_fails(
    sound: Path, budgets: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    budgets.write_text('latency_p90_max = "1 s"\n[accuracy.sentiment]\ndrop_max = "90 points"')
    code, document = gate(capsys, sound, "-b", budgets)
    assert code == 15
    assert failed(document) == {"latency_p90_max": 15, "accuracy": 15}
    assert "No baseline." in next(c["message"] for c in document["checks"] if c["metric"] == "latency_p90_max")


def test_evidence_measured_later_takes_the_place_of_the_bundles(
    sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = json.loads((sound / "evidence.json").read_text())
    here = tmp_path / "here.json"
    here.write_text(json.dumps({"bundle": "b", "evidence": {**own, "size": {**own["size"], "bytes": 2_000_000}}}))
    code, document = gate(capsys, sound, "--evidence", here, "--against", sound)
    assert (code, failed(document)) == (13, {"regression.size_growth_max": 13})
    code, document = gate(capsys, write(tmp_path / "other", task="feature-extraction"), "--evidence", here)
    assert code == 2
    assert "another bundle" in document["what"]


def test_evidence_that_is_missing_is_no_pass(sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = Path(shutil.copytree(sound, tmp_path / "copy"))
    (copy / "evidence.json").unlink()
    (copy / "report.html").unlink()
    code, document = gate(capsys, copy)
    assert (code, document["exit_code"]) == (15, 15)
    assert "no evidence" in document["what"]


def test_a_changed_file_is_no_pass(sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = Path(shutil.copytree(sound, tmp_path / "copy"))
    (copy / "model" / "model.onnx").write_bytes(b"y" * 100)
    assert gate(capsys, copy)[0] == 2
    code, document = gate(capsys, sound, "--against", copy)
    assert code == 2
    assert "model/model.onnx" in document["what"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[accuracy.intents]\ndrop_max = 10", '"10 points" or 0.1'),
        ("cosine_min = 98", '"98%"'),
        ("cosine = 0.9", "unknown"),
        ("cosine_min = ", "not valid TOML"),
    ],
)
def test_a_wrong_budget_is_bad_input(
    sound: Path, budgets: Path, text: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    budgets.write_text(text)
    code, document = gate(capsys, sound, "--budget", budgets)
    assert code == 2
    assert words in document["what"]


def test_what_can_not_be_compared_or_written_is_bad_input(
    sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write(tmp_path / "other", task="feature-extraction")
    assert gate(capsys, sound, "--against", other)[0] == 2
    code, document = gate(capsys, sound, "--junit", tmp_path / "nowhere" / "gate.xml")
    assert code == 2
    assert "--junit" in document["where"]
    assert gate(capsys, tmp_path)[0] == 2
