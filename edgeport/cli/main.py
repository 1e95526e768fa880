"""The `edgeport` command: its verbs, and how every failure ends in one clear line and an exit code."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from edgeport.cli import (
    chat,
    compare,
    compress,
    doctor,
    explain,
    export,
    gate,
    inspect,
    lm_eval,
    parity,
    recipes,
    report,
    run,
    suites,
    targets,
    validate,
    zoo,
)
from edgeport.errors import EXIT_BAD_INPUT, EXIT_BUG, EXIT_OK, EdgeportError

EXIT_INTERRUPTED = 130
"""128 + SIGINT, as shells say it."""

HELP = """Ship a trained model to phones and edge boards, with proof that it still works.

A model goes in, a recipe says what to do and a target says where it must run; out comes a bundle whose every
number was measured on the file inside it.

\b
Examples:
  edgeport export zoo:minilm --target android-arm64-ort -o out/minilm
  edgeport export ./my-hf-model --target ios18-coreml --recipe int8 -o out/mine --dry-run
  edgeport compress zoo:minilm --recipe int8 -o out/minilm-int8
  edgeport validate out/minilm
  edgeport gate out/minilm --budget budgets.toml --junit gate.xml
  edgeport parity zoo:minilm -o out/parity
  edgeport explain out/minilm --against released/minilm
  edgeport report out/minilm --against released/minilm --markdown pull-request.md
  edgeport compare out/minilm-int8 out/minilm-int4 -o compare.html
  edgeport run out/smollm2 "What is the capital of France?"
  edgeport targets
  edgeport doctor

\b
Exit codes:
  0 all gates passed · 2 bad input or usage · 3 the target can't take this · 10 parity · 11 accuracy
  12 latency · 13 size · 14 memory · 15 measurement not valid · 70 a bug of ours · 130 interrupted
"""

app = typer.Typer(
    name="edgeport",
    help=HELP,
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
app.command("export", short_help="Compress, lower, measure and bundle a model.")(export.export)
app.command("compress", short_help="Compress a model into a folder that any machine can export.")(compress.compress)
app.command("validate", short_help="Check a bundle's files, run it and judge it again.")(validate.validate)
app.command("gate", short_help="Judge a bundle's evidence by budgets, or against an older bundle.")(gate.gate)
app.command("parity", short_help="Hold one model's files for several runtimes against the same inputs.")(parity.parity)
app.command("explain", short_help="Explain a bundle: bytes, errors of layers, flips, certainty.")(explain.explain)
app.command("report", short_help="Write a bundle's report: HTML, or Markdown for a pull request.")(report.report)
app.command("compare", short_help="Put several bundles on one page.")(compare.compare)
app.command("run", short_help="Let a bundle's language model answer a prompt.")(run.run)
app.command("chat", short_help="Chat with a bundle's language model.")(chat.chat)
app.command("inspect", short_help="Show what a bundle holds and where it came from.")(inspect.inspect)
app.add_typer(targets.app, name="targets", short_help="Where a model can be sent.")
app.add_typer(recipes.app, name="recipes", short_help="What can be done to a model.")
app.command("suites", short_help="What a model can be asked, original and file alike.")(suites.suites)
app.command(
    "lm-eval",
    short_help="Run lm-evaluation-harness on a bundle.",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False},
)(lm_eval.lm_eval)
app.add_typer(zoo.app, name="zoo", short_help="Real models to try it with.")
app.command("doctor", short_help="Check this installation.")(doctor.doctor)


def _print_version(asked: bool) -> None:
    if asked:
        from edgeport import __version__

        print(f"edgeport {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _edgeport(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit(EXIT_BAD_INPUT)


def _fail(document: dict[str, object], text: str, as_json: bool) -> None:
    if as_json:
        print(json.dumps(document, indent=2, ensure_ascii=False))
    print(text, file=sys.stderr)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; the answer is the exit code.

    Args:
        arguments: what follows the program's name; None takes them from `sys.argv`.
    """
    given = sys.argv[1:] if arguments is None else arguments
    as_json = "--json" in given
    debug = "--debug" in given
    try:
        code = app(args=given, prog_name="edgeport", standalone_mode=False)
        if code == EXIT_INTERRUPTED:  # typer catches the interrupt itself
            raise KeyboardInterrupt
        return code if isinstance(code, int) else EXIT_OK
    except EdgeportError as error:
        if debug:
            _print_traceback()
        _fail(error.to_json(), f"error: {error}", as_json)
        return error.exit_code
    except typer.TyperException as error:
        what = error.format_message()
        document = {"error": "UsageError", "what": what, "where": None, "allowed": None, "next": "edgeport --help"}
        _fail({**document, "exit_code": EXIT_BAD_INPUT}, f"error: {what} (`edgeport --help` shows the usage)", as_json)
        return EXIT_BAD_INPUT
    except (KeyboardInterrupt, typer.Abort):
        what = "Interrupted. Finished stages are kept: the same command goes on from there."
        _fail({"error": "Interrupted", "what": what, "exit_code": EXIT_INTERRUPTED}, what, as_json)
        return EXIT_INTERRUPTED
    except Exception as error:  # noqa: BLE001 - the last net: a bug of ours must not end in a bare traceback
        if debug:
            _print_traceback()
        what = f"{type(error).__name__}: {error}"
        hint = "" if debug else "--debug shows the traceback."
        notes = " ".join([hint, *getattr(error, "__notes__", [])]).strip()
        document = {"error": "Bug", "what": what, "where": None, "allowed": None, "next": notes}
        _fail({**document, "exit_code": EXIT_BUG}, f"error: this is a bug of edgeport. {what}\n  {notes}", as_json)
        return EXIT_BUG


def _print_traceback() -> None:
    import traceback

    traceback.print_exc(file=sys.stderr)
