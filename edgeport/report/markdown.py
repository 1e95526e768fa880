"""The whole report as Markdown for a pull request: the verdict, what to try, the figures, and what changed.

What comes from the bundle (names, messages) is escaped: it can break out of no table cell and start no HTML tag.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from edgeport.explain.document import Explanation
from edgeport.report.comparison import Comparison, Row
from edgeport.report.deltas import Delta
from edgeport.report.numbers import (
    ABSENT,
    format_bytes,
    format_change,
    format_cosine,
    format_interval,
    format_ms,
    format_score,
    format_share,
)
from edgeport.report.verdict import number, title
from edgeport.validate.evidence import Evidence, Latency, TaskScore

_SPECIAL = re.compile(r"([\\`*\[\]|~#@]|(?<!\w)_|_(?!\w))")
"""What Markdown would read as markup; "@" would call a user."""

Table = tuple[Sequence[str], Sequence[Sequence[str]]]


def plain(text: str) -> str:
    """Text that Markdown shows as it is, in one line."""
    flat = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _SPECIAL.sub(r"\\\1", flat)


def table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a table; all but the first column are aligned to the right."""
    lines = [f"| {' | '.join(headers)} |", "|---|" + "---:|" * (len(headers) - 1)]
    return [*lines, *(f"| {' | '.join(plain(cell) for cell in row)} |" for row in rows)]


def report_markdown(
    bundle: str,
    manifest: Mapping[str, Any],
    evidence: Evidence,
    *,
    explanation: Explanation | None = None,
    changes: Sequence[Delta] = (),
    against: str | None = None,
) -> str:
    """The report of one bundle.

    Args:
        bundle: the name to show.
        manifest: `Manifest.to_json()`.
        explanation: what `edgeport explain` found, where it was asked.
        changes: `edgeport.report.deltas.deltas` against the bundle named `against`.
    """
    verdict = evidence.verdict
    failed = [check for check in verdict.checks if not check.passed]
    word = "all checks passed" if verdict.passed else f"not ready to ship (exit code {verdict.exit_code})"
    what = f"{manifest['name']}, {manifest['recipe']['name']}, {manifest['target']['name']}"
    lines = [f"## {'✅' if verdict.passed else '❌'} {plain(what)}: {word}", ""]
    lines += [f"{plain(bundle)}: {len(verdict.checks) - len(failed)} of {len(verdict.checks)} checks. "]
    lines[-1] += plain(evidence.states.statement)
    lines.append("")
    for check in failed:
        what = f"**{plain(title(check))}** ({check.outcome})"
        lines.append(f"- {what}: {plain(check.message)}. *Try first: {plain(check.advice)}*")
    lines += [""] if failed else []
    if changes:
        rows = [(d.what, d.before, d.after, d.change, f"{d.direction}; {d.note}".strip("; ")) for d in changes]
        lines += [f"### Against {plain(against or 'the older bundle')}", ""]
        lines += [*table(("what", "before", "now", "change", "it is"), rows), ""]
    lines += ["### Measured on this file", "", *table(("what", "this file", "compared with"), figures(evidence))]
    if evidence.tasks:
        lines += ["", "### Suites, paired with the original", "", *_suites(evidence.tasks)]
    if explanation is not None:
        lines += ["", "### Explained", "", *(f"- {plain(words)}" for words in _explained(explanation))]
    lines += ["", "<details><summary>Every check of the gate</summary>", "", *_checks(evidence), "", "</details>"]
    lines += ["", "<details><summary>Where it comes from</summary>", "", *_origin(manifest, evidence), "", "</details>"]
    return "\n".join(lines) + "\n"


def figures(evidence: Evidence) -> list[tuple[str, str, str]]:
    """What, how much, and beside what: the figures of a report that are no suite's."""
    size = evidence.size
    beside = (
        f"{size.ratio:.2f}× of fp32 ({format_bytes(size.baseline_bytes)})" if size.ratio and size.baseline_bytes else ""
    )
    rows = [("size", format_bytes(size.bytes), beside)]
    for parity in evidence.parity:
        worst = "" if parity.cosine_worst is None else f"worst sample {format_cosine(parity.cosine_worst)}"
        rows.append((f"cosine to the original, {parity.output}", format_interval(parity.cosine, format_cosine), worst))
        if parity.top1_agreement is not None:
            rows.append((f"same top answer, {parity.output}", format_interval(parity.top1_agreement, format_share), ""))
        if parity.kl is not None:
            rows.append((f"KL divergence, {parity.output}", format_interval(parity.kl, _nats), ""))
    rows += _latency(evidence.latency) if evidence.latency else [("latency", "not measured", _why(evidence))]
    memory = evidence.memory
    if memory is None:
        rows.append(("peak memory", "not measured", evidence.memory_absent or ""))
    else:
        base = memory.baseline_peak_rss_mb
        peak = "" if base is None else f"fp32: {format_bytes(base * 1e6)}"
        rows.append(("peak memory", format_bytes(memory.peak_rss_mb * 1e6), peak))
        rows.append(
            ("load, then first inference", f"{format_ms(memory.load_ms)}, {format_ms(memory.first_run_ms)}", "")
        )
    for rate in evidence.generation.rates if evidence.generation else ():
        speed = f"{rate.decode_tokens_per_s:.1f} tokens/s, first after {format_ms(rate.first_token_ms)}"
        rows.append((f"generation behind {rate.length} tokens", speed, ""))
    return rows


def _why(evidence: Evidence) -> str:
    return evidence.latency_absent or ""


def _nats(value: float) -> str:
    return format_score(value, "nats")


def _latency(latency: Latency) -> list[tuple[str, str, str]]:
    validity = "valid run" if latency.valid else f"not valid: {latency.note}"
    p90 = latency.p90
    rows = [
        (
            "latency, p50",
            format_ms(latency.p50_ms),
            "" if latency.baseline_p50_ms is None else f"fp32: {format_ms(latency.baseline_p50_ms)}",
        ),
        ("latency, p90", format_ms(latency.p90_ms) if p90 is None else format_interval(p90, format_ms), validity),
    ]
    if latency.ratio is not None:
        rows.append(("latency over the fp32 file's", format_interval(latency.ratio, lambda x: f"{x:.2f}×"), ""))
    return rows


def _suites(tasks: Sequence[TaskScore]) -> list[str]:
    rows = []
    for task in tasks:
        unit = task.unit
        scores = [ABSENT if each is None else format_score(each.mean, unit) for each in (task.original, task.artifact)]
        found = task.difference
        difference = ABSENT
        if found is not None:
            ends = f"{format_change(found.low, unit)} to {format_change(found.high, unit)}"
            difference = f"{format_change(found.mean, unit)} [{ends}]"
        note = task.baseline_problem or f"{task.worse} worse, {task.better} better"
        rows.append((f"{task.suite}: {task.metric}", str(task.n), *scores, difference, note))
    return table(("suite", "n", "original", "this file", "difference", "samples"), rows)


def _explained(explanation: Explanation) -> Iterator[str]:
    """What a reader of the bundle's numbers should know besides, a line each."""
    found = explanation.bytes
    parts: Counter[str] = Counter()
    for cell in found.cells:
        parts[cell.group] += cell.bytes
    shares = ", ".join(f"{name.replace('_', ' ')} {format_share(n / found.file)}" for name, n in parts.most_common(4))
    yield f"{found.file:,} bytes, from {found.original:,} in float32: {shares}"
    if (layers := explanation.layers) is not None and layers.rows:
        last = layers.rows[-1]
        grows = f"; it grows most in {layers.grows_most}" if layers.grows_most else ""
        yield f"relative error of the last layer's output ({last.layer}): {last.relative_error:.3g}{grows}"
    for flips in explanation.flips:
        words = f"{flips.suite} against {flips.other}: of {flips.n} samples {flips.worse} worse, {flips.better} better"
        outstanding = [f"{part.by} {part.value}" for part in flips.slices if part.stands_out]
        yield words + (f"; stands out: {', '.join(outstanding)}" if outstanding else "; no slice stands out")
    for claim in explanation.claims:
        if claim.state == "undecided":
            needed = "" if claim.needed is None else f"; about {claim.needed:,} samples would decide"
            yield f"undecided: {claim.metric} {claim.output or ''}".rstrip() + needed


def _checks(evidence: Evidence) -> list[str]:
    rows = []
    for check in evidence.verdict.checks:
        spread = "" if check.low is None or check.high is None else f"{check.low:.4g} to {check.high:.4g}"
        amounts = number(check.measured, check.unit), spread, number(check.allowed, check.unit)
        rows.append((title(check), *amounts, check.outcome))
    notes = [f"- not compared: {plain(note)}" for note in evidence.verdict.notes]
    return [*table(("check", "measured", "interval", "allowed", "outcome"), rows), *([""] if notes else []), *notes]


def _origin(manifest: Mapping[str, Any], evidence: Evidence) -> list[str]:
    machine = evidence.machine
    tools = ", ".join(f"{name} {version}" for name, version in sorted(manifest["toolchain"].items()))
    rows = [
        ("model", f"{manifest['source']['reference']}, {manifest['parameters']:,} parameters"),
        ("data of the comparison", f"{evidence.data.samples} samples of {evidence.data.name}: {evidence.data.slice}"),
        ("measured", f"{evidence.measured_at}, {machine.cpu}, {machine.cores} cores, {machine.platform}"),
        ("tools", tools),
        ("sha256 of the manifest", evidence.manifest_sha256 or ABSENT),
        *((name, file["sha256"]) for name, file in sorted(manifest["files"].items()) if name.startswith("model/")),
    ]
    return table(("", ""), rows)


def comparison_markdown(comparison: Comparison) -> str:
    """Several bundles as Markdown."""
    measure = comparison.measure
    lines = [f"## {len(comparison.rows)} bundles compared", ""]
    lines += [*(f"- {plain(note)}" for note in comparison.notes), *([""] if comparison.notes else [])]
    lines += table(*comparison_table(comparison))
    if comparison.axes:
        front = [row.label for row in comparison.rows if _on_front(row)]
        lines += ["", f"On the front of {', '.join(comparison.axes)}: {plain(', '.join(front))}."]
    if comparison.pairs:
        rows = []
        for pair in comparison.pairs:
            ends = f"{format_change(pair.low, pair.unit)} to {format_change(pair.high, pair.unit)}"
            change = f"{format_change(pair.change, pair.unit)} [{ends}]"
            p = ABSENT if pair.mcnemar_p is None else f"{pair.mcnemar_p:.3g}"
            rows.append((f"{pair.second} against {pair.first}", pair.suite, str(pair.n), change, p, pair.answer))
        lines += ["", "### Paired, on the same samples", ""]
        lines += table(("second against first", "suite", "n", "difference", "McNemar p", "the second is"), rows)
        lines += ["", f"All {len(rows)} intervals together hold at 95 % (Bonferroni)."]
    if measure is not None and comparison.axes:
        lines += ["", f"Quality is {plain(measure.title)}."]
    return "\n".join(lines) + "\n"


def _on_front(row: Row) -> bool:
    return row.quality is not None and row.why_quality is None and row.dominated_by is None


def comparison_table(comparison: Comparison) -> Table:
    """The table of bundles, for Markdown and the terminal; a star marks what can't be compared."""
    measure = comparison.measure

    def quality(value: float) -> str:
        if measure is None or measure.name == "cosine":
            return format_cosine(value)
        return format_score(value, measure.unit)

    rows = []
    for row in comparison.rows:
        time = (
            ABSENT if row.p50_ms is None or row.p90_ms is None else f"{format_ms(row.p50_ms)}, {format_ms(row.p90_ms)}"
        )
        star = " *" if row.why_times is not None and row.p50_ms is not None else ""
        ratio = format_interval(row.latency_ratio, lambda x: f"{x:.2f}×") + ("" if row.valid or not star else star)
        memory = ABSENT if row.peak_rss_mb is None else format_bytes(row.peak_rss_mb * 1e6)
        rows.append(
            (
                row.label,
                row.target,
                row.recipe,
                format_bytes(row.bytes) + ("" if row.size_ratio is None else f" ({row.size_ratio:.2f}×)"),
                format_interval(row.quality, quality) + (" *" if row.quality and row.why_quality else ""),
                time + star,
                ratio,
                memory + (" *" if row.why_memory and row.peak_rss_mb is not None else ""),
                "passed" if row.passed else f"failed ({row.exit_code})",
                ABSENT if not comparison.axes else "front" if _on_front(row) else row.dominated_by or ABSENT,
            )
        )
    name = "quality" if measure is None else measure.title
    headers = ("bundle", "target", "recipe", "size", name, "p50, p90", "of fp32", "memory", "gate", "dominated by")
    return headers, rows
