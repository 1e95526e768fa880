"""`edgeport compare BUNDLE...`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgeport.cli.options import AsJson, Debug, Verbose

if TYPE_CHECKING:
    from rich.console import Console

    from edgeport.report.comparison import Comparison


def compare(
    bundles: Annotated[
        list[Path],
        typer.Argument(metavar="BUNDLE...", help="Folders that `edgeport export` wrote.", show_default=False),
    ],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write an HTML page to this file.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write Markdown to this file.", show_default=False)] = None,
    by: Annotated[
        str | None,
        typer.Option(
            help="What to call quality: a suite, or cosine, top1_agreement, kl.",
            show_default="a suite that all have, else closeness to the original",
        ),
    ] = None,
    different_models: Annotated[
        bool, typer.Option("--different-models", help="Take bundles of different models: side by side, not ranked.")
    ] = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Compare bundles of one model by the evidence that they carry: size, quality, latency, memory, verdict.

    A bundle that another one beats in everything is marked. Where two answered the same samples, they are compared
    sample by sample. What can't be compared (other inputs, another machine, a run that was not valid) is marked with a
    star, and the reason said. Nothing is run.

    \b
    Examples:
      edgeport compare out/minilm-int8 out/minilm-int4 out/minilm-fp16
      edgeport compare out/minilm-* -o compare.html --markdown compare.md
      edgeport compare out/minilm-* --by sentiment --json
    """
    from edgeport.cli.console import answer
    from edgeport.cli.report import write_page
    from edgeport.report.markdown import comparison_markdown
    from edgeport.report.render import render_comparison
    from edgeport.reporting import compare_bundles

    found = compare_bundles(bundles, by=by, different_models=different_models)
    if output is not None:
        write_page(output, render_comparison(found), "-o")
    if markdown is not None:
        write_page(markdown, comparison_markdown(found), "--markdown")
    answer(found.to_json(), as_json, lambda console: _draw(console, found))


def _draw(console: Console, found: Comparison) -> None:
    """The table of bundles, the pairs, and what can't be compared."""
    from rich.markup import escape

    from edgeport.cli.tables import listing
    from edgeport.report.markdown import comparison_table
    from edgeport.report.numbers import format_change

    headers, rows = comparison_table(found)
    table = listing(*headers)
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    console.print(table)
    for pair in found.pairs:
        ends = f"{format_change(pair.low, pair.unit)} to {format_change(pair.high, pair.unit)}"
        words = f"{pair.suite}: {pair.second} against {pair.first}: {format_change(pair.change, pair.unit)} [{ends}]"
        console.print(escape(f"{words}, {pair.answer} (n = {pair.n})"), soft_wrap=True)
    for note in found.notes:
        console.print(escape(f"* {note}"), soft_wrap=True)
