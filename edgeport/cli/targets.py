"""`edgeport targets [show NAME]`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from edgeport.cli.options import AsJson, Debug, Verbose

if TYPE_CHECKING:
    from rich.console import Console

    from edgeport.target import Target

HELP = """List where a model can be sent, and what each target takes.

\b
Examples:
  edgeport targets
  edgeport targets --json
  edgeport targets show ios18-coreml
  edgeport targets show android-arm64-ort > my-phone.toml   # then: --target my-phone.toml
"""

app = typer.Typer(help=HELP, rich_markup_mode=None)


def _formats(target: Target) -> str:
    from edgeport.formats import LAYER_KINDS

    return " ".join(sorted({name for kind in LAYER_KINDS for name in target.weight_formats(kind)}))


def _draw(console: Console, targets: list[Target]) -> None:
    from edgeport.cli.tables import listing

    table = listing("name", "runtime", "os", "arch", "weights", "activations", "run here")
    for target in targets:
        activations = sorted({*target.activations.linear, *target.activations.conv})
        table.add_row(
            f"[bold]{target.name}[/bold]",
            target.runtime,
            target.os,
            target.arch,
            _formats(target),
            " ".join(activations),
            target.execution.here,
        )
    console.print(table)


@app.callback(invoke_without_command=True)
def targets(context: typer.Context, as_json: AsJson = False, verbose: Verbose = False, debug: Debug = False) -> None:
    """List the targets."""
    if context.invoked_subcommand is not None:
        return
    from edgeport.cli.console import answer
    from edgeport.target import load_target, target_names

    found = [load_target(name) for name in target_names()]
    answer([target.model_dump(mode="json") for target in found], as_json, lambda console: _draw(console, found))


@app.command()
def show(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="A target's name, or the path of a .toml file.", show_default=False)
    ],
    as_json: AsJson = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Print one target's file: what it takes, what the device is, and the sources of both."""
    from edgeport.cli.console import answer, draw_toml
    from edgeport.target import load_target, target_path

    target = load_target(name)
    answer(target.model_dump(mode="json"), as_json, draw_toml(target_path(name)))
