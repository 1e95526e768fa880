"""`edgeport explain BUNDLE [--against OTHER]`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from edgeport.cli.options import AsJson, Debug, Verbose

if TYPE_CHECKING:
    from edgeport.explaining import PartName


def explain(
    bundle: Annotated[
        Path, typer.Argument(metavar="BUNDLE", help="A folder that `edgeport export` wrote.", show_default=False)
    ],
    against: Annotated[
        Path | None, typer.Option(help="Another bundle of the same task: what changed from it.", show_default=False)
    ] = None,
    suite: Annotated[
        list[str] | None,
        typer.Option(
            "--suite",
            metavar="SUITE",
            help="A name of `edgeport suites`, or a .toml file: run it if the evidence lacks it. May be given several "
            "times.",
            show_default="those of the evidence",
        ),
    ] = None,
    original: Annotated[
        str | None,
        typer.Option(help="The model that the bundle was made of.", show_default="the manifest's, in the zoo"),
    ] = None,
    part: Annotated[
        list[str] | None,
        typer.Option(
            "--part",
            metavar="PART",
            help="bytes, layers, flips, sensitivity or claims; may be given several times.",
            show_default="all",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Where to write the document.", show_default="BUNDLE/explain.json"),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Few rows of each suite that is run.")] = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Explain a bundle: where its bytes went, where the error grows, which inputs flipped, how sure each claim is.

    The original is run where it can be had; without it the document says which parts are missing. The bundle gets
    explain.json and its report is drawn again with it; nothing that the manifest hashes is changed.

    \b
    Examples:
      edgeport explain out/minilm
      edgeport explain out/mine --original ./my-hf-model --suite sentiment
      edgeport explain out/minilm-int4 --against out/minilm-int8
      edgeport explain out/minilm --part bytes --part claims --json

    \b
    Exit codes:
      0 explained · 2 bad input, a changed file, or another original than the bundle's
    """
    from edgeport.bundle.write import EXPLANATION, REPORT
    from edgeport.cli.console import answer, working
    from edgeport.cli.explained import draw_explanation
    from edgeport.errors import BadInputError, EdgeportError
    from edgeport.explaining import PARTS, explain_bundle, write_explanation
    from edgeport.reporting import remake_report
    from edgeport.storage import write_bytes

    asked = tuple(dict.fromkeys(part or PARTS))
    if unknown := [name for name in asked if name not in PARTS]:
        raise BadInputError(f"There is no part {unknown[0]!r}.", where="--part", allowed=PARTS)
    with working(verbose=verbose or debug) as watcher:
        watcher.stage("start")
        found = explain_bundle(
            bundle,
            against=against,
            suites=tuple(suite or ()),
            original=original,
            parts=cast("tuple[PartName, ...]", asked),
            quick=quick,
            progress=watcher,
        )
        place = output or bundle / EXPLANATION
        older = place.read_bytes() if place.is_file() else None
        write_explanation(found, place)
        if output is None:
            try:
                remake_report(bundle)
            except EdgeportError as error:
                if older is not None:  # the page is bound to it
                    write_bytes(place, older)
                    raise
                watcher.message(f"{REPORT} stays as it is: {error.what}")
    answer(found.model_dump(mode="json"), as_json, lambda console: draw_explanation(console, found, str(place)))
