"""The options that several verbs take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

AsJson = Annotated[
    bool, typer.Option("--json", help="Print one JSON document on stdout; everything else goes to stderr.")
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show what the libraries below print, on stderr.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error; implies --verbose.")]
Quick = Annotated[
    bool,
    typer.Option(
        "--quick", help="A short latency run, whose figure is marked as not valid, and few rows of each suite."
    ),
]
Full = Annotated[
    bool,
    typer.Option("--full", help="A valid latency run: 1024 calls and 60 s at least. A latency budget implies it."),
]
Name = Annotated[str | None, typer.Option(help="Name of the model's files.", show_default=False)]
Task = Annotated[str | None, typer.Option(help="Such as text-classification.", show_default="found from the model")]
ExampleInputs = Annotated[
    Path | None, typer.Option(help="A .safetensors or .npz file with one example per input.", show_default=False)
]
AllowPickle = Annotated[
    bool, typer.Option("--allow-pickle", help="Load pickle checkpoints: they can run any code. Trusted files only.")
]
CalibrationData = Annotated[
    list[str] | None,
    typer.Option(
        "--calibration",
        metavar="SOURCE",
        help="Tune on this instead of the recipe's data: .txt or .jsonl files, pictures, a folder of pictures, or a "
        "data card; may be given several times.",
        show_default=False,
    ),
]
Context = Annotated[
    int | None,
    typer.Option(
        min=2,
        help="Tokens that a language model's cache holds.",
        show_default="what the model can count, at most 2048",
    ),
]
Suites = Annotated[
    list[str] | None,
    typer.Option(
        "--suite",
        metavar="SUITE",
        help="A name of `edgeport suites`, or a .toml file; may be given several times. Budgets on a suite imply it.",
        show_default=False,
    ),
]


def check_effort(quick: bool, full: bool) -> None:
    """Raise BadInputError where both are asked for."""
    from edgeport.errors import BadInputError

    if quick and full:
        raise BadInputError("A latency run is either short or valid.", where="--quick --full", allowed="one of them")
