"""The report: a deterministic shell, evidence that can't break out, and a waterfall that sums to the file."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeport.report import make_waterfall, render_report, strip_evidence
from edgeport.report.numbers import format_bytes, format_shape
from edgeport.report.render import block_start, waterfall_steps
from edgeport.report.waterfall import GROUPS, layer_group

EVIL = "\"><script>alert(1)</script><img src=x onerror=alert(1)>'"
BATCH = {"name": "batch", "minimum": 1, "maximum": 8, "example": 1}


def layer(name: str, kinds: list[str], shape: list[int], form: str, after: int, **more: Any) -> dict[str, Any]:
    return {
        "name": name,
        "kinds": kinds,
        "shape": shape,
        "format": form,
        "activation": "float",
        "bytes_before": math.prod(shape) * 4,
        "bytes_after": after,
        "relative_error": 0.01,
        "tied": [],
        "reason": "asked for",
        "sha256": None,
        **more,
    }


def manifest(text: str = "tiny", **changes: Any) -> dict[str, Any]:
    """A manifest as JSON values; `text` stands wherever an untrusted name can stand."""
    return {
        "schema_version": 1,
        "name": text,
        "task": text,
        "modality": "text",
        "source": {"kind": text, "reference": text, "files": {text: text}, "licence": text, "note": text},
        "parameters": 1000 + 8000 + 50,
        "recipe": {"name": text, "summary": text},
        "target": {"name": text, "title": text, "os": text, "arch": text},
        "settings": {"precision": "fp32", "shapes": "dynamic"},
        "runtime": "onnxruntime",
        "delegate": "cpu",
        "entry": "model/model.onnx",
        "inputs": [{"name": text, "dtype": "float32", "shape": [{**BATCH, "name": text}, 8]}],
        "outputs": [{"name": text, "dtype": "float32", "shape": []}],
        "files": {"model/model.onnx": {"sha256": text, "bytes": 9700}, "golden/x": {"sha256": "0", "bytes": 5}},
        "layers": [
            layer(f"embed.weight{text}", ["embedding"], [100, 10], "int8", 1400, tied=[text], reason=text),
            layer("layers.0.attn.q_proj.weight", ["linear"], [80, 100], "int8", 8320),
        ],
        "data": {"name": text, "real": True, "sha256": {text: text}, "slice": text, "licence": text, "samples": 4},
        "toolchain": {text: text},
        "facts": {text: [text]},
        **changes,
    }


class Elements(HTMLParser):
    """Every start tag with its attributes, as a browser would see them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_untrusted_names_stay_text() -> None:
    plain, evil = Elements(render_report(manifest(), "")), Elements(render_report(manifest(EVIL), ""))
    assert [tag for tag, _ in evil.found] == [tag for tag, _ in plain.found]
    assert [sorted(attributes) for _, attributes in evil.found] == [sorted(attributes) for _, attributes in plain.found]
    assert not any(name.startswith("on") for _, attributes in evil.found for name in attributes)


def test_evidence_with_a_tag_is_refused() -> None:
    with pytest.raises(ValueError, match="<"):
        render_report(manifest(), '{"a": "</script>"}')


def test_the_page_asks_the_network_for_nothing() -> None:
    html = render_report(manifest(), "{}")
    for tag, attributes in Elements(html).found:
        for name in ("src", "href", "action", "data", "poster"):
            assert attributes.get(name, "data:,") == "data:,", (tag, attributes)
    policy = next(a["content"] for _, a in Elements(html).found if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert "default-src 'none'" in policy
    style, scripts = re.findall(r"<style>(.*?)</style>", html, re.S), re.findall(r"<script>(.*?)</script>", html, re.S)
    assert (len(style), len(scripts)) == (1, 1)
    for text in (*style, *scripts):
        assert base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() in policy
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|@import|url\(|innerHTML|eval\(", text)


@pytest.mark.parametrize("evidence", ["", "{}\n", json.dumps({"x": "\\u003c/script>", "y": "\u2028é"})])
def test_the_evidence_is_the_only_part_that_a_run_changes(evidence: str) -> None:
    html = render_report(manifest(EVIL), evidence)
    assert html.count(f"{block_start('evidence')}{evidence}</script>") == 1
    assert strip_evidence(html) == render_report(manifest(EVIL), "")
    assert strip_evidence(strip_evidence(html)) == strip_evidence(html)


def test_a_page_without_evidence_block_has_no_shell() -> None:
    with pytest.raises(ValueError, match="no evidence block"):
        strip_evidence("<html></html>")


def test_the_shell_does_not_depend_on_the_process() -> None:
    program = (
        "import sys, json, hashlib\nfrom edgeport.report import render_report\n"
        "print(hashlib.sha256(render_report(json.load(sys.stdin), '').encode()).hexdigest())"
    )
    given_text = json.dumps(manifest())
    hashes = {
        subprocess.run(
            [sys.executable, "-c", program],
            input=given_text,
            env={**os.environ, "PYTHONHASHSEED": seed, "TZ": zone},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for seed, zone in (("1", "UTC"), ("2", "Asia/Tokyo"))
    }
    assert hashes == {hashlib.sha256(render_report(manifest(), "").encode()).hexdigest()}


def test_the_waterfall_by_hand() -> None:
    found = make_waterfall(manifest())
    parts = {group.name: (group.before, group.weights, group.scales) for group in found.groups}
    assert parts == {
        "embedding": (4000, 1000, 400),
        "attention": (32000, 8000, 320),
        "other": (200, 200, 0),
    }
    assert found.overhead == 9700 - 1400 - 8320 - 200 == -220
    assert (found.before, found.file, found.beside, found.scales) == (36200, 9700, (), 720)


def test_what_steps_removed_is_part_of_the_original() -> None:
    sizes = {"parameters_before": 20000, "parameters_after": 9050, "bytes_before": 80000, "bytes_after": 36200}
    step = {"method": "prune_depth", **sizes, "flops_before": 3_000_000, "flops_after": 1_500_000, "divergence": 0.25}
    value = manifest(steps=[{**step, "parts": []}], parameters=20000)
    found = make_waterfall(value)
    assert found.removed == (("prune_depth", 4 * (20000 - 9050)),)
    assert found.before == 80000
    assert sum(group.before for group in found.groups) == 36200
    first, second, *_, last = waterfall_steps(found)
    assert (first.width, second.label, last.width) == (100, "prune_depth", pytest.approx(100 * 9700 / 80000, abs=0.01))
    assert second.width == pytest.approx(100 * 43800 / 80000, abs=0.01)
    page = render_report(value, "")
    assert "20,000 → 9,050" in page
    assert "3.0 M → 1.5 M" in page
    training = {
        "teacher": EVIL, "loss_before": 0.5, "loss_after": 0.125, "steps": 300, "ended": "all steps", "best": 250,
        "inputs": 64, "inputs_held_out": 16, "tokens": 12345, "data": {"name": "web-excerpts"},
    }  # fmt: skip
    taught = render_report(manifest(steps=[{**step, "parts": [], "training": training}], parameters=20000), "")
    assert "0.5 → 0.125 on inputs held out" in taught
    assert "64 inputs of web-excerpts, 16 held out, 12,345 tokens" in taught
    assert EVIL not in taught


def test_zeros_cost_a_bit_a_place() -> None:
    row = layer("a.weight", ["linear"], [10, 16], "float", 40 * 4 + 20)
    value = manifest(layers=[row], parameters=160, settings={"precision": "fp16", "shapes": "fixed"})
    assert {group.name: group.weights for group in make_waterfall(value).groups} == {"other": 40 * 2 + 20}


def test_half_precision_with_a_second_file_beside() -> None:
    files = {
        "model/model.onnx": {"bytes": 20000},
        "model/model.onnx.data": {"bytes": 10000},
        "model/model.ort": {"bytes": 29000},
    }
    rows = [layer("a.weight", ["conv"], [10, 10], "float", 400), layer("b.weight", ["linear"], [4, 32], "int4_g32", 72)]
    found = make_waterfall(
        manifest(files=files, layers=rows, parameters=328, settings={"precision": "fp16", "shapes": "fixed"})
    )
    parts = {group.name: (group.weights, group.scales) for group in found.groups}
    assert parts == {"conv": (200, 0), "other": (64 + 100 * 2, 8)}
    assert (found.file, found.overhead) == (30000, 30000 - 200 - 64 - 8 - 200)
    assert found.beside == (("model/model.ort", 29000),)


def test_a_weight_that_no_output_needs_is_not_in_the_file() -> None:
    value = manifest(facts={"unused_weights": ["layers.0.attn.q_proj.weight"]})
    attention = next(group for group in make_waterfall(value).groups if group.name == "attention")
    assert (attention.before, attention.weights, attention.scales) == (32000, 0, 0)
    assert make_waterfall(value).overhead == 9700 - 1400 - 200
    assert render_report(value, "").count("left out of the file") == 1


FORMATS = {"float": 32, "int8": 8, "int4": 4, "int4_g32": 4, "int3": 3}


@st.composite
def manifests(draw: st.DrawFn) -> dict[str, Any]:
    rows = []
    for index in range(draw(st.integers(0, 12))):
        shape = [draw(st.integers(1, 64)), draw(st.sampled_from([32, 64, 96]))]
        form = draw(st.sampled_from(sorted(FORMATS)))
        count = math.prod(shape)
        scales = draw(st.integers(0, 500)) if form != "float" else 0
        after = count * 4 if form == "float" else (count * FORMATS[form] + 7) // 8 + scales
        kind = draw(st.sampled_from(["linear", "embedding", "conv", "depthwise_conv"]))
        name = draw(
            st.sampled_from(["layers.{}.attn.q.weight", "layers.{}.mlp.weight", "lm_head.weight", "x{}.weight"])
        )
        rows.append(layer(name.format(index), [kind], shape, form, after))
    counted = sum(math.prod(row["shape"]) for row in rows)
    sizes = draw(st.lists(st.integers(1, 2_000_000), min_size=1, max_size=4))
    names = ["model/model.onnx", "model/model.ort", "model/model.onnx.data", "model/deep/x"]
    files = {name: {"bytes": size} for name, size in zip(names, sizes, strict=False)}
    files["assets/tokenizer.json"] = {"bytes": 12345}
    precision = draw(st.sampled_from(["fp32", "fp16"]))
    return manifest(
        layers=rows,
        files=files,
        parameters=counted + draw(st.integers(0, 5000)),
        settings={"precision": precision, "shapes": "fixed"},
    )


@settings(deadline=None)
@given(manifests())
def test_the_waterfall_sums_to_the_file_to_the_byte(value: dict[str, Any]) -> None:
    found = make_waterfall(value)
    in_model = {name: file["bytes"] for name, file in value["files"].items() if name.startswith("model/")}
    on_disk = sum(size for name, size in in_model.items() if name in ("model/model.onnx", "model/model.onnx.data"))
    assert found.file == on_disk
    assert found.file + sum(size for _, size in found.beside) == sum(in_model.values())
    assert sum(group.weights + group.scales for group in found.groups) + found.overhead == on_disk
    assert found.before == 4 * value["parameters"]
    steps = waterfall_steps(found)
    assert (steps[0].start, steps[-1].start) == (0, 0)
    assert steps[-1].width == pytest.approx(100 * found.file / max(found.before, found.file, *levels(found)), abs=0.01)


def levels(found: Any) -> list[int]:
    """Running totals of the waterfall, computed here by hand."""
    changes = [*(g.weights - g.before for g in found.groups), found.scales, found.overhead]
    totals = [found.before]
    for change in changes:
        totals.append(totals[-1] + change)
    assert totals[-1] == found.file
    return totals


@pytest.mark.parametrize(
    ("name", "kinds", "group"),
    [
        ("embeddings.word_embeddings.weight", ("embedding",), "embedding"),
        ("model.embed_tokens.weight", ("embedding", "linear"), "tied_head"),
        ("encoder.layer.0.attention.self.query.weight", ("linear",), "attention"),
        ("encoder.layer.0.attention.output.dense.weight", ("linear",), "attention"),
        ("encoder.layer.0.intermediate.dense.weight", ("linear",), "feed_forward"),
        ("encoder.layer.0.output.dense.weight", ("linear",), "feed_forward"),
        ("model.layers.3.self_attn.k_proj.weight", ("linear",), "attention"),
        ("model.layers.3.mlp.gate_proj.weight", ("linear",), "feed_forward"),
        ("decoder.block.1.layer.1.EncDecAttention.q.weight", ("linear",), "attention"),
        ("decoder.block.1.layer.2.DenseReluDense.wi_0.weight", ("linear",), "feed_forward"),
        ("model.encoder.layers.0.fc1.weight", ("linear",), "feed_forward"),
        ("pooler.dense.weight", ("linear",), "head"),
        ("lm_head.weight", ("linear",), "head"),
        ("classifier.weight", ("linear",), "head"),
        ("_fc.weight", ("linear",), "head"),
        ("blocks.0.depthwise.weight", ("depthwise_conv",), "conv"),
        ("stem.weight", ("conv",), "conv"),
        ("decoder.rnn.gate.weight", ("linear",), "other"),
    ],
)
def test_layer_groups(name: str, kinds: tuple[str, ...], group: str) -> None:
    assert layer_group(name, kinds) == group
    assert group in GROUPS


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (9_996, "10.0 kB"),
        (99_960, "100 kB"),
        (999_600, "1.00 MB"),
        (22_912_345, "22.9 MB"),
        (-441_600, "−442 kB"),
        (1_500_000_000, "1.50 GB"),
    ],
)
def test_bytes_in_words(count: int, text: str) -> None:
    assert format_bytes(count) == text


def test_shapes_in_words() -> None:
    assert format_shape([BATCH, 3, 224]) == "batch 1–8 × 3 × 224"
    assert format_shape([]) == "scalar"
