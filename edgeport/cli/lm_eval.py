"""`edgeport lm-eval`: EleutherAI's harness, with bundles among its models."""

from __future__ import annotations

import sys

import typer


def lm_eval(context: typer.Context) -> None:
    """Run lm-evaluation-harness on a bundle. Everything is given to its own command line, with the model `edgeport`.

    Releases of the harness that look for plugins know the model themselves: `lm_eval --model edgeport` does the same.

    \b
    Examples:
      edgeport lm-eval run --model edgeport --model_args bundle=out/chat --tasks hellaswag --limit 100
      edgeport lm-eval run --model edgeport --model_args bundle=out/chat --tasks mine --include_path my-tasks
      edgeport lm-eval ls tasks
    """
    from edgeport.errors import BadInputError

    try:
        from lm_eval.__main__ import cli_evaluate

        import edgeport.harness  # noqa: F401 - registers the model
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.startswith("edgeport"):
            raise
        raise BadInputError(
            f"The harness is not installed: {error.name} can't be found.",
            where="edgeport lm-eval",
            next_step='Install it with `pip install "edgeport[lm-eval]"`.',
        ) from error
    sys.argv = ["lm_eval", *context.args]
    cli_evaluate()
