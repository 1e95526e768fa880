"""Render the report: a shell that follows from the manifest, with the text of evidence.json inside.

Everything measured is drawn in the browser from that text, so that two runs with the same inputs differ
in that one block and nowhere else. explain.json and the comparison with an older bundle have blocks of their own. The
page asks the network for nothing: its content security policy forbids it, and allows the one script and the one style
sheet by their hashes.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING, Any

from edgeport.report.numbers import format_bytes, format_shape
from edgeport.report.waterfall import Waterfall, layer_bytes, left_out, make_waterfall
from edgeport.storage import canonical_json

if TYPE_CHECKING:
    from jinja2 import Template

    from edgeport.report.comparison import Comparison

BLOCKS = ("evidence", "explain", "against")
"""Ids of the script elements that hold data; the shell of a report is the page with all of them empty."""
BLOCK_END = "</script>"
REPORT_SCRIPTS = ("page.js", "charts.js", "report.js", "speed.js", "explained.js", "report_main.js")
COMPARE_SCRIPTS = ("page.js", "charts.js", "compare.js")

_TEMPLATES = resources.files("edgeport.report") / "templates"


def _csp_hash(text: str) -> str:
    """The source expression of a Content-Security-Policy for an inline script or style."""
    digest = hashlib.sha256(text.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"


@dataclass(frozen=True)
class Step:
    """One bar of the size waterfall; `start` and `width` in percent of the whole width."""

    label: str
    style: str
    start: float
    width: float
    value: str


def waterfall_steps(waterfall: Waterfall) -> list[Step]:
    """From the float32 weights down by what each step and group saves, up by what the file adds, to the file."""
    changes = [
        *((method, -count) for method, count in waterfall.removed),
        *((group.label, group.weights - group.before) for group in waterfall.groups),
    ]
    changes.append(("Scales", waterfall.scales))
    changes.append((overhead_label(waterfall), waterfall.overhead))
    levels = [waterfall.before]
    for _, change in changes:
        levels.append(levels[-1] + change)
    whole = max(levels) or 1

    def bar(label: str, style: str, low: int, high: int, value: str) -> Step:
        return Step(label, style, round(100 * low / whole, 3), round(100 * (high - low) / whole, 3), value)

    steps = [bar("Weights in float32", "original", 0, levels[0], format_bytes(levels[0]))]
    for (label, change), before, after in zip(changes, levels[:-1], levels[1:], strict=True):
        if change:
            sign = "+" if change > 0 else ""
            style = "added" if change > 0 else "saved"
            steps.append(bar(label, style, min(before, after), max(before, after), sign + format_bytes(change)))
    steps.append(bar("The file", "total", 0, levels[-1], format_bytes(levels[-1])))
    return steps


def overhead_label(waterfall: Waterfall) -> str:
    """What the rest of the file is: more than the weights, or less."""
    return "Graph, names, padding" if waterfall.overhead >= 0 else "Folded or dropped in lowering"


@functools.cache
def _page(name: str) -> Template:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["bytes"] = format_bytes
    environment.filters["shape"] = format_shape
    environment.filters["shell"] = shlex.quote
    return environment.from_string((_TEMPLATES / name).read_text())


@functools.cache
def _script(names: tuple[str, ...]) -> str:
    """Some files of the templates as one script with a scope of its own."""
    text = "\n".join((_TEMPLATES / name).read_text() for name in names)
    return f'"use strict";\n(() => {{\n{text}}})();\n'


def block_start(name: str) -> str:
    """The start tag of a block of data."""
    return f'<script type="application/json" id="{name}">'


def embedded(text: str) -> str:
    """JSON text that can stand inside a script element: a "<" only occurs within its strings."""
    return text.replace("<", "\\u003c")


def _fill(name: str, scripts: tuple[str, ...], blocks: Mapping[str, str], **values: object) -> str:
    """A page of a template, with its style, its script, and its blocks of data."""
    from markupsafe import Markup

    for block, text in blocks.items():
        if "<" in text:
            raise ValueError(f'the text of the block {block!r} holds a "<"; write it as \\u003c')
    style, script = (_TEMPLATES / "style.css").read_text(), _script(scripts)
    return _page(name).render(
        blocks=Markup("\n".join(block_start(block) + text + BLOCK_END for block, text in blocks.items())),
        style=Markup(style),
        script=Markup(script),
        style_hash=_csp_hash(style),
        script_hash=_csp_hash(script),
        **values,
    )


def render_report(manifest: Mapping[str, Any], evidence: str, *, explanation: str = "", against: str = "") -> str:
    """The text of report.html.

    Args:
        manifest: `Manifest.to_json()`.
        evidence: the text of evidence.json as a page holds it (edgeport.bundle.write.report_text), or "" for the shell.
        explanation: `embedded` text of explain.json, or "".
        against: `embedded` JSON of {"name", "deltas"} (edgeport.report.deltas), or "".

    Raises:
        ValueError: a block's text holds a "<", with which it could break out of its script element.
    """
    from edgeport.validate.suites.definition import suite_names

    waterfall = make_waterfall(manifest)
    return _fill(
        "report.html",
        REPORT_SCRIPTS,
        dict(zip(BLOCKS, (evidence, explanation, against), strict=True)),
        manifest=manifest,
        waterfall=waterfall,
        steps=waterfall_steps(waterfall),
        overhead_label=overhead_label(waterfall),
        smaller=manifest.get("steps") or [],
        layers=[{**layer, **layer_bytes(layer, manifest)} for layer in manifest["layers"]],
        left_out=left_out(manifest),
        facts=canonical_json(manifest["facts"]) if manifest["facts"] else "",
        suites=" ".join(suite_names()),
    )


def render_comparison(comparison: Comparison) -> str:
    """The text of a page that compares bundles."""
    data = embedded(canonical_json(comparison.to_json()))
    title = " · ".join(dict.fromkeys(row.model for row in comparison.rows))
    return _fill("compare.html", COMPARE_SCRIPTS, {"comparison": data}, title=title, count=len(comparison.rows))


def strip_evidence(html: str) -> str:
    """The shell of a report: the page with the text of its blocks cut out.

    Raises:
        ValueError: the page is no edgeport report.
    """
    for name in BLOCKS:
        before, start, rest = html.partition(block_start(name))
        _, end, after = rest.partition(BLOCK_END)
        if not start or not end:
            raise ValueError(f"the page has no {name} block")
        html = before + start + end + after
    return html
