"""`edgeport recipes [show NAME]`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from edgeport.cli.options import AsJson, Debug, Verbose

if TYPE_CHECKING:
    from rich.console import Console

    from edgeport.recipe import Recipe

HELP = """List what can be done to a model, and the budgets its gate demands.

\b
Examples:
  edgeport recipes
  edgeport recipes --json
  edgeport recipes show int8 > mine.toml   # then: --recipe mine.toml
"""

app = typer.Typer(help=HELP, rich_markup_mode=None)


def _draw(console: Console, recipes: list[Recipe]) -> None:
    from edgeport.cli.tables import listing

    table = listing("name", "what it does", "the gate demands")
    for recipe in recipes:
        table.add_row(
            f"[bold]{recipe.name}[/bold]",
            recipe.summary,
            "\n".join(f"{name} {value}" for name, value in recipe.gate.bounds().items()),
        )
    console.print(table)


@app.callback(invoke_without_command=True)
def recipes(context: typer.Context, as_json: AsJson = False, verbose: Verbose = False, debug: Debug = False) -> None:
    """List the recipes."""
    if context.invoked_subcommand is not None:
        return
    from edgeport.cli.console import answer
    from edgeport.recipe import load_recipe, recipe_names

    found = [load_recipe(name) for name in recipe_names()]
    answer([recipe.model_dump(mode="json") for recipe in found], as_json, lambda console: _draw(console, found))


@app.command()
def show(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="A recipe's name, or the path of a .toml file.", show_default=False)
    ],
    as_json: AsJson = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Print one recipe's file: a good start for your own."""
    from edgeport.cli.console import answer, draw_toml
    from edgeport.recipe import load_recipe, recipe_path

    recipe = load_recipe(name)
    answer(recipe.model_dump(mode="json"), as_json, draw_toml(recipe_path(name)))
