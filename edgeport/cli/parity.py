"""`edgeport parity MODEL [-t TARGET ...] [--precision fp32 ...] -o DIR`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgeport.cli.options import AllowPickle, AsJson, Context, Debug, ExampleInputs, Name, Task, Verbose

if TYPE_CHECKING:
    from rich.console import Console

    from edgeport.validate.matrix import ParityMatrix


class Precision(StrEnum):
    """The values of `--precision`."""

    fp32 = "fp32"
    fp16 = "fp16"


def parity(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="zoo:NAME, a Hugging Face folder or hub id, a .gguf file, or package.module:factory.",
            show_default=False,
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write.")],
    target: Annotated[
        list[str] | None,
        typer.Option(
            "--target",
            "-t",
            help="A name of `edgeport targets`, or a .toml file; may be given several times.",
            show_default="one a runtime",
        ),
    ] = None,
    precision: Annotated[
        list[Precision] | None,
        typer.Option(help="Of weights and arithmetic; may be given several times.", show_default="fp32 and fp16"),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the output folder if it is a parity matrix.")] = False,
    samples: Annotated[int, typer.Option(min=4, help="Golden inputs.")] = 16,
    context: Context = None,
    name: Name = None,
    task: Task = None,
    example_inputs: ExampleInputs = None,
    allow_pickle: AllowPickle = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Lower one checkpoint for several runtimes and precisions, and hold every file against the same golden outputs.

    \b
    Examples:
      edgeport parity zoo:minilm -o out/parity
      edgeport parity zoo:efficientnet-lite0 -t android-arm64-ort -t ios17-coreml --precision fp16 -o out/parity
      edgeport parity ./my-lm --context 512 --json -o out/parity > parity.json

    Writes parity.json, parity.md, parity.html, and the golden inputs and outputs, to be replayed on a device. A cell
    that is refused or fails says why, and the others go on. Finished cells are kept in the cache.

    \b
    Exit codes (of several: the lowest from 10 on, else the lowest):
      0 every cell that was executed is as close as its precision allows · 2 bad input · 3 a target refused
      10 parity failed · 15 it could not be measured · 70 a bug of ours, in the cell that says so
    """
    from edgeport.cli.console import answer, working
    from edgeport.parity import DEFAULT_TARGETS, ParityRequest
    from edgeport.parity import parity as run
    from edgeport.target import load_target

    request = ParityRequest(
        model=model,
        targets=tuple(load_target(reference) for reference in target or DEFAULT_TARGETS),
        output=output,
        precisions=tuple(each.value for each in precision or Precision),
        force=force,
        name=name,
        task=task,
        example_inputs=example_inputs,
        allow_pickle=allow_pickle,
        context=context,
        samples=samples,
    )
    with working(verbose=verbose or debug) as watcher:
        watcher.stage("start")
        matrix = run(request, watcher)
    document = {"folder": str(output), "exit_code": matrix.exit_code, "matrix": matrix.model_dump(mode="json")}
    answer(document, as_json, lambda console: _draw(console, matrix, output))
    raise typer.Exit(matrix.exit_code)


def _draw(console: Console, matrix: ParityMatrix, output: Path) -> None:
    from rich.markup import escape

    from edgeport.cli.tables import listing
    from edgeport.report.matrix import HEADER, rows, statements

    table = listing(*HEADER)
    for row in rows(matrix):
        table.add_row(*(escape(value) for value in row.cells))
    console.print(table)
    for line in statements(matrix):
        console.print(line, markup=False, soft_wrap=True)
    console.print(f"page: {output / 'parity.html'}", markup=False, soft_wrap=True)
