"""The options that every verb takes."""

from __future__ import annotations

from typing import Annotated

import typer

AsJson = Annotated[
    bool, typer.Option("--json", help="Print one JSON document on stdout; everything else goes to stderr.")
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show what the libraries below print, on stderr.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error; implies --verbose.")]
