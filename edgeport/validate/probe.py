"""`python -m edgeport.validate.probe`: in a fresh process, load one artifact, run it once, say what it took.

Standard input: `{"artifact": Artifact.to_json(), "root": folder, "inputs": safetensors file, "threads": 1}`.
Standard output: one JSON object, `Probe`'s fields. Only the artifact's own runtime is imported.
"""

from __future__ import annotations

import importlib
import json
import resource
import sys
import time
from pathlib import Path

MODULES = {
    # ExecuTorch's Python bindings pass torch tensors: much of what such a process holds is torch's.
    "onnxruntime": ("onnxruntime", "edgeport.runtime.onnxruntime"),
    "executorch": ("torch", "executorch.kernels.quantized", "executorch.runtime", "edgeport.runtime.executorch"),
    "coreml": ("edgeport.runtime.coreml.session",),
}


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


def peak_mb() -> float:
    """Most memory ever resident in this process, MB (1e6 bytes)."""
    peak = resident_mb("VmHWM")
    if peak is not None:
        return peak
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def import_runtime(runtime: str) -> None:
    """Import what a session of this runtime imports, so that loading the file is timed alone."""
    for module in MODULES[runtime]:
        importlib.import_module(module)


def main() -> None:
    """Read the request, run, write the answer."""
    request = json.load(sys.stdin)
    from edgeport.export.artifact import Artifact
    from edgeport.runtime.session import open_session
    from edgeport.vectors import load_vectors

    artifact = Artifact.from_json(request["artifact"], Path(request["root"]))
    inputs = load_vectors(Path(request["inputs"]))[0]
    import_runtime(artifact.runtime)
    imported = resident_mb("VmRSS") or peak_mb()

    start = time.perf_counter_ns()
    session = open_session(artifact, threads=request["threads"])
    loaded = time.perf_counter_ns()
    session.run(inputs)
    ran = time.perf_counter_ns()

    answer = {
        "peak_rss_mb": peak_mb(),
        "runtime_rss_mb": imported,
        "load_ms": (loaded - start) / 1e6,
        "first_run_ms": (ran - loaded) / 1e6,
        "vendor_kernels": session.vendor_kernels,
    }
    # Libraries print to standard output as they like: the answer is its last line.
    print("\n" + json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
