"""Memory and load time of an artifact, measured in fresh processes that do nothing else."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgeport.errors import MeasurementError
from edgeport.export.artifact import Artifact
from edgeport.resources import PACKAGE
from edgeport.runtime.decoder import IDS, TARGET_IDS
from edgeport.storage import list_files
from edgeport.validate.evidence import Memory
from edgeport.vectors import save_vectors

if TYPE_CHECKING:
    import numpy as np

    Arrays = Mapping[str, np.ndarray]

TIMEOUT_SECONDS = 600


def forget(artifact: Artifact) -> bool:
    """Have the system forget what it holds of an artifact's files, so that the next load reads the disk; False where
    it can't be asked to. It is a hint, which Linux follows for pages that nobody uses.
    """
    if not hasattr(os, "posix_fadvise"):
        return False
    try:
        for path in list_files(artifact.root):
            with path.open("rb") as file:
                # Pages that were not written out yet would stay.
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    except OSError:
        return False
    return True


@dataclass(frozen=True)
class Probe:
    """What one fresh process took; MB are 1e6 bytes.

    Attributes:
        peak_rss_mb: most memory ever resident.
        runtime_rss_mb: resident after importing the runtime, before loading the file.
        load_ms, first_run_ms: wall time of loading the file and of the first inference.
        vendor_kernels: False when a reference evaluator ran the file.
    """

    peak_rss_mb: float
    runtime_rss_mb: float
    load_ms: float
    first_run_ms: float
    vendor_kernels: bool


def probe(artifact: Artifact, inputs: Arrays, *, threads: int = 1) -> Probe:
    """Load an artifact in a fresh process and run it once.

    Raises:
        MeasurementError: the process failed, was killed (out of memory, for example), or took too long.
    """
    environment = dict(os.environ)
    environment["OMP_NUM_THREADS"] = str(threads)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(PACKAGE.parent), os.environ.get("PYTHONPATH")]))
    with tempfile.TemporaryDirectory(prefix="edgeport-probe-") as folder:
        vectors = Path(folder) / "inputs.safetensors"
        save_vectors(vectors, [inputs])
        request = {
            "artifact": artifact.to_json(),
            "root": str(artifact.root.absolute()),
            "inputs": str(vectors),
            "threads": threads,
        }
        try:
            done = subprocess.run(
                [sys.executable, "-m", "edgeport.validate.probe"],
                input=json.dumps(request),
                capture_output=True,
                text=True,
                env=environment,
                timeout=TIMEOUT_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise MeasurementError(f"A fresh process did not load and run the file in {TIMEOUT_SECONDS} s.") from error
    if done.returncode != 0:
        why = f"signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise MeasurementError(f"A fresh process that loads and runs the file ended with {why}: {last[0]}")
    return Probe(**json.loads(done.stdout.strip().splitlines()[-1]))


def measure_memory(
    artifact: Artifact, baseline: Artifact | None, inputs: Arrays, *, threads: int = 1, runs: int = 3
) -> Memory:
    """Median memory and load time over several fresh processes; the baseline's memory from one more.

    A program's peak hardly varies from process to process, its load time does. A cold load takes one more process,
    where more than one is asked for.

    Raises:
        MeasurementError: a process failed, or the file ran in a reference evaluator, whose memory says
            nothing about a device.
    """
    cold = probe(artifact, inputs, threads=threads) if runs > 1 and forget(artifact) else None
    ours = [probe(artifact, inputs, threads=threads) for _ in range(runs)]
    if not all(p.vendor_kernels for p in ours):
        raise MeasurementError("A reference evaluator's memory says nothing about a device.")
    theirs = None if baseline is None else probe(baseline, inputs, threads=threads)
    return Memory(
        peak_rss_mb=statistics.median(p.peak_rss_mb for p in ours),
        runtime_rss_mb=statistics.median(p.runtime_rss_mb for p in ours),
        baseline_peak_rss_mb=None if theirs is None else theirs.peak_rss_mb,
        load_ms=statistics.median(p.load_ms for p in ours),
        cold_load_ms=None if cold is None else cold.load_ms,
        first_run_ms=statistics.median(p.first_run_ms for p in ours),
        tokens=None if artifact.context is None else int(inputs[TARGET_IDS if TARGET_IDS in inputs else IDS].size),
    )
