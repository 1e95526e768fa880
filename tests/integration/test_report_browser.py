"""The report in a real browser: what people see, on a desk and on a phone, and that nothing breaks out."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from edgeport.bundle.write import evidence_text
from edgeport.report import render_report
from edgeport.validate.evidence import (
    Check,
    DataRecord,
    Evidence,
    Interval,
    Latency,
    Machine,
    Memory,
    OutputParity,
    Size,
    States,
    Verdict,
    WeightCheck,
)

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")

EVIL = "</script><img src=x onerror=\"top.document.title='broken'\">"


def manifest(name: str = "tiny") -> dict[str, Any]:
    layers = [
        {
            "name": f"{name}.layers.{index}.attn.weight",
            "kinds": ["linear"],
            "shape": [index, 100],
            "format": "int8",
            "activation": "dynamic_int8",
            "bytes_before": index * 400,
            "bytes_after": index * 104,
            "relative_error": 0.01 * index,
            "tied": [],
            "reason": name,
            "sha256": None,
        }
        for index in (2, 10, 1)
    ]
    return {
        "name": name,
        "task": "feature-extraction",
        "source": {"kind": "zoo", "reference": name, "files": {name: "0" * 64}, "licence": "MIT", "note": None},
        "parameters": 1400,
        "recipe": {"name": "int8", "summary": "8-bit weights"},
        "target": {"name": "a-target", "title": "A target", "os": "android", "arch": "arm64"},
        "settings": {"precision": "fp32", "shapes": "dynamic"},
        "runtime": "onnxruntime",
        "delegate": "cpu",
        "entry": "model/model.onnx",
        "inputs": [{"name": "x", "dtype": "float32", "shape": [1, 8]}],
        "outputs": [{"name": name, "dtype": "float32", "shape": [1, 8]}],
        "files": {"model/model.onnx": {"sha256": "0" * 64, "bytes": 2000}},
        "layers": layers,
        "data": {"name": name, "real": True, "sha256": {}, "slice": "all", "licence": None, "samples": 64},
        "toolchain": {"torch": "2.13.0"},
        "facts": {"opset": 21},
    }


def interval(mean: float) -> Interval:
    return Interval(mean=mean, low=mean - 0.001, high=mean + 0.0005, n=64)


def check(metric: str, measured: float | None, allowed: float, passed: bool, output: str | None = None) -> Check:
    return Check(
        metric=metric,
        output=output,
        measured=measured,
        allowed=allowed,
        passed=passed,
        exit_code=10,
        message=f"{metric} failed by much",
        advice="keep more bits",
    )


def evidence(name: str = "logits", **changes: Any) -> Evidence:
    """Everything measured, and a check of each kind; all passed."""
    whole = Evidence(
        measured_at="2026-01-02T03:04:05Z",
        machine=Machine(
            platform=name, cpu="a cpu", cores=2, memory_gb=15.6, python="3.11", versions={"onnxruntime": "1"}
        ),
        states=States(
            lowered="yes", executed_here="runtime", numerics_verified="yes", statement=f"Executed here. {name}"
        ),
        data=DataRecord(name=name, real=True, sha256={}, slice="all", licence=None, samples=64),
        parity=(
            OutputParity(
                output=name,
                max_abs=0.41,
                relative_l2=0.08,
                cosine=interval(0.9966),
                cosine_worst=0.9921,
                top1_agreement=interval(0.953),
                kl=interval(0.012),
                positions=4096,
                finite=True,
            ),
        ),
        weights=WeightCheck(checked=39, equal=39, different=()),
        size=Size(bytes=22_900_000, baseline_bytes=90_900_000, ratio=0.252),
        latency=Latency(
            threads=1,
            queries=400,
            warmup=20,
            p50_ms=15.3,
            p90_ms=16.9,
            cpu_ms=15.2,
            baseline_p50_ms=33.1,
            baseline_p90_ms=36.2,
            ratio=interval(0.463),
            valid=True,
            note="",
            input_shapes={"x": (1, 128)},
        ),
        memory=Memory(
            peak_rss_mb=142.3, runtime_rss_mb=61.2, baseline_peak_rss_mb=221, load_ms=88.2, first_run_ms=21.2
        ),
        verdict=Verdict(
            passed=True,
            exit_code=0,
            checks=(
                check("finite", 1, 1, True, name),
                check("finite", 1, 1, True, "pooled"),
                check("weights_equal", 1, 1, True),
                check("cosine_min", 0.9966, 0.98, True, name),
                check("size_ratio_max", 0.252, 0.45, True),
            ),
        ),
    )
    return whole.model_copy(update=changes)


HARNESS = """<!doctype html><meta charset="utf-8"><body style="margin:0">
<iframe id="page" width="{width}" height="900" src="report.html"></iframe><pre id="result"></pre>
<script>
const messages = [];
document.getElementById("page").addEventListener("load", (event) => {{
  const page = event.target.contentDocument;
  const all = (selector) => [...page.querySelectorAll(selector)].map((node) => node.innerText);
  const order = () => all("#layers tbody td:first-child");
  const before = order();
  page.querySelectorAll("#layers th button")[4].click();
  const up = order();
  page.querySelectorAll("#layers th button")[4].click();
  const root = page.documentElement;
  document.getElementById("result").textContent = JSON.stringify({{
    verdict: page.getElementById("verdict").innerText, verdictClass: page.getElementById("verdict").className,
    states: all("#states li"), tiles: all("#tiles .tile"), checks: all("#checks li"),
    parity: all("#parity table tr"), notices: all(".notice"), machine: all("#machine dd"),
    dots: page.querySelectorAll("#parity svg .mean, #latency svg .mean").length,
    bars: page.querySelectorAll("#latency .bar-this, #memory .bar-this").length,
    orders: [before, up, order()], images: page.images.length, title: document.title,
    overflow: root.scrollWidth - root.clientWidth, height: root.scrollHeight,
    resources: event.target.contentWindow.performance.getEntriesByType("resource").map((entry) => entry.name),
    background: getComputedStyle(page.body).backgroundColor,
  }});
}});
</script>"""


def browse(folder: Path, page: str, *, width: int = 1100, dark: bool = False) -> dict[str, Any]:
    """Open a report in a frame of a given width; what is seen there, after sorting the layers twice."""
    (folder / "report.html").write_text(page)
    (folder / "harness.html").write_text(HARNESS.format(width=width))
    done = subprocess.run(
        [
            str(CHROMIUM),
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--allow-file-access-from-files",
            "--enable-logging=stderr",
            f"--blink-settings=preferredColorScheme={0 if dark else 1}",
            f"--user-data-dir={folder / 'profile'}",
            "--virtual-time-budget=5000",
            "--dump-dom",
            (folder / "harness.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    found = re.search(r'<pre id="result">(.+?)</pre>', done.stdout, re.S)
    assert found is not None, done.stdout[:2000]
    return dict(json.loads(html.unescape(found[1])))


def report(value: Evidence, name: str = "tiny") -> str:
    return render_report(manifest(name), evidence_text(value))


def test_what_people_see(tmp_path: Path) -> None:
    seen = browse(tmp_path, report(evidence()))
    assert seen["verdictClass"] == "verdict pass"
    assert "All checks passed" in seen["verdict"]
    assert "5 of 5 checks" in seen["verdict"]
    assert [text.split("\n")[:2] for text in seen["states"][:3]] == [
        ["Lowered", "Yes"],
        ["Executed here", "In the runtime itself"],
        ["Numerics verified", "Yes"],
    ]
    assert seen["states"][3] == "Executed here. logits"
    tiles = {text.split("\n")[0]: text.split("\n")[1:] for text in seen["tiles"]}
    assert tiles["Size"] == ["22.9 MB", "0.25× of fp32 (90.9 MB)"]
    assert tiles["Cosine to the original"] == ["0.9966", "logits; worst sample 0.9921"]
    assert tiles["Same top answer"] == ["95.3 %", "4096 comparisons"]
    assert tiles["Latency, p50"] == ["15.3 ms", "0.46× of fp32"]
    assert tiles["Peak memory"] == ["142 MB", "fp32: 221 MB"]
    assert [text.replace("\n", " ") for text in seen["checks"]] == [
        "✓ Every value is finite · logits, pooled yes",
        "✓ Weights in the file are the logical ones yes weights_equal failed by much",
        "✓ Cosine similarity, mean · logits 0.9966 ≥ 0.98",
        "✓ Size against fp32 0.25× ≤ 0.45×",
    ]
    assert seen["parity"][1].split("\t") == [
        "logits", "0.410", "0.0800", "0.9966", "0.9921", "95.3 %", "0.0120 (0.0110 – 0.0125)", "yes"
    ]  # fmt: skip
    assert seen["dots"] == 4  # one cosine, one top answer, the key's, one latency ratio
    assert seen["bars"] == 2
    assert "39 of 39 compressed tensors in the file equal the logical ones, bit for bit" in seen["machine"]
    assert seen["notices"] == []
    assert seen["resources"] == []


def test_a_click_on_a_heading_sorts_by_number(tmp_path: Path) -> None:
    names = {size: f"tiny.layers.{size}.attn.weight" for size in (1, 2, 10)}
    assert browse(tmp_path, report(evidence()))["orders"] == [
        [names[2], names[10], names[1]],
        [names[1], names[2], names[10]],
        [names[10], names[2], names[1]],
    ]


def test_failures_come_first_with_what_to_try(tmp_path: Path) -> None:
    checks = (
        check("size_ratio_max", 0.25, 0.45, True),
        check("cosine_min", 0.8, 0.98, False, "logits"),
        check("latency_ratio_max", None, 0.9, False),
    )
    states = States(lowered="yes", executed_here="runtime", numerics_verified="failed", statement="Executed here.")
    failed = evidence(verdict=Verdict(passed=False, exit_code=10, checks=checks), states=states)
    seen = browse(tmp_path, report(failed))
    assert seen["verdictClass"] == "verdict fail"
    assert "2 of 3 checks failed (exit code 10)" in seen["verdict"]
    assert seen["states"][2].split("\n")[1] == "Failed"
    first, second, third = (text.replace("\n", " ") for text in seen["checks"])
    assert "0.8000, allowed ≥ 0.98 cosine_min failed by much Try first: keep more bits" in first
    assert "not measured, allowed ≤ 0.90×" in second
    assert third.startswith("✓")


def test_what_was_not_measured_is_said_and_not_drawn(tmp_path: Path) -> None:
    parity = OutputParity(output="logits", max_abs=None, relative_l2=None, cosine=None, cosine_worst=None, finite=False)
    statement = "Converted, not executed on Apple hardware."
    bare = evidence(
        states=States(lowered="yes", executed_here="reference", numerics_verified="yes", statement=statement),
        data=DataRecord(name="synthetic", real=False, sha256={}, slice="seed 0", licence=None, samples=4),
        parity=(parity,),
        weights=None,
        size=Size(bytes=100, baseline_bytes=None, ratio=None),
        latency=None,
        latency_absent="A reference evaluator's time says nothing.",
        memory=None,
        memory_absent="No vendor process.",
    )
    seen = browse(tmp_path, report(bare))
    assert "reference evaluator: not yet on the target's own kernels" in seen["verdict"]
    assert seen["states"][1].split("\n")[1] == "By a reference evaluator"
    assert seen["states"][3] == statement
    assert [text.split("\n")[1] for text in seen["tiles"][1:]] == ["not measured"] * 3
    assert any("says nothing" in text for text in seen["notices"])
    assert any("No vendor process" in text for text in seen["notices"])
    assert any(text.startswith("Synthetic inputs") for text in seen["notices"])
    assert seen["parity"][1].split("\t") == ["logits", "–", "–", "–", "–", "no"]
    assert (seen["dots"], seen["bars"]) == (0, 0)


def test_untrusted_names_are_shown_as_text(tmp_path: Path) -> None:
    seen = browse(tmp_path, report(evidence(EVIL), EVIL))
    assert seen["title"] == ""
    assert seen["images"] == 0
    assert seen["orders"][0][0].startswith(EVIL)
    assert seen["states"][3] == f"Executed here. {EVIL}"
    assert EVIL in seen["checks"][0]


def test_a_phone_in_the_dark(tmp_path: Path) -> None:
    long = "model_with_a_very_long_name_" * 6
    phone = browse(tmp_path, report(evidence(long), long), width=390, dark=True)
    assert phone["overflow"] == 0
    assert phone["background"] == "rgb(22, 22, 20)"


def test_an_empty_shell_says_that_it_is_empty(tmp_path: Path) -> None:
    seen = browse(tmp_path, render_report(manifest(), ""))
    assert seen["verdict"] == "This page holds no measurements."
    assert len(seen["orders"][0]) == 3
