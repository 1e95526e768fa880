"""Libraries' chatter is held back, what is written beside it shows, and everything is left as it was."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest

from edgeport.export.executorch.quiet import muted

SCRIPT = """
import logging, os, sys, warnings
from edgeport.export.executorch.quiet import muted, quiet
with quiet():
    with muted():
        os.write(1, b"C out\\n"); os.write(2, b"C err\\n")
        print("library out"); print("library err", file=sys.stderr)
    print("python out"); print("python err", file=sys.stderr)
    logging.basicConfig(level=logging.INFO); logging.warning("library log"); warnings.warn("library warning")
os.write(2, b"after\\n"); print("after")
print(len(logging.getLogger().handlers), logging.root.manager.disable)
"""


def test_only_libraries_are_silenced():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["python", "out", "after", "0", "0"]
    assert done.stderr.splitlines() == ["python err", "after"]


def fail() -> None:
    with muted():
        os.write(2, b"why it failed\n")
        raise KeyError


def test_muted_text_reaches_the_debug_log(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.DEBUG, "edgeport.export.executorch.quiet")
    with pytest.raises(KeyError):
        fail()
    assert "why it failed" in caplog.messages
