"""The compact tables that a run ends with. They read evidence.json's fields, and say when one is absent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

NOT_MEASURED = "not measured"


def in_bytes(count: float) -> str:
    """A size for people: "23.4 MB" (1 MB = 1e6 bytes)."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(count) >= size:
            return f"{count / size:.3g} {unit}" if count < 100 * size else f"{count / size:.0f} {unit}"
    return f"{count:.0f} B"


def _interval(value: Mapping[str, Any] | None, digits: int) -> str:
    if value is None:
        return NOT_MEASURED
    return f"{value['mean']:.{digits}f} [{value['low']:.{digits}f}, {value['high']:.{digits}f}], n={value['n']}"


def _parity_rows(parity: list[Mapping[str, Any]]) -> list[tuple[str, str]]:
    rows = []
    for item in parity:
        name = item["output"]
        if not item["finite"]:
            rows.append((f"{name}: finite", "NO: the output has NaN or infinite values"))
        worst = "" if item["cosine_worst"] is None else f", worst {item['cosine_worst']:.4f}"
        rows.append((f"{name}: cosine", _interval(item["cosine"], 4) + worst))
        if item.get("top1_agreement"):
            rows.append((f"{name}: top-1 agreement", _interval(item["top1_agreement"], 3)))
        if item.get("kl"):
            rows.append((f"{name}: KL, nats", _interval(item["kl"], 4)))
    return rows


def _of_fp32(size: Mapping[str, Any]) -> str:
    if size["ratio"] is None:
        return ""
    return f", {size['ratio']:.3f}x of fp32 ({in_bytes(size['baseline_bytes'])})"


def _latency(evidence: Mapping[str, Any]) -> str:
    latency = evidence.get("latency")
    if not latency:
        return evidence.get("latency_absent") or NOT_MEASURED
    ratio = latency.get("ratio")
    text = "" if ratio is None else f"{ratio['mean']:.2f}x of fp32, "
    text += f"p50 {latency['p50_ms']:.1f} ms, p90 {latency['p90_ms']:.1f} ms, {latency['threads']} thread"
    if latency.get("cpu_ratio"):
        text += f"; processor time {latency['cpu_ratio']['mean']:.2f}x"
    return text if latency["valid"] else f"{text}; not valid: {latency['note']}"


def _memory(evidence: Mapping[str, Any]) -> str:
    memory = evidence.get("memory")
    if not memory:
        return evidence.get("memory_absent") or NOT_MEASURED
    text = f"{memory['peak_rss_mb']:.0f} MB"
    baseline = memory.get("baseline_peak_rss_mb")
    return text if baseline is None else f"{text} (fp32 {baseline:.0f} MB)"


def _weights(evidence: Mapping[str, Any]) -> str:
    weights = evidence.get("weights")
    if not weights or not weights["checked"]:
        return "none were quantized"
    return f"{weights['equal']} of {weights['checked']} in the file equal the logical ones, bit for bit"


def _tokenizers(evidence: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = []
    for item in evidence.get("tokenizers", ()):
        name = f"{item['implementation']} {item['version'] or ''}".strip()
        if item["absent"] or item["failed"]:
            words = item["absent"] or item["failed"]
        elif item["different"]:
            words = f"{item['different']} of {item['texts']} texts come out otherwise: {item['examples'][0]}"
        else:
            words = f"all {item['texts']} texts come out as the original's"
            words += f", and {item['templates']} chats" if item["templates"] else ""
        rows.append(("tokenizer" + (" on the device" if item["device"] else ""), f"{name}: {words}"))
    return rows


def _generation(evidence: Mapping[str, Any]) -> list[tuple[str, str]]:
    found = evidence.get("generation")
    if not found:
        return []
    size = in_bytes(found["context"] * found["cache_bytes_per_token"])
    rows = [
        (
            "cache",
            f"{found['context']} tokens, {size} when full; {found['long_tokens']} tokens one by one against all at "
            f"once: cosine {found['long_cosine']:.4f}, KL {found['long_kl']:.2g}",
        )
    ]
    for rate in found["rates"]:
        first = f"first token after {rate['first_token_ms']:.0f} ms ({rate['prefill_tokens_per_s']:.0f} tokens/s)"
        then = (
            f"then {rate['decode_tokens_per_s']:.1f} tokens/s ({rate['decode_cpu_ms']:.1f} ms of processor time each)"
        )
        rows.append((f"generation at {rate['length']}", f"{first}, {then}"))
    return rows


def _suites(evidence: Mapping[str, Any]) -> list[tuple[str, str]]:
    """A line a suite: both models' scores, the paired difference with its interval, and how many samples changed."""
    rows = []
    for task in evidence.get("tasks", ()):
        if task["original"] is None or task["artifact"] is None or task["difference"] is None:
            words = "a score is not finite"
        else:
            change = task["difference"]
            words = (
                f"{task['metric']} {task['artifact']['mean']:.4g}, original {task['original']['mean']:.4g}; difference "
                f"{change['mean']:+.4g} [{change['low']:+.4g}, {change['high']:+.4g}] of {task['n']}; "
                f"{task['worse']} worse, {task['better']} better"
            )
        if task["baseline_problem"]:
            words += f" (no yardstick: {task['baseline_problem']})"
        rows.append((f"suite {task['suite']}", words))
    return rows


def cost_words(cost: Mapping[str, Any]) -> str:
    """What compressing took (`edgeport.validate.evidence.CompressionCost`), in one line."""
    parts = [f"{cost['cpu_seconds']:.1f} s of processor time"]
    if cost["peak_rss_mb"] is not None:
        began = "" if cost["start_rss_mb"] is None else f", {cost['start_rss_mb']:.0f} MB when it began"
        parts.append(f"peak {cost['peak_rss_mb']:.0f} MB{began}")
    weights = f"{cost['weights']} weights"
    parts.append(weights + (f", {cost['weights_before']} of them by a run before" if cost["weights_before"] else ""))
    if cost["samples"]:
        parts.append(f"{cost['samples']} inputs" + ("" if cost["tokens"] is None else f" of {cost['tokens']} tokens"))
    return "; ".join(parts)


def evidence_rows(evidence: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Label and text of every line of the summary, without the verdict."""
    size, states, data = evidence["size"], evidence["states"], evidence["data"]
    cost = evidence.get("compression")
    kind = "" if data["real"] else " (not real data)"
    return [
        ("size", in_bytes(size["bytes"]) + _of_fp32(size)),
        *_parity_rows(evidence["parity"]),
        ("quantized weights", _weights(evidence)),
        *_tokenizers(evidence),
        *_generation(evidence),
        *_suites(evidence),
        ("latency", _latency(evidence)),
        ("peak memory", _memory(evidence)),
        *([("compression", cost_words(cost))] if cost else []),
        ("compared on", f"{data['samples']} samples of {data['name']}{kind}"),
        ("lowered", states["lowered"]),
        ("executed here", states["executed_here"]),
        ("numerics verified", states["numerics_verified"]),
        ("", states["statement"]),
    ]


def draw_evidence(console: Console, evidence: Mapping[str, Any], more: list[tuple[str, str]]) -> None:
    """The summary table, the failed checks, and the verdict."""
    from edgeport.cli.tables import facts

    console.print(facts([*evidence_rows(evidence), *more]))
    draw_verdict(console, evidence["verdict"])


def draw_verdict(console: Console, verdict: Mapping[str, Any]) -> None:
    """The failed checks with the first thing to try, what was not compared, and the verdict."""
    from rich.markup import escape

    for check in verdict["checks"]:
        if not check["passed"]:
            word = "[yellow]undecided[/yellow]" if check["undecided"] else "[red]failed[/red]"
            message = check["message"].rstrip(".")
            console.print(f"{word} {escape(message)}. {escape(check['advice'])}", soft_wrap=True)
    for note in verdict["notes"]:
        console.print(f"not compared: {escape(note)}", soft_wrap=True)
    if verdict["passed"]:
        console.print(f"[bold green]PASSED[/bold green] all {len(verdict['checks'])} checks")
    else:
        failed = sum(not check["passed"] for check in verdict["checks"])
        total, code = len(verdict["checks"]), verdict["exit_code"]
        console.print(f"[bold red]FAILED[/bold red] {failed} of {total} checks (exit code {code})")
