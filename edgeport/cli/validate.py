"""`edgeport validate BUNDLE`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgeport.cli.options import AsJson, Debug, Full, Quick, Suites, Verbose, check_effort


def validate(
    bundle: Annotated[
        Path, typer.Argument(metavar="BUNDLE", help="A folder that `edgeport export` wrote.", show_default=False)
    ],
    suite: Suites = None,
    original: Annotated[
        str | None,
        typer.Option(
            help="The model that the bundle was made of, for suites.", show_default="the manifest's, in the zoo"
        ),
    ] = None,
    quick: Quick = False,
    full: Full = False,
    report: Annotated[
        Path | None, typer.Option(help="Write the HTML report of this measurement to this file.", show_default=False)
    ] = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Check a bundle's files against their hashes, run it again on its golden vectors, and judge it again.

    \b
    Examples:
      edgeport validate out/minilm
      edgeport validate out/minilm --json > evidence-of-this-machine.json
      edgeport validate out/minilm --suite sentiment --suite intents
      edgeport validate out/minilm --full --report here.html

    A changed, missing or additional file ends with exit code 2 and its name.
    """
    from edgeport.cli.console import answer, working
    from edgeport.cli.summary import draw_evidence
    from edgeport.validating import validate_bundle

    check_effort(quick, full)
    with working(verbose=verbose or debug) as watcher:
        watcher.stage("start")
        result = validate_bundle(
            bundle, names=tuple(suite or ()), original=original, quick=quick, full=full, progress=watcher
        )
    if report is not None:
        from edgeport.cli.report import write_page
        from edgeport.reporting import page_of
        from edgeport.validate.evidence import Evidence

        write_page(report, page_of(bundle, Evidence(**result.evidence)), "--report")
    document = {
        "bundle": str(bundle),
        "exit_code": result.exit_code,
        "verdict": result.verdict.model_dump(mode="json"),
        "evidence": dict(result.evidence),
    }
    answer(document, as_json, lambda console: draw_evidence(console, result.evidence, [("bundle", str(bundle))]))
    raise typer.Exit(result.exit_code)
