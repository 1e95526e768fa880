"""`edgeport gate BUNDLE [--budget FILE] [--against OLD]`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgeport.cli.options import AsJson, Debug, Verbose

if TYPE_CHECKING:
    from rich.console import Console

    from edgeport.validate.evidence import Verdict


def gate(
    bundle: Annotated[
        Path, typer.Argument(metavar="BUNDLE", help="A folder that `edgeport export` wrote.", show_default=False)
    ],
    budget: Annotated[
        Path | None,
        typer.Option(
            "--budget",
            "-b",
            help="A .toml file of budgets: the keys of a recipe's [gate], at the top.",
            show_default="the bundle's recipe's [gate]",
        ),
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option("--against", help="An older bundle that this one must not fall behind.", show_default=False),
    ] = None,
    evidence: Annotated[
        Path | None,
        typer.Option(help="What `edgeport validate --json` printed.", show_default="the bundle's own evidence"),
    ] = None,
    junit: Annotated[Path | None, typer.Option(help="Write JUnit XML to this file.", show_default=False)] = None,
    markdown: Annotated[
        Path | None, typer.Option(help="Write a Markdown summary to this file.", show_default=False)
    ] = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Judge the evidence in a bundle. Nothing is run: `edgeport validate` measures anew.

    Every file is first checked against its hash. A budget on something that was not measured fails.

    \b
    Examples:
      edgeport gate out/minilm
      edgeport gate out/minilm --budget budgets.toml --junit gate.xml --markdown gate.md
      edgeport gate out/minilm --against released/minilm --json
      edgeport validate out/minilm --full --json > here.json; edgeport gate out/minilm --evidence here.json

    \b
    A file of budgets (docs/gate.md has all keys; a unit is part of a number):
      cosine_min = 0.98
      size_max = "25 MB"
      latency_p90_max = "20 ms"
      [accuracy.intents]
      drop_max = "1 point"

    \b
    Exit codes (the lowest of several; all are listed):
      0 all passed · 2 bad input, or a changed file · 10 parity · 11 accuracy · 12 latency · 13 size
      14 memory · 15 not measured, not validly, or on too few samples to decide
    """
    from edgeport.cli.console import answer
    from edgeport.gating import gate_bundle
    from edgeport.report.verdict import junit as junit_text
    from edgeport.report.verdict import markdown as markdown_text
    from edgeport.report.verdict import verdict_document

    verdict = gate_bundle(bundle, budgets=budget, against=against, measured=evidence)
    older = None if against is None else str(against)
    if junit is not None:
        _write(junit, junit_text(str(bundle), verdict), "--junit")
    if markdown is not None:
        _write(markdown, markdown_text(str(bundle), verdict, against=older), "--markdown")
    document = verdict_document(str(bundle), verdict, against=older)
    answer(document, as_json, lambda console: _draw(console, verdict))
    raise typer.Exit(verdict.exit_code)


def _write(path: Path, text: str, option: str) -> None:
    from edgeport.errors import BadInputError

    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise BadInputError(f"The file can't be written: {error.strerror}.", where=f"{option} {path}") from error


def _draw(console: Console, verdict: Verdict) -> None:
    """A line a check, then what failed and what to try, then the verdict."""
    from rich.markup import escape

    from edgeport.cli.summary import draw_verdict
    from edgeport.cli.tables import listing
    from edgeport.report.verdict import number, title

    table = listing("check", "measured", "interval", "allowed", "")
    for check in verdict.checks:
        spread = "" if check.low is None or check.high is None else f"{check.low:.4g} to {check.high:.4g}"
        measured, allowed = number(check.measured, check.unit), number(check.allowed, check.unit)
        table.add_row(*(escape(cell) for cell in (title(check), measured, spread, allowed, check.outcome)))
    console.print(table)
    draw_verdict(console, verdict.model_dump(mode="json"))
