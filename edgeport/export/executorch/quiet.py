"""Keep the lowering libraries' chatter off the user's terminal, and in the log."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)


@contextmanager
def quiet() -> Iterator[None]:
    """Hold back what libraries print, warn and log inside the block; pass it to this module's debug log.

    The file descriptors themselves are redirected, because most of it is written by C++ code. Root log
    handlers that a library installs meanwhile are removed again. On an error the log still gets the text.
    """
    root = logging.getLogger()
    handlers = list(root.handlers)
    sys.stdout.flush()
    sys.stderr.flush()
    with tempfile.TemporaryFile() as sink, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        saved = {number: os.dup(number) for number in (1, 2)}
        disabled = logging.root.manager.disable
        try:
            for number in saved:
                os.dup2(sink.fileno(), number)
            logging.disable(logging.WARNING)
            yield
        finally:
            logging.disable(disabled)
            sys.stdout.flush()
            sys.stderr.flush()
            for number, original in saved.items():
                os.dup2(original, number)
                os.close(original)
            for handler in root.handlers[:]:
                if handler not in handlers:
                    root.removeHandler(handler)
            sink.seek(0)
            for line in sink.read().decode(errors="replace").splitlines():
                logger.debug("%s", line)
