"""Keep the lowering libraries' chatter off the user's terminal."""

from __future__ import annotations

import importlib
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

logger = logging.getLogger(__name__)


@contextmanager
def _diverted(stream: TextIO | None, number: int, sink: int) -> Iterator[None]:
    """Point a file descriptor, and the Python stream that writes to it, elsewhere."""
    if stream is not None:
        stream.flush()
    original = os.dup(number)
    try:
        os.dup2(sink, number)
        yield
    finally:
        if stream is not None:
            stream.flush()
        os.dup2(original, number)
        os.close(original)


@contextmanager
def muted() -> Iterator[None]:
    """Hold back everything that is printed inside the block, by C code too; pass it to this module's debug log.

    A progress bar stands still meanwhile, so the block should be short: an import, a program's loading.
    """
    with tempfile.TemporaryFile() as sink:
        try:
            with _diverted(sys.stdout, 1, sink.fileno()), _diverted(sys.stderr, 2, sink.fileno()):
                yield
        finally:
            sink.seek(0)
            for line in sink.read().decode(errors="replace").splitlines():
                logger.debug("%s", line)


@contextmanager
def quiet() -> Iterator[None]:
    """Hold back the warnings and log lines of libraries inside the block; remove root handlers that they install."""
    root = logging.getLogger()
    handlers = list(root.handlers)
    disabled = root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(max(disabled, logging.WARNING))
        try:
            yield
        finally:
            logging.disable(disabled)
            for handler in root.handlers[:]:
                if handler not in handlers:
                    root.removeHandler(handler)


def load_libraries() -> None:
    """Import what lowering and running need, without their greetings; registers the quantized kernels."""
    with quiet(), muted():
        for name in (
            "executorch.exir",
            "executorch.kernels.quantized",
            "executorch.extension.pybindings._portable_lib",
            "executorch.runtime",
        ):
            importlib.import_module(name)


def load_attention() -> None:
    """Import what attention over a cache needs (`llama::*`): shapes and kernels, in torch and in the runtime."""
    load_libraries()
    with quiet(), muted():
        importlib.import_module("executorch.extension.llm.custom_ops.custom_ops")
