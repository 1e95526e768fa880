"""The report in a real browser: what people see, on a desk and on a phone, and that nothing breaks out."""

from __future__ import annotations

import html
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from edgeport.bundle.write import evidence_text
from edgeport.report import render_report
from edgeport.report.compare import compare
from edgeport.report.comparison import Candidate
from edgeport.report.render import embedded, render_comparison
from edgeport.validate.evidence import (
    CallTimes,
    Check,
    DataRecord,
    Evidence,
    Generation,
    GenerationRate,
    Interval,
    Latency,
    Machine,
    Memory,
    OutputParity,
    Size,
    States,
    Verdict,
    WeightCheck,
    Work,
)
from edgeport.validate.tasks import score_task

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
  const sort = () => page.querySelectorAll("#layers th button")[4]?.click();
  sort();
  const up = order();
  sort();
  const found = {{}};
  for (const box of page.querySelectorAll("div.table, section")) {{
    const field = box.querySelector(":scope > .filters input");
    const table = box.querySelector("table");
    if (!field || !table) continue;
    field.value = {search};
    field.dispatchEvent(new Event("input"));
    found[table.caption.innerText] = [...table.tBodies[0].rows].filter((tr) => !tr.hidden).length;
    field.value = "";
    field.dispatchEvent(new Event("input"));
  }}
  const tips = {{}};
  for (const figure of page.querySelectorAll("figure")) {{
    const mark = figure.querySelector("[data-tip]");
    if (!mark) continue;
    mark.dispatchEvent(new Event("click", {{ bubbles: true }}));
    const title = figure.querySelector(".title")?.textContent ?? figure.querySelector(".plot svg").ariaLabel;
    tips[title] = figure.querySelector(".readout").textContent;
  }}
  const tables = [...page.querySelectorAll("table")];
  const lines = (table) => [...table.tBodies[0].rows].map((tr) => tr.innerText);
  const root = page.documentElement;
  document.getElementById("result").textContent = JSON.stringify({{
    verdict: page.querySelector(".verdict").innerText, verdictClass: page.querySelector(".verdict").className,
    states: all("#states li"), tiles: all("#tiles .tile"), checks: all("#checks li"),
    parity: all("#parity table tr"), notices: all(".notice"), machine: all("#machine dd"), facts: all(".facts dd"),
    dots: page.querySelectorAll("#parity svg .mean, #latency svg .mean").length,
    bars: page.querySelectorAll("#latency .bar-this, #memory .bar-this").length,
    found, tips, headings: all("main section:not([hidden]) > h2"), contents: all("#contents a"),
    captions: tables.filter((table) => !table.caption?.textContent).length,
    tables: Object.fromEntries(tables.map((table) => [table.caption?.textContent, lines(table)])),
    commands: all(".commands code"), plots: all(".plot svg").length,
    circles: [...page.querySelectorAll("section")].map((section) =>
      [section.id, section.querySelectorAll(".plot circle").length]).filter(([, count]) => count),
    orders: [before, up, order()], images: page.images.length, title: document.title,
    overflow: root.scrollWidth - root.clientWidth, height: root.scrollHeight,
    resources: event.target.contentWindow.performance.getEntriesByType("resource").map((entry) => entry.name),
    background: getComputedStyle(page.body).backgroundColor,
  }});
}});
</script>"""


def browse(folder: Path, page: str, *, width: int = 1100, dark: bool = False, search: str = "") -> dict[str, Any]:
    """Open a page in a frame of a given width; what is seen there, after sorting the layers twice, searching all tables
    that have a search field, and touching the first mark of each chart.
    """
    (folder / "report.html").write_text(page)
    (folder / "harness.html").write_text(HARNESS.format(width=width, search=json.dumps(search)))
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
    assert [text[:18] for text in seen["notices"]] == ["No suite was asked", "A valid run as MLP"]
    assert seen["resources"] == []
    assert seen["captions"] == 0
    assert len(seen["contents"]) == len(seen["headings"]) == 10
    assert seen["commands"][0] == "edgeport validate BUNDLE"
    assert seen["commands"][3] == "edgeport export tiny --target a-target --recipe int8 -o BUNDLE"


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
    assert phone["headings"][0] == "What the gate checked"
    assert phone["background"] == "rgb(22, 22, 20)"


def test_an_empty_shell_says_that_it_is_empty(tmp_path: Path) -> None:
    seen = browse(tmp_path, render_report(manifest(), ""))
    assert seen["verdict"] == "This page holds no measurements."
    assert len(seen["orders"][0]) == 3


def scored(wrong: int, suite: str = "sentiment") -> Any:
    """Of 200 samples that the original has right but for 20, `wrong` more are wrong."""
    original = [1.0] * 180 + [0.0] * 20
    artifact = [0.0] * wrong + original[wrong:]
    data = DataRecord(name="d", real=True, sha256={}, slice="rows 0 to 200", licence="MIT", samples=200)
    return score_task(
        suite=suite, metric="accuracy", unit="share", chance=0.5, original=original, artifact=artifact, data=data
    )


def measured_in_full(name: str = "logits", wrong: int = 30, p50: float = 15.3) -> Evidence:
    """With suites, all calls, work, and generation."""
    value = evidence(name)
    assert value.latency is not None
    calls = [p50 + 0.01 * i for i in range(101)]
    latency = value.latency.model_copy(
        update={
            "p50_ms": p50,
            "calls": CallTimes(percentiles_ms=tuple(calls), course_ms=(p50,) * 60),
            "baseline_calls": CallTimes(percentiles_ms=tuple(2 * x for x in calls), course_ms=(2 * p50,) * 60),
        }
    )
    work = Work(
        input_shapes={"x": (1, 128)},
        flops=2_000_000_000,
        weight_bytes=20_000_000,
        activation_bytes=5_000_000,
        peak_gflops=200.0,
        bandwidth_gb_s=20.0,
    )
    rate = GenerationRate(
        length=32,
        first_token_ms=40.6,
        prefill_tokens_per_s=788,
        prefill_cpu_ms=40.5,
        decode_tokens_per_s=63.2,
        decode_cpu_ms=15.8,
    )
    generation = Generation(
        context=1024, cache="int8", cache_bytes=11_796_480, long_tokens=96, long_cosine=1, long_kl=0, rates=(rate,)
    )
    return value.model_copy(
        update={
            "latency": latency,
            "work": work,
            "generation": generation,
            "tasks": (scored(wrong), scored(0, "mine")),
        }
    )


def test_suites_all_calls_the_roof_and_generation_are_drawn(tmp_path: Path) -> None:
    seen = browse(tmp_path, report(measured_in_full()))
    suites = [text.split("\t") for text in seen["tables"]["Suites: the file and the original on the same samples"]]
    assert [row[:3] for row in suites] == [["sentiment", "accuracy", "200"], ["mine", "accuracy", "200"]]
    assert suites[0][5].startswith("−15 pt")  # 30 of 200
    assert suites[0][6:8] == ["30", "0"]
    assert suites[1][5].startswith("0 pt")
    # p50, p90 and p99 of both; the two points under the roof
    assert dict(seen["circles"]) == {"": 8}
    assert seen["tips"]["All 400 timed calls"] == "this file: p50 is 15.8 ms"
    # 2 Gflop in 15.3 ms are 131 Gflop/s; 2e9 / 25e6 = 80 operations a byte, so arithmetic is the roof
    assert seen["tips"]["Roofline"].startswith("fp32, same runtime: 60.4 Gflop/s")
    assert any("131 Gflop/s, 65.4 %" in text for text in seen["facts"])
    assert any("200 Gflop/s, by arithmetic" in text for text in seen["facts"])
    assert seen["tables"]["Speed with a text of some length in the cache"][0].split("\t")[3] == "63.2"
    assert seen["commands"][0] == "edgeport validate BUNDLE --suite sentiment --suite PATH/mine.toml"


def test_a_page_of_validate_has_no_baseline(tmp_path: Path) -> None:
    value = measured_in_full()
    assert value.latency is not None
    alone = {"baseline_p50_ms": None, "baseline_p90_ms": None, "ratio": None, "baseline_calls": None, "valid": False}
    latency = value.latency.model_copy(update={**alone, "note": "it drifted"})
    memory = value.memory and value.memory.model_copy(update={"baseline_peak_rss_mb": None})
    seen = browse(tmp_path, report(value.model_copy(update={"latency": latency, "memory": memory})))
    tiles = {text.split("\n")[0]: text.split("\n")[1:] for text in seen["tiles"]}
    assert tiles["Latency, p50"] == ["15.3 ms", "p90 16.9 ms; not valid as a claim"]
    assert "Not valid as a claim: it drifted" in seen["notices"]
    assert seen["bars"] == 2
    assert dict(seen["circles"]) == {"": 4}  # p50, p90, p99 and one point under the roof


def test_a_name_in_a_command_is_one_word_of_a_shell(tmp_path: Path) -> None:
    evil = "a; rm -rf 'b' $(c)"
    value = manifest(evil)
    value["source"]["kind"] = "huggingface"
    value["recipe"]["name"] = evil
    seen = browse(tmp_path, render_report(value, evidence_text(evidence(tasks=(scored(1, evil),)))))
    words = [shlex.split(command) for command in seen["commands"]]
    assert words[0][3:] == ["--suite", f"PATH/{evil}.toml", "--original", evil]
    assert words[3][2:7] == [evil, "--target", "a-target", "--recipe", evil]


def explanation(name: str) -> dict[str, Any]:
    """As `edgeport explain` writes it, of three layers; `name` stands wherever an untrusted text can stand."""
    layers = [
        {
            "layer": f"{name}{index}", "parameter": name, "place": name, "group": "attention", "format": "int8",
            "activation": "float", "relative_error": error, "snr_db": 20.0, "cosine": 0.99, "worst": 2 * error,
            "input_error": None, "growth": growth,
        }
        for index, (error, growth) in enumerate(((0.01, 0.01), (0.05, 0.04), (0.06, 0.01)))
    ]  # fmt: skip
    flips = [
        {
            "row": row, "worse": row < 8, "shown": f"{name} input {row}", "cut": False, "length": 5, "label": name,
            "other_answer": name, "answer": "else", "other_score": 1.0, "score": 0.0, "confidence": 0.9,
        }
        for row in range(10)
    ]  # fmt: skip
    part = {"by": "length", "value": name, "n": 100, "other_score": 0.9, "score": 0.8, "worse": 8, "better": 2}
    spread = {"difference": {"mean": -0.1, "low": -0.2, "high": -0.05, "n": 100}, "low": -0.25, "high": -0.01}
    sensitivity = [
        {
            "layer": f"{name}{index}", "parameter": name, "group": "attention", "format": "int8", "bits": 8.1,
            "bytes": 100, "bytes_saved": 300 + index, "weight_error": 0.01, "output_error": None, "cost": None,
            "cheaper": None, "dearer": None, "effect": 0.001 * (index + 1), "kl": None,
        }
        for index in range(3)
    ]  # fmt: skip
    return {
        "schema_version": 1, "bundle": name, "manifest_sha256": "0", "original": name, "original_absent": None,
        "bytes": {
            "file": 2000, "files": [{"path": "model.onnx", "bytes": 2000}], "original": 5200,
            "before": {"attention": 5200}, "steps": [{"label": name, "change": -3200}],
            "cells": [
                {"group": "attention", "part": "codes", "bytes": 1300},
                {"group": "attention", "part": "scales", "bytes": 52},
                {"group": "file", "part": "graph", "bytes": 648},
            ],
            "tensors": [
                {"name": name, "parameter": name, "group": "attention", "part": "codes", "bytes": 1300, "file": name}
            ],
            "beside": [], "notes": [name],
        },
        "layers": {
            "source": "shipped graph", "statement": name, "samples": 4, "output_change": 0.0, "rows": layers,
            "grows_most": f"{name}1", "missing": [],
        },
        "layers_absent": None,
        "flips": [
            {
                "suite": "sentiment", "metric": "accuracy", "unit": "share", "higher_is_better": True,
                "other": "the original", "n": 200, "worse": 8, "better": 2, "chance_of_a_false_alarm": 0.05,
                "slices": [{**part, **spread, "stands_out": True}], "flips": flips, "left_out": 0, "notes": [name],
            }
        ],
        "flips_absent": None,
        "sensitivity": {"source": "measured", "statement": name, "samples": 4, "rows": sensitivity},
        "sensitivity_absent": None,
        "claims": [
            {
                "metric": "accuracy_drop_max", "output": name, "unit": "share", "value": 0.03, "n": 200, "low": 0.0,
                "high": 0.06, "half_width": 0.03, "allowed": 0.02, "state": "undecided", "decided_by": 0.33,
                "needed": 4000, "words": name,
            }
        ],
        "changes": None,
    }  # fmt: skip


def test_an_explanation_is_drawn_and_searched_and_breaks_out_of_nothing(tmp_path: Path) -> None:
    page = render_report(
        manifest("tiny"), evidence_text(measured_in_full()), explanation=embedded(json.dumps(explanation(EVIL)))
    )
    seen = browse(tmp_path, page, width=390, search="input 7")
    assert (seen["title"], seen["images"], seen["overflow"]) == ("", 0, 0)
    flips = "Inputs whose score changed"
    assert len(seen["tables"][flips]) == 10
    assert f"{EVIL} input 0" in seen["tables"][flips][0]
    assert seen["found"][flips] == 1
    assert any(f"{EVIL}1" in tip or f"{EVIL}0" in tip for tip in seen["tips"].values())
    cells = [text.split("\t") for text in seen["tables"]["What the file's bytes are"]]
    assert cells == [
        ["Attention", "5.20 kB", "1.30 kB", "52 B", "–", "67.6 %"],
        ["The file itself", "–", "–", "–", "648 B", "32.4 %"],
    ]
    # three layers, three sensitivities, and the eight of the measurements
    assert sum(count for _, count in seen["circles"]) == 3 + 3 + 8
    claim = seen["tables"]["Each number, and whether the data decides it"][0].split("\t")
    assert claim[1:7] == ["3.0 pt", "0.0 pt – 6.0 pt", "200", "2.0 pt", "undecided", "0.330"]
    assert {"What flipped", "Where the error grows", "Which layers matter", "How sure each claim is"} < set(
        seen["headings"]
    )


def test_what_changed_since_an_older_bundle_stands_first(tmp_path: Path) -> None:
    change = {"what": "size", "before": "2 MB", "after": "1 MB", "change": "−50.0 %", "direction": "better", "note": ""}
    beside = embedded(json.dumps({"name": EVIL, "deltas": [change, {**change, "direction": "not shown"}]}))
    seen = browse(tmp_path, render_report(manifest(), evidence_text(evidence()), against=beside))
    assert seen["headings"][0] == "Against the older bundle"
    lines = seen["tables"]["This bundle and the older one"]
    rows = [[cell.strip() for cell in text.split("\t")[:5]] for text in lines]
    assert rows == [
        ["size", "2 MB", "1 MB", "−50.0 %", "better"],
        ["size", "2 MB", "1 MB", "−50.0 %", "no difference shown"],
    ]
    assert (seen["title"], seen["images"]) == ("", 0)


@pytest.mark.parametrize("width", [390, 1100])
def test_several_bundles_on_one_page(tmp_path: Path, width: int) -> None:
    def candidate(label: str, size: int, wrong: int, p50: float) -> Candidate:
        value = measured_in_full(wrong=wrong, p50=p50)
        size_of = value.size.model_copy(update={"bytes": size})
        return Candidate(label, manifest(), value.model_copy(update={"size": size_of}))

    evil = f"{EVIL} int4"
    page = render_comparison(
        compare([candidate("int8", 23_000_000, 2, 15.0), candidate(evil, 12_000_000, 40, 20.0),
                 candidate("worse", 24_000_000, 40, 21.0)])
    )  # fmt: skip
    seen = browse(tmp_path, page, width=width)
    assert seen["overflow"] == 0
    assert (seen["title"], seen["images"], seen["captions"]) == ("", 0, 0)
    assert seen["headings"][:2] == ["Size, quality, latency", "The bundles"]
    assert dict(seen["circles"]) == {"front": 6}  # three bundles, by size and by latency
    assert seen["tips"]["Size and quality"].startswith("int8: 23.0 MB, 89.0 %")
    bundles = [text.split("\t") for text in seen["tables"]["One row a bundle"]]
    if width > 640:
        assert {row[0].strip(): row[-1].strip() for row in bundles} == {"int8": "–", evil: "–", "worse": evil}
    pairs = seen["tables"]["Pairs of bundles"]
    assert len(pairs) == 6  # three pairs, two suites
    assert sum("no difference shown" in text for text in pairs) == 4
