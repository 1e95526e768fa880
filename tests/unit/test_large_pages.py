"""Large pages: memory keeps what is in it, and the kernel says where it lies."""

from __future__ import annotations

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
    pattern = np.arange(16 * SIZE // 8)
    array = pattern.copy()
    before = large_kb()
    moved = use_large_pages()
    np.testing.assert_array_equal(array, pattern)
    switched_off = not SWITCH.exists() or "[never]" in SWITCH.read_text()
    assert moved is False if switched_off else True
    # Both arrays lie on their own: all of each but its two ends.
    assert large_kb() - before >= (2 * 14 * SIZE // 1024 if moved else 0)


def test_other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert use_large_pages() is False
