"""Processor time and resident memory of this process."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path

_highest_before = 0.0
"""MB: the highest peak that `restart_peak` has wiped."""


def resident_mb(field: str) -> float | None:
    """`VmRSS` (now) or `VmHWM` (the most ever) of this process, MB (1e6 bytes); None without /proc.

    Not `ru_maxrss`: on Linux it survives exec, so a small child of a large parent reports the parent's size.
    """
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    for line in status.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024 / 1e6
    return None


def _peak_mb() -> float:
    """Most memory resident since the process began or the kernel's mark was last set back, MB."""
    peak = resident_mb("VmHWM")
    if peak is not None:
        return peak
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def peak_mb() -> float:
    """Most memory ever resident in this process, MB (1e6 bytes)."""
    return max(_peak_mb(), _highest_before)


def restart_peak() -> bool:
    """Set the kernel's mark of the most resident memory back to what is resident now; False where it can't be.

    Source: proc(5), /proc/pid/clear_refs, since Linux 4.0.
    """
    global _highest_before
    before = peak_mb()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    _highest_before = before
    return True


@dataclass(frozen=True)
class Usage:
    """What a part of a run took.

    Attributes:
        cpu_seconds: processor time of all threads.
        start_rss_mb: resident when it began, MB (1e6 bytes); None without /proc.
        peak_rss_mb: most memory resident meanwhile, MB; None where the system only knows of a higher peak before.
    """

    cpu_seconds: float
    start_rss_mb: float | None
    peak_rss_mb: float | None


class Meter:
    """Measures from its making on."""

    def __init__(self) -> None:
        self._fresh = restart_peak()
        self._peak = _peak_mb()
        self._resident = resident_mb("VmRSS")
        self._cpu = time.process_time()

    def read(self) -> Usage:
        """What was used so far."""
        peak = _peak_mb()
        known = self._fresh or peak > self._peak
        return Usage(time.process_time() - self._cpu, self._resident, peak if known else None)
