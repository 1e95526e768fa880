"""Large pages: memory keeps what is in it, and the kernel says where it lies."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import numpy as np
import pytest

from edgeport.runtime.large_pages import SIZE, use_large_pages

SWITCH = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def large_kb() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("AnonHugePages:")))


@pytest.mark.skipif(sys.platform != "linux", reason="a system call of Linux")
def test_memory_moves_and_stays_the_same():
    # Not numpy's own memory: numpy asks for large pages itself.
    with mmap.mmap(-1, 16 * SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        pattern = np.random.default_rng(0).bytes(16 * SIZE)
        memory[:] = pattern
        before = large_kb()
        moved = use_large_pages()
        assert memory[:] == pattern
        if not SWITCH.exists() or "[never]" in SWITCH.read_text():
            assert not moved
        if moved:
            assert large_kb() - before >= 15 * SIZE // 1024  # all but its two ends


def test_other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert use_large_pages() is False
