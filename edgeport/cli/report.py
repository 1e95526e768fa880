"""`edgeport report BUNDLE`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgeport.cli.options import AsJson, Debug, Verbose

if TYPE_CHECKING:
    from rich.console import Console


def report(
    bundle: Annotated[
        Path, typer.Argument(metavar="BUNDLE", help="A folder that `edgeport export` wrote.", show_default=False)
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The HTML file to write.", show_default="the bundle's own report.html"),
    ] = None,
    markdown: Annotated[
        Path | None,
        typer.Option(help='Write Markdown for a pull request to this file; "-" prints it.', show_default=False),
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option("--against", help="An older bundle: every number beside its own.", show_default=False),
    ] = None,
    budget: Annotated[
        Path | None,
        typer.Option("--budget", "-b", help="A .toml file of budgets.", show_default="the bundle's recipe's [gate]"),
    ] = None,
    evidence: Annotated[
        Path | None,
        typer.Option(help="What `edgeport validate --json` printed.", show_default="the bundle's own evidence"),
    ] = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Write a bundle's report: one HTML file that needs no network, or Markdown for a pull request. Nothing is run.

    With nothing but the bundle its own report.html is drawn again, with explain.json where `edgeport explain` has
    written one. An older bundle, other budgets or other evidence make another page, which goes elsewhere (-o).

    \b
    Examples:
      edgeport report out/minilm
      edgeport report out/minilm -o minilm.html --markdown minilm.md
      edgeport report out/minilm --against released/minilm --markdown pull-request.md
      edgeport validate out/minilm --full --json > here.json
      edgeport report out/minilm --evidence here.json -o here.html

    Exit code 0 says that the page was written; `edgeport gate` has the verdict's.
    """
    from edgeport.cli.console import answer
    from edgeport.reporting import make_report, remake_report

    pages = make_report(bundle, budgets=budget, against=against, measured=evidence)
    printed = markdown is not None and str(markdown) == "-"
    written = []
    if markdown is not None and not printed:
        written.append(write_page(markdown, pages.markdown, "--markdown"))
    if output is not None:
        written.append(write_page(output, pages.html, "-o"))
    elif pages.own and markdown is None:
        written.append(remake_report(bundle))
    elif markdown is None:
        _refuse()
    document = {
        "bundle": str(bundle),
        "written": [str(path) for path in written],
        "passed": pages.evidence.verdict.passed,
        "exit_code_of_the_gate": pages.evidence.verdict.exit_code,
    }
    if printed:
        document["markdown"] = pages.markdown
    answer(document, as_json, lambda console: _draw(console, pages.markdown if printed else "", written))


def _refuse() -> None:
    from edgeport.errors import BadInputError

    raise BadInputError(
        "The bundle's own report.html holds the bundle's own evidence and verdict.",
        where="--against, --budget, --evidence",
        next_step="Write the page elsewhere (-o report.html), or as Markdown (--markdown report.md).",
    )


def write_page(path: Path, text: str, option: str) -> Path:
    """Write a page where `option` says; a place that can't be written is bad input."""
    from edgeport.errors import BadInputError

    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise BadInputError(f"The file can't be written: {error.strerror}.", where=f"{option} {path}") from error
    return path


def _draw(console: Console, printed: str, written: list[Path]) -> None:
    if printed:
        console.out(printed, end="", highlight=False)
    for path in written:
        console.print(f"written {path}", soft_wrap=True, markup=False)
