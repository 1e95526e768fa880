"""Where a measurement was made. Imports nothing heavy: versions come from package metadata."""

from __future__ import annotations

import functools
import os
import platform
from importlib import metadata
from pathlib import Path

from edgeport.validate.evidence import Machine

PACKAGES = ("edgeport", "torch", "onnxruntime", "executorch", "coremltools", "numpy", "transformers")
"""What computes the outputs that are compared."""


def cpu_name() -> str:
    """The processor's name as the system gives it, or its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    found = [line.split(":", 1)[1].strip() for line in lines if line.startswith(("model name", "Model"))]
    return found[0] if found else platform.processor() or platform.machine()


def usable_cores() -> int:
    """Logical cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def this_machine() -> Machine:
    """This machine: system, processor, usable cores, memory (GB, 1e9 bytes), and runtime versions."""
    import psutil

    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return Machine(
        platform=platform.platform(),
        cpu=cpu_name(),
        cores=usable_cores(),
        memory_gb=round(psutil.virtual_memory().total / 1e9, 1),
        python=platform.python_version(),
        versions=versions,
    )
