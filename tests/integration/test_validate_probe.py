"""The probe measures its own fresh process, whatever its parent holds."""

import json
import subprocess
import sys

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from edgeport.errors import MeasurementError
from edgeport.export.artifact import Artifact
from edgeport.model.types import TensorSpec
from edgeport.validate.memory import measure_memory, probe


def scaler(folder, count):
    """y = x * w with `count` float32 weights."""
    weight = onnx.numpy_helper.from_array(np.full((1, count), 2, np.float32), "w")
    node = helper.make_node("Mul", ["x", "w"], ["y"])
    io = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, count]) for name in ("x", "y")]
    graph = helper.make_graph([node], "scaler", io[:1], io[1:], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    folder.mkdir()
    onnx.save(model, folder / "model.onnx")
    spec = TensorSpec("x", "float32", (1, count))
    return Artifact("onnxruntime", "cpu", folder, "model.onnx", (spec,), (TensorSpec("y", "float32", (1, count)),))


def test_a_small_child_of_a_large_parent_reports_small(tmp_path):
    artifact = scaler(tmp_path / "small", 16)
    inputs = {"x": np.ones((1, 16), np.float32)}
    ballast = np.ones(1_000_000_000, np.uint8)
    # What the kernel hands down to any child: this is why the probe does not use ru_maxrss.
    handed_down = int(
        subprocess.check_output(
            [sys.executable, "-c", "import resource as r; print(r.getrusage(r.RUSAGE_SELF).ru_maxrss)"]
        )
    )
    found = probe(artifact, inputs)
    assert ballast[-1] == 1
    assert handed_down * 1024 > 1e9
    assert found.peak_rss_mb < 300
    assert 0 < found.runtime_rss_mb <= found.peak_rss_mb
    assert found.load_ms > 0
    assert found.first_run_ms > 0
    assert found.vendor_kernels


def test_weights_show_in_the_peak(tmp_path):
    count = 25_000_000
    inputs = {"x": np.ones((1, count), np.float32)}
    small = probe(scaler(tmp_path / "small", 16), {"x": np.ones((1, 16), np.float32)})
    large = probe(scaler(tmp_path / "large", count), inputs)
    # Weights, input and output are 100 MB each; the file's bytes may be held beside the weights while loading.
    assert large.peak_rss_mb - small.peak_rss_mb > 275


def test_baseline_beside_the_artifact(tmp_path):
    inputs = {"x": np.ones((1, 16), np.float32)}
    memory = measure_memory(scaler(tmp_path / "a", 16), scaler(tmp_path / "b", 16), inputs, runs=2)
    assert memory.baseline_peak_rss_mb == pytest.approx(memory.peak_rss_mb, rel=0.2)
    assert measure_memory(scaler(tmp_path / "c", 16), None, inputs, runs=1).baseline_peak_rss_mb is None


def test_a_file_that_does_not_load_is_a_reason_in_words(tmp_path):
    artifact = scaler(tmp_path / "broken", 16)
    artifact.path.write_bytes(b"not a model")
    with pytest.raises(MeasurementError, match="fresh process that loads and runs the file ended with exit code"):
        probe(artifact, {"x": np.ones((1, 16), np.float32)})


def test_the_probe_imports_only_the_runtime(tmp_path):
    """Torch in the process would add hundreds of megabytes to every figure."""
    artifact = scaler(tmp_path / "small", 16)
    from edgeport.vectors import save_vectors

    save_vectors(tmp_path / "inputs.safetensors", [{"x": np.ones((1, 16), np.float32)}])
    request = {
        "artifact": artifact.to_json(),
        "root": str(artifact.root),
        "inputs": str(tmp_path / "inputs.safetensors"),
        "threads": 1,
    }
    code = "import sys, edgeport.validate.probe as p; p.main(); print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], input=json.dumps(request), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    modules = done.stdout.strip().splitlines()[-1]
    assert "'onnxruntime'" in modules
    assert [name for name in ("torch", "transformers", "pydantic", "scipy", "onnx") if f"'{name}'" in modules] == []
