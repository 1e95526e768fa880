"""`edgeport suites`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgeport.cli.options import AsJson, Debug, Verbose

if TYPE_CHECKING:
    from rich.console import Console

    from edgeport.validate.suites.definition import Suite


def suites(as_json: AsJson = False, verbose: Verbose = False, debug: Debug = False) -> None:
    """List the suites: what a model can be asked, the original and the shipped file alike.

    \b
    Examples:
      edgeport suites
      edgeport export zoo:minilm -t android-arm64-ort --suite sentiment -o out/minilm
      edgeport validate out/minilm --suite my-suite.toml      # docs/suites.md says how to write one
    """
    from edgeport.cli.console import answer
    from edgeport.validate.suites.definition import load_suite, suite_names

    found = [load_suite(name)[0] for name in suite_names()]
    answer([suite.model_dump(mode="json") for suite in found], as_json, lambda console: _draw(console, found))


def _draw(console: Console, found: list[Suite]) -> None:
    from edgeport.cli.tables import listing
    from edgeport.validate.suites.definition import NEEDS

    table = listing("name", "what is asked", "of", "rows", "quick", "licence")
    for suite in found:
        rows = suite.evaluation.stop - suite.evaluation.start
        table.add_row(
            f"[bold]{suite.name}[/bold]",
            suite.title,
            NEEDS[suite.kind],
            f"up to {rows}",
            str(min(suite.quick, rows)),
            suite.licence or "",
        )
    console.print(table)
