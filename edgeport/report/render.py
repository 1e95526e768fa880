"""Render the report: a shell that follows from the manifest, with the exact text of evidence.json inside.

Everything measured is drawn in the browser from that text, so that two runs with the same inputs differ
in that one block and nowhere else. The page asks the network for nothing: its content security policy
forbids it, and allows the one script and the one style sheet by their hashes.
"""

from __future__ import annotations

import base64
import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING, Any

from edgeport.report.waterfall import Waterfall, layer_bytes, left_out, make_waterfall
from edgeport.storage import canonical_json

if TYPE_CHECKING:
    from jinja2 import Template

EVIDENCE_START = '<script type="application/json" id="evidence">'
EVIDENCE_END = "</script>"

_TEMPLATES = resources.files("edgeport.report") / "templates"


def _csp_hash(text: str) -> str:
    """The source expression of a Content-Security-Policy for an inline script or style."""
    digest = hashlib.sha256(text.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"


def format_bytes(count: float) -> str:
    """Bytes in decimal units with three significant digits: 512 B, 22.9 MB."""
    size = abs(count)
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor * 0.9995:
            scaled = size / factor
            digits = 0 if scaled >= 99.95 else 1 if scaled >= 9.995 else 2
            return f"{'−' if count < 0 else ''}{scaled:.{digits}f} {unit}"
    return f"{'−' if count < 0 else ''}{size:.0f} B"


def format_shape(shape: list[int | dict[str, Any]]) -> str:
    """Sizes of a tensor, free ones with their range: batch 1–8 × sequence 1–512 × 384."""
    parts = [s if isinstance(s, int) else f"{s['name']} {s['minimum']}–{s['maximum']}" for s in shape]
    return " × ".join(str(part) for part in parts) or "scalar"


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
def _page() -> Template:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["bytes"] = format_bytes
    environment.filters["shape"] = format_shape
    return environment.from_string((_TEMPLATES / "report.html").read_text())


def render_report(manifest: Mapping[str, Any], evidence: str) -> str:
    """The text of report.html.

    Args:
        manifest: `Manifest.to_json()`.
        evidence: the exact text of evidence.json (edgeport.bundle.write.evidence_text), or "" for the shell.

    Raises:
        ValueError: the evidence holds a "<", with which it could break out of its script element.
    """
    from markupsafe import Markup

    if "<" in evidence:
        raise ValueError('the text of the evidence holds a "<"; write it as \\u003c')
    style = (_TEMPLATES / "style.css").read_text()
    script = (_TEMPLATES / "report.js").read_text()
    waterfall = make_waterfall(manifest)
    return _page().render(
        manifest=manifest,
        waterfall=waterfall,
        steps=waterfall_steps(waterfall),
        overhead_label=overhead_label(waterfall),
        smaller=manifest.get("steps") or [],
        layers=[{**layer, **layer_bytes(layer, manifest)} for layer in manifest["layers"]],
        left_out=left_out(manifest),
        facts=canonical_json(manifest["facts"]) if manifest["facts"] else "",
        style=Markup(style),
        script=Markup(script),
        style_hash=_csp_hash(style),
        script_hash=_csp_hash(script),
        evidence=Markup(EVIDENCE_START + evidence + EVIDENCE_END),
    )


def strip_evidence(html: str) -> str:
    """The shell of a report: the page with the text of its evidence cut out.

    Raises:
        ValueError: the page is no edgeport report.
    """
    before, start, rest = html.partition(EVIDENCE_START)
    _, end, after = rest.partition(EVIDENCE_END)
    if not start or not end:
        raise ValueError("the page has no evidence block")
    return before + start + end + after
