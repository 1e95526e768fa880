"""`edgeport parity` on tiny models: every runtime against torch, and cells that are refused or fail."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from edgeport.cli.main import main
from edgeport.errors import EXIT_BAD_INPUT, EXIT_PARITY, EXIT_TARGET_REFUSES
from edgeport.runtime.onnx_decoder import OnnxRuntimeTokens
from edgeport.runtime.onnxruntime import OnnxRuntimeSession
from edgeport.storage import hash_file
from edgeport.vectors import load_vectors

ORT, XNNPACK, COREML = "linux-x86_64-ort", "android-arm64-executorch", "ios18-coreml"


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict]:
    capsys.readouterr()
    code = main(["parity", *arguments, "--samples", "4", "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_one_checkpoint_in_two_runtimes_against_the_same_inputs(
    tiny_model: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = tiny_model("bert"), tmp_path / "out"
    code, answer = run(capsys, str(folder), "-t", ORT, "-t", COREML, "-o", str(out))
    assert code == 0
    cells = {(cell["target"], cell["precision"]): cell for cell in answer["matrix"]["cells"]}
    assert set(cells) == {(target, precision) for target in (ORT, COREML) for precision in ("fp32", "fp16")}
    for (_, precision), cell in cells.items():
        assert cell["outcome"] == "passed"
        (logits,) = cell["outputs"]
        assert logits["relative_l2"] < (1e-5 if precision == "fp32" else 5e-3)
    assert cells[ORT, "fp32"]["executed_by"].startswith("executed by onnxruntime ")
    assert "not executed on Apple hardware" in cells[COREML, "fp16"]["executed_by"]
    # Float16 weights alone are closer than float16 weights and rounding between operators.
    (rounded,), (unrounded,) = cells[COREML, "fp16"]["outputs"], cells[COREML, "fp16"]["unrounded"]
    assert 0 < unrounded["relative_l2"] < rounded["relative_l2"]

    # The golden outputs are the checkpoint's own, by transformers and not by edgeport.
    inputs, outputs = (load_vectors(out / "golden" / name) for name in ("inputs.safetensors", "outputs.safetensors"))
    module = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    for call, wanted in zip(inputs, outputs, strict=True):
        with torch.no_grad():
            found = module(**{name: torch.from_numpy(value) for name, value in call.items()}).logits.numpy()
        np.testing.assert_allclose(found, wanted["logits"], rtol=0, atol=1e-6)
    stored = json.loads((out / "parity.json").read_text())
    assert stored == answer["matrix"]
    assert stored["golden"] == {path.name: hash_file(path) for path in (out / "golden").iterdir()}
    assert "ios18-coreml" in (out / "parity.md").read_text()

    # A repeated run takes everything from the cache, and says the same.
    def unreachable(*_: object) -> None:
        raise AssertionError("a finished cell was measured again")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OnnxRuntimeSession, "run", unreachable)
        again, answer = run(capsys, str(folder), "-t", ORT, "-t", COREML, "-o", str(out), "--force")
    assert (again, answer["matrix"]) == (0, stored)


def test_a_cell_that_fails_or_is_refused_stops_no_other(
    tiny_model: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One file's answers are turned around, one target has no states, one precision is not on offer."""
    honest = OnnxRuntimeTokens.feed
    monkeypatch.setattr(OnnxRuntimeTokens, "feed", lambda self, ids: -honest(self, ids))
    old = tmp_path / "old.toml"
    text = (Path(__file__).parents[2] / "targets" / f"{COREML}.toml").read_text()
    old.write_text(text.replace(f'name = "{COREML}"', 'name = "old"').replace('target = "iOS18"', 'target = "iOS17"'))
    asked = ["-t", ORT, "-t", str(old), "-t", XNNPACK, "--precision", "fp16", "-o", str(tmp_path / "out")]
    code, answer = run(capsys, str(tiny_model("llama")), *asked)
    cells = {cell["target"]: cell for cell in answer["matrix"]["cells"]}
    assert {name: cell["outcome"] for name, cell in cells.items()} == {
        ORT: "failed",
        "old": "refused",
        XNNPACK: "not offered",
    }
    assert "from iOS 18 on" in cells["old"]["reason"]
    assert "for an iOS 18 target" in cells["old"]["next_step"]
    assert cells[ORT]["outputs"][0]["cosine"]["mean"] < -0.99
    assert cells[ORT]["exit_code"] == code == EXIT_PARITY
    assert "cosine_min of logits is -" in cells[ORT]["reason"]
    assert cells[XNNPACK]["reason"] == "the target's file lists fp32 only"


def test_bad_input_is_one_error(
    tiny_model: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(tiny_model("vit"))
    code, answer = run(capsys, model, "-t", ORT, "-t", ORT, "-o", str(tmp_path / "a"))
    assert (code, answer["where"]) == (EXIT_BAD_INPUT, f"--target {ORT} {ORT}")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    code, answer = run(capsys, model, "-o", str(tmp_path / "full"), "--force")
    assert code == EXIT_BAD_INPUT
    assert "no parity matrix" in answer["what"]
    code, answer = run(capsys, model, "-t", XNNPACK, "--precision", "fp16", "-o", str(tmp_path / "b"))
    assert code == EXIT_TARGET_REFUSES
