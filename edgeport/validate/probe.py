"""`python -m edgeport.validate.probe`: in a fresh process, load one artifact, run it once, say what it took.

Standard input: `{"artifact": Artifact.to_json(), "root": folder, "inputs": safetensors file, "threads": 1}`.
Standard output: one JSON object, `Probe`'s fields. Only the artifact's own runtime is imported.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from pathlib import Path

from edgeport.usage import peak_mb, resident_mb

MODULES = {
    # ExecuTorch's Python bindings pass torch tensors: much of what such a process holds is torch's.
    "onnxruntime": ("onnxruntime", "edgeport.runtime.onnxruntime"),
    "executorch": ("torch", "executorch.kernels.quantized", "executorch.runtime", "edgeport.runtime.executorch"),
    "coreml": ("edgeport.runtime.coreml.session",),
}


def import_runtime(runtime: str, *, cache: bool = False) -> None:
    """Import what a session of this runtime imports, so that loading the file is timed alone.

    Args:
        cache: the file is a decoder with a cache.
    """
    for module in MODULES[runtime]:
        importlib.import_module(module)
    if cache and runtime == "executorch":
        from edgeport.export.executorch.quiet import load_attention

        load_attention()


def main() -> None:
    """Read the request, run, write the answer."""
    request = json.load(sys.stdin)
    from edgeport.export.artifact import Artifact
    from edgeport.runtime.session import open_session
    from edgeport.vectors import load_vectors

    artifact = Artifact.from_json(request["artifact"], Path(request["root"]))
    inputs = load_vectors(Path(request["inputs"]))[0]
    import_runtime(artifact.runtime, cache=artifact.context is not None)
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
