"""The parity matrix for people: one Markdown file for a pull request, one HTML page without scripts or network."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING

from edgeport.report.numbers import ABSENT, format_bytes
from edgeport.validate.evidence import OutputParity
from edgeport.validate.matrix import Cell, ParityMatrix

if TYPE_CHECKING:
    from jinja2 import Template

HEADER = ("target", "precision", "size", "executed by", "output", "max abs", "relative", "cosine", "KL", "top-1", "")
UNROUNDED = "unrounded"

_TEMPLATES = resources.files("edgeport.report") / "templates"


@dataclass(frozen=True)
class Row:
    """One line: a cell's output, or why the cell has none. `cells` are those of HEADER; `note` belongs below them."""

    outcome: str
    cells: tuple[str, ...]
    note: str = ""


def rows(matrix: ParityMatrix) -> Iterator[Row]:
    """The matrix line by line."""
    for cell in matrix.cells:
        size = ABSENT if cell.file_bytes is None else format_bytes(cell.file_bytes)
        head = (cell.target, cell.precision, size, _by(cell))
        if not cell.outputs:
            yield Row(cell.outcome, (*head, *(ABSENT,) * 6, cell.outcome), _reason(cell))
        for index, output in enumerate(cell.outputs):
            note = _reason(cell) if index == 0 else ""
            yield Row(cell.outcome, (*head, *_numbers(output), cell.outcome), note)
        for output in cell.unrounded:
            yield Row("unrounded", (*head, *_numbers(output), UNROUNDED))


def markdown(matrix: ParityMatrix) -> str:
    """The matrix as Markdown."""
    word = "all cells pass" if matrix.exit_code == 0 else f"exit code {matrix.exit_code}"
    lines = [f"## edgeport parity: {matrix.model}, {word}", "", _lead(matrix), ""]
    lines += ["| " + " | ".join(HEADER) + " |", "|---|---|---:|---|---|---:|---:|---:|---:|---:|---|"]
    lines += ["| " + " | ".join(_escaped(value) for value in row.cells) + " |" for row in rows(matrix)]
    lines += ["", *(f"- {_escaped(line)}" for line in statements(matrix))]
    return "\n".join(lines) + "\n"


def html(matrix: ParityMatrix) -> str:
    """The matrix as a page that asks nothing of the network and runs no script."""
    return _page().render(
        matrix=matrix,
        header=HEADER,
        rows=tuple(rows(matrix)),
        statements=statements(matrix),
        lead=_lead(matrix),
        files=sum(cell.file_bytes is not None for cell in matrix.cells),
        document=matrix.model_dump_json(indent=2),
        style=_style(),
    )


def statements(matrix: ParityMatrix) -> tuple[str, ...]:
    """Who executed each target's files, and why a cell has no numbers or failed."""
    who = dict.fromkeys(
        f"{cell.target}: {cell.executed_by}" for cell in matrix.cells if cell.executed_by != "not executed"
    )
    why = [f"{cell.target} {cell.precision}: {cell.outcome}, {_reason(cell)}" for cell in matrix.cells if cell.reason]
    told = "unrounded: the float16 file with no value rounded between operators: float16 weights alone"
    return (*who, *why, *([told] if any(cell.unrounded for cell in matrix.cells) else ()))


def _lead(matrix: ParityMatrix) -> str:
    kind = "real" if matrix.data.real else "random"
    return (
        f"{matrix.task}, {matrix.parameters / 1e6:.1f} M parameters. Every file against the uncompressed torch model "
        f"in float32, on the same {matrix.data.samples} {kind} inputs ({matrix.data.name}: {matrix.data.slice}). "
        "Relative is the norm of the difference over that of the reference; cosine is the mean over the inputs and, in "
        "brackets, the worst; KL in nats."
    )


def _numbers(parity: OutputParity) -> tuple[str, ...]:
    """output, max abs, relative, cosine, KL, top-1."""
    if not parity.finite:
        return (parity.output, "not finite", *(ABSENT,) * 4)
    cosine = ABSENT
    if parity.cosine is not None and parity.cosine_worst is not None:
        cosine = f"{parity.cosine.mean:.6f} ({parity.cosine_worst:.6f})"
    return (
        parity.output,
        f"{parity.max_abs:.2g}",
        f"{parity.relative_l2:.2g}",
        cosine,
        ABSENT if parity.kl is None else f"{parity.kl.mean:.2g}",
        ABSENT if parity.top1_agreement is None else f"{parity.top1_agreement.mean:.4f}",
    )


def _by(cell: Cell) -> str:
    """Who executed a file, in few words; the whole statement stands below the table."""
    return cell.executed_by.removeprefix("executed by ").partition(";")[0].removesuffix(" here")


def _reason(cell: Cell) -> str:
    parts = (cell.reason, cell.next_step)
    return " Next: ".join(part for part in parts if part)


def _escaped(value: str) -> str:
    return value.replace("|", "\\|").replace("\n", " ")


@functools.cache
def _style() -> str:
    return (_TEMPLATES / "style.css").read_text()


@functools.cache
def _page() -> Template:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string((_TEMPLATES / "matrix.html").read_text())
