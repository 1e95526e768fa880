"""Large pages: memory keeps what is in it, and the kernel says where it lies."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import numpy as np
import pytest

from edgeport.runtime.large_pages import SIZE, use_large_pages

SWITCH = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(sys.platform != "linux", reason="a system call of Linux")
def test_memory_stays_the_same_wherever_it_goes():
    """How much is moved is the kernel's to decide: it may lack room."""
    # Not numpy's own memory: numpy asks for large pages itself.
    with mmap.mmap(-1, 16 * SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        pattern = np.random.default_rng(0).bytes(16 * SIZE)
        memory[:] = pattern
        large = use_large_pages()
        assert memory[:] == pattern
    if not SWITCH.exists() or "[never]" in SWITCH.read_text():
        assert large == 0
    lines = Path("/proc/self/status").read_text().splitlines()
    resident = next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("VmRSS:"))
    assert 0 <= large <= resident + 16 * SIZE / 1e6


def test_other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert use_large_pages() == 0
