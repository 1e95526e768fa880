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


def memory_plan_words(plan: Mapping[str, Any]) -> str:
    """The plan of a device's memory (`edgeport.validate.evidence.MemoryPlan`), in one line."""
    at = f" for {plan['context']} tokens" if plan["context"] is not None else ""
    parts = [f"weights {in_bytes(plan['weights_bytes'])}"]
    parts += [f"keys and values {in_bytes(plan['cache_bytes'])}{at}"] if plan["cache_bytes"] else []
    live = plan["activations_bytes"]
    parts.append(
        "activations unknown" if live is None else f"activations {in_bytes(live)} ({plan['activations_from']})"
    )
    parts.append(f"loading {in_bytes(plan['loading_bytes'])} (estimate)")
    ram = "" if plan["ram_bytes"] is None else f" of {in_bytes(plan['ram_bytes'])}"
    return f"{in_bytes(plan['total_bytes'])}{ram}: {', '.join(parts)}"


def _planned(evidence: Mapping[str, Any]) -> list[tuple[str, str]]:
    plan, memory = evidence.get("memory_plan"), evidence.get("memory")
    if not plan:
        return []
    text = memory_plan_words(plan)
    if memory:
        measured = (memory["peak_rss_mb"] - memory["runtime_rss_mb"]) * 1e6
        text += f"; measured {in_bytes(measured)}, {measured / plan['total_bytes']:.2f}x of that"
    return [("planned memory", text)]


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
    size = in_bytes(found["cache_bytes"]) + ("" if found["cache"] == "float" else f" in {found['cache']}")
    rows = [
        (
            "cache",
            f"{found['context']} tokens, {size}; {found['long_tokens']} tokens one by one against all at "
            f"once: cosine {found['long_cosine']:.4f}, KL {found['long_kl']:.2g}",
        )
    ]
    if found.get("encoder_ms") is not None:
        rows.append(("encoder", f"{found['encoder_ms']:.0f} ms, before the first token and part of its time"))
    if text := found.get("free_text"):
        words = (
            f"{text['equal']} of {text['texts']} texts are the original's; {text['edits']} of {text['tokens']} tokens "
        )
        rows.append(("writing by itself", words + f"to change, {text['unended']} never end"))
    for rate in found["rates"]:
        first = f"first token after {rate['first_token_ms']:.0f} ms ({rate['prefill_tokens_per_s']:.0f} tokens/s)"
        then = (
            f"then {rate['decode_tokens_per_s']:.1f} tokens/s ({rate['decode_cpu_ms']:.1f} ms of processor time each)"
        )
        rows.append((f"generation at {rate['length']}", f"{first}, {then}"))
    return rows


def _tasks(evidence: Mapping[str, Any]) -> list[tuple[str, str]]:
    """A line a metric of a suite: the artifact's score, and its paired difference from the original's."""
    rows = []
    for task in evidence.get("tasks", ()):
        words = _interval(task["artifact"], 4)
        if task["original"] is not None:
            words += f"; original {task['original']['mean']:.4f}"
        if task["difference"] is not None:
            found = task["difference"]
            words += f", difference {found['mean']:+.4f} [{found['low']:+.4f}, {found['high']:+.4f}]"
            words += f"; of {task['n']} {task['worse']} are worse, {task['better']} better"
        if task["baseline_problem"] is not None:
            words += f"; {task['baseline_problem']}"
        rows.append((f"{task['suite']}: {task['metric']}", words))
    return rows


def _delegation(evidence: Mapping[str, Any]) -> list[tuple[str, str]]:
    found = evidence.get("delegation")
    if not found:
        return []
    words = f"{found['delegates']} parts of the file; {len(found['kernels'])} kinds of kernels run outside of them"
    return [(f"delegated to {found['delegate']}", words)]


def _work(evidence: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Operations and bytes of one inference, and where its speed stands under the machine's roof."""
    if not evidence.get("work"):
        return []
    from edgeport.validate.evidence import Latency, Work
    from edgeport.validate.work import roofline

    work = Work.model_validate(evidence["work"])
    words = f"{work.flops / 1e9:.3g} Gflop, {in_bytes(work.moved_bytes)} moved"
    latency = evidence.get("latency")
    found = None if not latency else roofline(work, Latency.model_validate(latency))
    if found is not None:
        words += f"; {found.achieved_gflops:.3g} Gflop/s, "
        words += (
            f"{found.mfu:.0%} of this machine's float32 peak; {found.bound} allows {found.attainable_gflops:.3g}"
            if found.mfu <= 1
            else f"{found.mfu:.2g} times this machine's float32 peak, as integers can"
        )
    rows = [("one inference", words)]
    if evidence.get("products"):
        file, model = evidence["products"]["file"], evidence["products"]["model"]
        rows.append(
            (
                "products with weights",
                f"{file / 1e9:.4g} Gflop in the file" + ("" if file == model else f", {model / 1e9:.4g} in the model"),
            )
        )
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
        *_tasks(evidence),
        *_tokenizers(evidence),
        *_generation(evidence),
        *_delegation(evidence),
        ("latency", _latency(evidence)),
        *_work(evidence),
        ("peak memory", _memory(evidence)),
        *_planned(evidence),
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
