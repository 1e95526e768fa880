"""Export models for several runtimes, one process each, and show what was measured in one table.

    python scripts/matrix.py                  MiniLM, three runtimes, int8 (what scripts/demo runs)
    python scripts/matrix.py --all            three models x three runtimes x {float, int8}
    python scripts/matrix.py --all --readme   and put the table into README.md

Ends with the lowest exit code of those that failed, 0 when all gates passed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
BEGIN, END = "<!-- matrix -->", "<!-- /matrix -->"

MODELS = ("minilm", "efficientnet-lite0", "smollm2")
FLOAT_RECIPES = {"android-arm64-ort": "fp32", "ios18-coreml": "fp16", "raspberry-pi-5-executorch": "fp32"}
"""The demonstrated targets, one a runtime, and the precision each runs at uncompressed."""

HEADER = ("model", "target", "recipe", "size", "of fp32", "cosine", "top-1", "KL", "latency", "peak memory", "verdict")


@dataclass(frozen=True)
class Run:
    """One export: what was asked, and the JSON document that edgeport answered with."""

    model: str
    target: str
    recipe: str
    folder: Path
    code: int
    document: dict[str, Any]


def export(model: str, target: str, recipe: str, out: Path, quick: bool) -> Run:
    """Run `edgeport export` in its own process; its progress goes to our stderr."""
    folder = out / f"{model}-{target}-{recipe}"
    command = [sys.executable, "-m", "edgeport", "export", f"zoo:{model}", "--target", target, "--recipe", recipe]
    command += ["--output", str(folder), "--force", "--json", *(["--quick"] if quick else [])]
    print(f"\n{model} for {target}, {recipe}", file=sys.stderr, flush=True)
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    document = json.loads(done.stdout) if done.stdout else {"what": f"ended with code {done.returncode}"}
    return Run(model, target, recipe, folder, done.returncode, document)


def _latency(evidence: dict[str, Any]) -> str:
    latency = evidence.get("latency")
    if latency is None:
        return "-"
    return f"{latency['ratio']['mean']:.2f}x" + ("" if latency["valid"] else " (not valid)")


def row(run: Run) -> tuple[str, ...]:
    """The table's line for one export; `cosine` is that of the output that came out worst."""
    name = (run.model, run.target, run.recipe)
    evidence = run.document.get("evidence")
    if evidence is None:
        return (*name, *("-",) * 7, f"exit {run.code}: {run.document['what']}")
    size, parity, memory = evidence["size"], evidence["parity"], evidence.get("memory")
    top1 = [item["top1_agreement"]["mean"] for item in parity if item.get("top1_agreement")]
    divergence = [item["kl"]["mean"] for item in parity if item.get("kl")]
    cosines = [item["cosine"]["mean"] for item in parity if item.get("cosine")]
    failed = [check["metric"] for check in evidence["verdict"]["checks"] if not check["passed"]]
    return (
        *name,
        f"{size['bytes'] / 1e6:.1f} MB",
        f"{size['ratio']:.3f}x",
        f"{min(cosines):.4f}" if len(cosines) == len(parity) else "-",
        f"{min(top1):.3f}" if top1 else "-",
        f"{max(divergence):.4f}" if divergence else "-",
        _latency(evidence),
        f"{memory['peak_rss_mb']:.0f} MB" if memory else "-",
        "passed" if not failed else f"exit {run.code}: {', '.join(failed)}",
    )


def markdown(runs: list[Run]) -> str:
    """The table as Markdown, with what its numbers mean below it."""
    measured = [run.document["evidence"] for run in runs if "evidence" in run.document]
    lines = [HEADER, ("---",) * len(HEADER), *(row(run) for run in runs)]
    table = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
    if not measured:
        return table
    machine = measured[0]["machine"]
    versions = ", ".join(f"{name} {machine['versions'][name]}" for name in sorted(machine["versions"]))
    note = (
        f"Measured {min(item['measured_at'] for item in measured)[:10]} on {machine['cpu']}, {machine['cores']} cores, "
        f"one thread; {versions}. Cosine, top-1 agreement and KL are against the uncompressed torch model, for the "
        "output that came out worst; latency is the p50 relative to the fp32 artifact of the same runtime, calls "
        "interleaved. Core ML files were run by edgeport's reference evaluator, not on Apple hardware: no latency or "
        "memory is claimed for them."
    )
    return f"{table}\n\n{note}"


def fill(text: str, table: str) -> str:
    """The text with the table between its two marks.

    Raises:
        ValueError: a mark is missing.
    """
    head, found, rest = text.partition(BEGIN)
    _, closed, tail = rest.partition(END)
    if not (found and closed):
        raise ValueError(f"the text needs {BEGIN} and, after it, {END}")
    return f"{head}{BEGIN}\n{table}\n{END}{tail}"


def draw(runs: list[Run]) -> None:
    """The table on stdout, and below it where the reports are."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 160)
    table = Table(*HEADER, box=None, pad_edge=False)
    for run in runs:
        *cells, verdict = row(run)
        table.add_row(*cells, verdict, style="" if run.code == 0 else "red")
    console.print(table)
    for run in runs:
        if "report" in run.document:
            console.print(f"report: {Path(run.document['report']).absolute()}", soft_wrap=True, highlight=False)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--all", action="store_true", help="three models, and uncompressed as well as int8")
    parser.add_argument("--models", nargs="+", help="names of the zoo")
    parser.add_argument("--targets", nargs="+", choices=FLOAT_RECIPES)
    parser.add_argument("--quick", action="store_true", help="short latency runs, flagged not valid")
    parser.add_argument("--readme", action="store_true", help="put the table into README.md")
    parser.add_argument("--out", type=Path, default=None, help="where the bundles go (out/demo, out/matrix)")
    given = parser.parse_args()
    out: Path = given.out or ROOT / "out" / ("matrix" if given.all else "demo")
    runs = [
        export(model, target, recipe, out, given.quick)
        for model in given.models or (MODELS if given.all else MODELS[:1])
        for target in given.targets or FLOAT_RECIPES
        for recipe in ((FLOAT_RECIPES[target], "int8") if given.all else ("int8",))
    ]
    draw(runs)
    table = markdown(runs)
    out.mkdir(parents=True, exist_ok=True)
    (out / "table.md").write_text(table + "\n")
    if given.readme:
        README.write_text(fill(README.read_text(), table))
    return min((run.code for run in runs if run.code), default=0)


if __name__ == "__main__":
    sys.exit(main())
