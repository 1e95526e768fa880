"""Tables of the bench of structured compression, out of its rows' records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from structured_rows import COREML, ORIGINAL, RUNTIMES, Row

Record = Mapping[str, Any]
TITLES = {
    "minilm": "all-MiniLM-L6-v2, an encoder",
    "smollm2": "SmolLM2-135M-Instruct, a language model (the checkpoint came rounded to 4 bits)",
    "mobilenetv2": "MobileNetV2, a convolutional classifier",
    "efficientnet-lite0": "EfficientNet-Lite0, a convolutional classifier",
}
NEAR = 0.02
"""Share of operations that a runtime may add (zero points, rotations) before it is told."""
NAMES = {"similarity": "Lee similarity", "language": "perplexity"}
SAID = {"similarity": "Lee similarity", "language": "loss in nats", "KL, nats": "KL in nats"}
"""Suites as the table's head and the sentences under it say them."""


def interval(value: Mapping[str, float] | None, form: str = ".3f") -> str:
    """A mean with its 95% interval."""
    if value is None:
        return "–"
    return f"{value['mean']:{form}} ({value['low']:{form}} to {value['high']:{form}})"


def score(suite: str, task: Record) -> str:
    """The score of a row's file: a share in percent, a loss as perplexity, anything else as it is."""
    from math import exp

    found = task["score"]
    if found is None:
        return "not finite"
    if suite == "language":
        return interval({name: exp(found[name]) for name in ("mean", "low", "high")}, ".1f")
    if task["unit"] == "share":
        return interval({name: 100 * found[name] for name in ("mean", "low", "high")}, ".1f") + "%"
    return interval(found)


def speed(cell: Record) -> str:
    """How many times as fast as the original's file in the same runtime."""
    found = cell.get("time_ratio")
    return "–" if found is None else f"{1 / found['mean']:.2f}x ({1 / found['high']:.2f} to {1 / found['low']:.2f})"


def table(rows: Sequence[tuple[Row, Record]]) -> str:
    """A model's table in Markdown."""
    suites = list(dict.fromkeys(suite for _, record in rows for suite in record["tasks"] or ()))
    targets = [target for target in RUNTIMES if any(target in record["cells"] for _, record in rows)]
    timed = [target for target in targets if target != COREML]
    decodes = any("language" in (record["tasks"] or {}) for _, record in rows)
    likeness = next(cell["likeness"] for _, record in rows for cell in record["cells"].values())
    head = ["row", "parameters, M", *(f"{RUNTIMES[target]}, MB" for target in targets), "Mflop in the file"]
    head += [f"speed-up{' of a token' if decodes else ''}, {RUNTIMES[target]}" for target in timed]
    head += [f"{likeness}, {RUNTIMES[target]}" for target in targets]
    head += [f"{NAMES.get(suite, suite)} ({asked(suite, rows)})" for suite in suites]
    lines = [head, ["---"] * len(head)]
    for row, record in rows:
        cells = record["cells"]
        line = [row.name, f"{record['parameters'] / 1e6:.1f}"]
        line += [f"{cells[target]['bytes'] / 1e6:.1f}" if target in cells else "–" for target in targets]
        line.append(flops(cells))
        line += [speed(cells.get(target, {})) for target in timed]
        # Another checkpoint was compared with itself.
        own = row.source is None
        line += [interval(cells[target]["parity"]) if own and target in cells else "–" for target in targets]
        line += [score(suite, record["tasks"][suite]) if suite in (record["tasks"] or ()) else "–" for suite in suites]
        lines.append(line)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def asked(suite: str, rows: Sequence[tuple[Row, Record]]) -> str:
    """How many questions, where all rows were asked as many."""
    counts = sorted({record["tasks"][suite]["n"] for _, record in rows if suite in (record["tasks"] or {})})
    return "n = " + " or ".join(str(count) for count in counts)


def flops(cells: Mapping[str, Record]) -> str:
    """Operations of the products with weights in the first file, and where a file makes others than the model."""
    found = [cell["products"] for cell in cells.values() if cell.get("products")]
    if not found:
        return "–"
    words = f"{found[0]['file'] / 1e6:.0f}"
    other = found[0]["model"]
    return words if abs(found[0]["file"] - other) < NEAR * other else f"{words} ({other / 1e6:.0f} in the model)"


def verdicts(rows: Sequence[tuple[Row, Record]]) -> list[str]:
    """Which row answers better than those it is compared with, in words: also where a method loses."""
    by_name = {row.name: (row, record) for row, record in rows}
    found = []
    for row, record in rows:
        for against in row.against:
            other = by_name[against][1]["tasks"] if against in by_name else None
            for suite, task in (record["tasks"] or {}).items():
                if suite in (other or {}) and len(task["scores"]) == len(other[suite]["scores"]):
                    said = _paired(task, other[suite])
                    found.append(f"- {row.name}, beside {against}: {SAID.get(suite, suite)} {said}.")
    return found


def _paired(task: Record, other: Record) -> str:
    """Who is better on the same rows, or that it can't be told."""
    import numpy as np

    from edgeport.validate.paired import compare_scores

    sign = 1.0 if task["higher_is_better"] else -1.0
    one, two = (sign * np.array(each["scores"], np.float64) for each in (task, other))
    weights = None if task["weights"] is None else np.array(task["weights"], np.float64)
    difference = compare_scores(two, one, unit=task["unit"], confidence=0.975, weights=weights)
    scale, unit = (100, " points") if task["unit"] == "share" else (1, "")
    words = f"{scale * difference.mean:+.3g}{unit} ({scale * difference.lower:+.3g} to {scale * difference.upper:+.3g})"
    if difference.lower > 0:
        return f"is better by {words}"
    return f"is worse by {words}" if difference.upper < 0 else f"can't be told apart on these samples, {words}"


def document(rows: Sequence[tuple[Row, Record]]) -> str:
    """All tables."""
    parts = []
    for model in dict.fromkeys(row.model for row, _ in rows):
        own = [(row, record) for row, record in rows if row.model == model]
        said = verdicts(own)
        parts.append(f"### {TITLES.get(model, model)}\n\n{table(own)}" + ("\n\n" + "\n".join(said) if said else ""))
    return "\n\n".join(parts)


__all__ = ["ORIGINAL", "document", "table", "verdicts"]
