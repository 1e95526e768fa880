"""`edgeport doctor`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from edgeport.cli.options import AsJson, Debug, Verbose
from edgeport.errors import EXIT_BAD_INPUT, EXIT_OK

if TYPE_CHECKING:
    from rich.console import Console

    from edgeport.doctor import Diagnosis

COLOURS = {"ok": "green", "yes": "green", "reference": "yellow", "no": "red", "wrong version": "red", "missing": "red"}


def doctor(as_json: AsJson = False, verbose: Verbose = False, debug: Debug = False) -> None:
    """Check this installation: versions and conflicts, what each runtime can do here, disk and memory.

    Each installed runtime really lowers and runs a one-layer model. Exit code 0: all that is required is well;
    an optional runtime that is not installed is a warning. Exit code 2: something required is missing, has
    another version than edgeport was tested with, conflicts, or an installed runtime does not work.

    \b
    Examples:
      edgeport doctor
      edgeport doctor --json
    """
    from edgeport.cli.console import answer, working
    from edgeport.doctor import diagnose

    with working(verbose=verbose or debug) as watcher:
        diagnosis = diagnose(watcher.stage)
    code = EXIT_BAD_INPUT if diagnosis.problems else EXIT_OK
    document = {**diagnosis.model_dump(mode="json"), "exit_code": code}
    answer(document, as_json, lambda console: _draw(console, diagnosis))
    raise typer.Exit(code)


def _coloured(state: str) -> str:
    return f"[{COLOURS[state]}]{state}[/{COLOURS[state]}]" if state in COLOURS else f"[dim]{state}[/dim]"


def _draw(console: Console, diagnosis: Diagnosis) -> None:
    from rich.markup import escape

    from edgeport.cli.summary import in_bytes
    from edgeport.cli.tables import listing

    console.print(f"edgeport {diagnosis.edgeport}, Python {diagnosis.python}\n")
    packages = listing("package", "tested with", "installed", "group", "state")
    for p in diagnosis.packages:
        packages.add_row(p.name, p.required, p.installed or "-", p.group, _coloured(p.state))
    console.print(packages)
    runtimes = listing("\nruntime", "\ncan lower", "\ncan execute", "\n")
    for r in diagnosis.runtimes:
        runtimes.add_row(r.runtime, _coloured(r.lower), _coloured(r.execute), escape(r.detail))
    console.print(runtimes)
    console.print(f"\ncache   {escape(diagnosis.cache)}, {in_bytes(diagnosis.cache_bytes)}")
    console.print(f"disk    {in_bytes(diagnosis.free_disk_bytes)} free")
    console.print(f"memory  {in_bytes(diagnosis.available_memory_bytes)} free, {diagnosis.cores} cores\n")
    for warning in diagnosis.warnings:
        console.print(f"[yellow]warning[/yellow] {escape(warning)}", soft_wrap=True)
    for problem in diagnosis.problems:
        console.print(f"[red]problem[/red] {escape(problem)}", soft_wrap=True)
    if not diagnosis.problems:
        console.print("[bold green]All that is required is well.[/bold green]")
