"""An explanation on the terminal: what matters most of each table; the document has all of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from edgeport.cli.summary import in_bytes
from edgeport.cli.tables import facts, listing
from edgeport.explain.groups import GROUPS

if TYPE_CHECKING:
    from rich.console import Console

    from edgeport.explain.document import (
        Bytes,
        Changes,
        Claim,
        Explanation,
        LayerErrors,
        Sensitivity,
        Slice,
        SuiteFlips,
    )

ROWS = 10
"""Of a long table."""
FLIPS = 5
"""Inputs of a suite."""
WIDE = 80
"""Characters of an input."""


def draw_explanation(console: Console, found: Explanation, place: str) -> None:
    """All parts that there are, in the document's order, and what is missing."""
    _bytes(console, found.bytes)
    if found.layers is not None:
        _layers(console, found.layers)
    for flips in found.flips:
        _flips(console, flips)
    if found.sensitivity is not None:
        _sensitivity(console, found.sensitivity)
    if found.claims:
        _claims(console, found.claims)
    if found.changes is not None:
        _changes(console, found.changes)
    absent = [
        ("errors of layers", found.layers_absent),
        ("flips", found.flips_absent),
        ("sensitivity", found.sensitivity_absent),
    ]
    console.print()
    console.print(facts([*((name, f"absent: {why}") for name, why in absent if why), ("document", place)]))


def _title(console: Console, text: str, *notes: str) -> None:
    console.print()
    console.print(text, style="bold", markup=False)
    for note in notes:
        console.print(note, style="dim", markup=False)


def _table(console: Console, headers: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    from rich.markup import escape

    table = listing(*headers)
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    console.print(table)


def _more(console: Console, total: int, shown: int) -> None:
    if total > shown:
        console.print(f"and {total - shown} more in the document", style="dim", markup=False)


def _bytes(console: Console, found: Bytes) -> None:
    _title(console, f"Bytes: from {in_bytes(found.original)} of float32 weights to {found.file:,} bytes", *found.notes)
    _table(
        console,
        ("step", "bytes"),
        [
            ("original in float32", f"{found.original:,}"),
            *((step.label, f"{step.change:+,}") for step in found.steps),
            ("the file", f"{found.file:,}"),
        ],
    )


def _layers(console: Console, found: LayerErrors) -> None:
    change = (
        "" if found.output_change is None else f" Watching changed the outputs by {found.output_change:.3g} at most."
    )
    _title(console, f"Errors of layers, {found.samples} inputs", found.statement + change)
    rows = sorted(found.rows, key=lambda row: -row.growth)[:ROWS]
    _table(
        console,
        ("layer", "format", "error", "of its input", "growth", "SNR, dB", "cosine"),
        [
            (
                row.layer,
                row.format,
                f"{row.relative_error:.4f}",
                "—" if row.input_error is None else f"{row.input_error:.4f}",
                f"{row.growth:+.4f}",
                "—" if row.snr_db is None else f"{row.snr_db:.1f}",
                f"{row.cosine:.4f}",
            )
            for row in rows
        ],
    )
    _more(console, len(found.rows), len(rows))
    if found.grows_most is not None:
        console.print(f"The error grows most in {found.grows_most}.", markup=False)
    if found.missing:
        first = found.missing[0]
        console.print(f"Not compared: {len(found.missing)}, such as {first.layer}: {first.why}.", markup=False)


def _flips(console: Console, found: SuiteFlips) -> None:
    _title(
        console,
        f"Flips in {found.suite}: of {found.n} samples {found.worse} are worse than in {found.other}, "
        f"{found.better} better",
        *found.notes,
    )
    if found.slices:
        out = [each for each in found.slices if each.stands_out]
        _table(
            console,
            ("slice", "", "n", "worse", "better", "difference", f"interval for all {len(found.slices)} slices"),
            [_slice(each) for each in (out or found.slices[:ROWS])],
        )
        words = (
            f"{len(out)} of {len(found.slices)} slices stand out"
            if out
            else f"None of {len(found.slices)} slices stands out"
        )
        chance = f"{found.chance_of_a_false_alarm:.0%}"
        console.print(f"{words}; were there no differences, one would in at most {chance} of all runs.", markup=False)
    for flip in found.flips[:FLIPS]:
        text = (flip.shown or f"row {flip.row}").replace("\n", " ")
        text = text if len(text) <= WIDE else text[:WIDE].rstrip() + "…"
        answers = "" if flip.answer is None else f": {flip.other_answer} became {flip.answer}"
        label = "" if flip.label is None else f" (right: {flip.label})"
        console.print(f"{'worse ' if flip.worse else 'better'}  {text!r}{answers}{label}", markup=False)
    _more(console, len(found.flips), FLIPS)


def _slice(found: Slice) -> tuple[str, ...]:
    difference = "—" if found.difference is None else f"{found.difference.mean:+.4f}"
    interval = "—" if found.low is None or found.high is None else f"{found.low:+.4f} to {found.high:+.4f}"
    counts = (str(found.n), str(found.worse), str(found.better))
    return (found.by, found.value, *counts, difference, interval)


def _sensitivity(console: Console, found: Sensitivity) -> None:
    _title(console, f"Layers that matter most ({found.source})", found.statement)
    rows = found.rows[:ROWS]
    columns: dict[str, list[str]] = {
        "layer": [row.layer for row in rows],
        "format": [row.format for row in rows],
        "bits": [f"{row.bits:.2f}" for row in rows],
        "saved": [in_bytes(row.bytes_saved) for row in rows],
        "error of the weight": [f"{row.weight_error:.4f}" for row in rows],
        "of the outputs, alone": ["" if row.effect is None else f"{row.effect:.4f}" for row in rows],
        "KL, nats": ["" if row.kl is None else f"{row.kl:.2g}" for row in rows],
        "cost, nats": ["" if row.cost is None else f"{row.cost:.2g}" for row in rows],
        "one cheaper": ["" if row.cheaper is None else f"{row.cheaper.format} {row.cheaper.cost:.2g}" for row in rows],
        "one dearer": ["" if row.dearer is None else f"{row.dearer.format} {row.dearer.cost:.2g}" for row in rows],
    }
    told = {name: cells for name, cells in columns.items() if any(cells)}
    _table(console, tuple(told), zip(*told.values(), strict=True))
    _more(console, len(found.rows), len(rows))


def _claims(console: Console, found: Sequence[Claim]) -> None:
    undecided = [claim for claim in found if claim.state in ("undecided", "not measured")]
    _title(console, f"How sure each claim is: {len(found)} numbers, {len(undecided)} not decided")
    order = [*undecided, *(claim for claim in found if claim not in undecided)]
    _table(
        console,
        ("claim", "value", "half width", "n", "budget", "", ""),
        [
            (
                claim.metric if claim.output is None else f"{claim.metric} [{claim.output}]",
                "—" if claim.value is None else f"{claim.value + 0.0:.4g} {claim.unit}".rstrip(),
                "—" if claim.half_width is None else f"±{claim.half_width:.2g}",
                "—" if claim.n is None else str(claim.n),
                "—" if claim.allowed is None else f"{claim.allowed:.4g}",
                claim.state,
                claim.words,
            )
            for claim in order
        ],
    )


def _changes(console: Console, found: Changes) -> None:
    this = sum(cell.this for cell in found.cells)
    _title(console, f"Against {found.other}: {found.other_file:,} to {this:,} bytes", *found.notes)
    cells = [cell for cell in found.cells if cell.this != cell.other]
    _table(
        console,
        ("bytes of", "", "there", "here", "change"),
        [
            (GROUPS[cell.group], cell.part, f"{cell.other:,}", f"{cell.this:,}", f"{cell.this - cell.other:+,}")
            for cell in sorted(cells, key=lambda cell: -abs(cell.this - cell.other))[:ROWS]
        ],
    )
    both = [
        (row, row.error - row.other_error)
        for row in found.layers
        if row.error is not None and row.other_error is not None
    ]
    if both:
        rows = sorted(both, key=lambda pair: -abs(pair[1]))[:ROWS]
        _table(
            console,
            ("layer", "format there", "here", "error there", "here", "change"),
            [
                (
                    row.layer,
                    row.other_format,
                    row.format,
                    f"{row.other_error:.4f}",
                    f"{row.error:.4f}",
                    f"{change:+.4f}",
                )
                for row, change in rows
            ],
        )
        _more(console, len(both), len(rows))
    for flips in found.flips:
        _flips(console, flips)
