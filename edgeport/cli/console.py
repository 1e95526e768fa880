"""Where output goes: the answer to stdout, everything else to stderr, the libraries' chatter to neither."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from edgeport.cli.progress import Watcher

WIDTH_WHEN_PIPED = 140
"""Columns of a table that goes into a file or a pipe."""

QUIET_LIBRARIES = {
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def answers() -> Console:
    """A console on stdout."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else WIDTH_WHEN_PIPED, highlight=False, soft_wrap=False)


def answer(document: Any, as_json: bool, draw: Callable[[Console], None]) -> None:
    """Print a verb's answer: the document as JSON, or drawn for people.

    A reader that leaves early (`| head`) is no error.
    """
    if as_json:
        text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    else:
        console = answers()
        with console.capture() as captured:
            draw(console)
        text = captured.get()
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        # What is left in the buffer must not fail again when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def draw_toml(path: Path) -> Callable[[Console], None]:
    """Draws a TOML file: coloured on a terminal, byte for byte into a file or a pipe."""

    def draw(console: Console) -> None:
        text = path.read_text()
        if console.is_terminal:
            from rich.syntax import Syntax

            console.print(Syntax(text, "toml", background_color="default"))
        else:
            console.out(text, end="", highlight=False)

    return draw


class _ToWatcher(logging.Handler):
    """edgeport's own warnings, as lines of the run."""

    def __init__(self, watcher: Watcher) -> None:
        super().__init__(logging.WARNING)
        self.watcher = watcher

    def emit(self, record: logging.LogRecord) -> None:
        self.watcher.message(record.getMessage())


@contextlib.contextmanager
def _diverted(log: int | None) -> Iterator[int]:
    """Send the file descriptors 1 and 2 to `log` (or both to stderr), and give back a duplicate of stderr.

    Descriptors and not only `sys.stdout`, because half of the chatter comes from C++.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    out, err = os.dup(1), os.dup(2)
    os.dup2(err if log is None else log, 1)
    if log is not None:
        os.dup2(log, 2)
    try:
        yield err
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os.dup2(out, 1)
        os.dup2(err, 2)
        os.close(out)
        os.close(err)


@contextlib.contextmanager
def working(*, verbose: bool) -> Iterator[Watcher]:
    """Run long work: progress on stderr, the libraries' output kept off stdout.

    Without `verbose` what they print goes to a temporary file, whose path is noted on an unexpected
    error; it is deleted otherwise.
    """
    from edgeport.cli.progress import watch
    from edgeport.errors import EdgeportError

    if not verbose:
        for name, value in QUIET_LIBRARIES.items():
            os.environ.setdefault(name, value)
    handle, name = tempfile.mkstemp(prefix="edgeport-", suffix=".log")
    log = Path(name)
    keep = False
    logger = logging.getLogger("edgeport")
    try:
        with contextlib.ExitStack() as stack:
            err = stack.enter_context(_diverted(None if verbose else handle))
            chatter = stack.enter_context(open(2, "w", closefd=False))
            stack.enter_context(contextlib.redirect_stdout(chatter))
            stack.enter_context(contextlib.redirect_stderr(chatter))
            if not verbose:
                stack.enter_context(warnings.catch_warnings())
                warnings.simplefilter("ignore")
            stream = stack.enter_context(open(err, "w", closefd=False))
            watcher = stack.enter_context(watch(stream, time.monotonic))
            handler = _ToWatcher(watcher)
            logger.addHandler(handler)
            stack.callback(logger.removeHandler, handler)
            yield watcher
    except EdgeportError:
        raise
    except Exception as error:
        if not verbose:
            keep = True
            error.add_note(f"What the libraries printed: {log}")
        raise
    finally:
        os.close(handle)
        if not keep:
            log.unlink(missing_ok=True)
