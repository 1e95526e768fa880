"""Put this process's memory on large pages, after a model was loaded into it.

A decoder reads all of its weights for each token: 18,000 pages of 4 KB of a 72 MB file. Looking up where they lie takes
a fifth of the time (SmolLM2 in 4 bits, x86-64, both runtimes; docs/llm.md). Memory grows by what is empty in the large
pages. A process that never moved its pages gets the same from the environment variable
GLIBC_TUNABLES=glibc.malloc.hugetlb=1.

Source: madvise(2), MADV_HUGEPAGE and MADV_COLLAPSE (since Linux 6.1).
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

MADV_HUGEPAGE, MADV_COLLAPSE = 14, 25
SIZE = 2 << 20
"""Bytes of a large page on x86-64, and on 64-bit Arm with pages of 4 KB."""


def _writable_memory() -> list[tuple[int, int]]:
    """Start and end of the memory of no file that holds at least one whole large page, cut to whole ones."""
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, rights, *_, name = [*line.split(maxsplit=5), ""][:6]
        if rights == "rw-p" and name in ("", "[heap]"):
            start, end = (int(address, 16) for address in addresses.split("-"))
            start, end = -(-start // SIZE) * SIZE, end // SIZE * SIZE
            if start < end:
                found.append((start, end))
    return found


def use_large_pages() -> float:
    """Move what is in memory to large pages, as far as the system lets it; MB (1e6 bytes) of this process on such."""
    if not sys.platform.startswith("linux"):
        return 0.0
    library = ctypes.CDLL(None)
    library.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for start, end in _writable_memory():
        # Where the kernel is older, has them switched off, or lacks the room, all or a part stays as it is.
        library.madvise(start, end - start, MADV_HUGEPAGE)
        library.madvise(start, end - start, MADV_COLLAPSE)
    return _large_mb()


def _large_mb() -> float:
    summary = Path("/proc/self/smaps_rollup")
    lines = summary.read_text().splitlines() if summary.is_file() else []
    return sum(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("AnonHugePages:"))
