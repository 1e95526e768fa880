"""Machine and size records."""

import os
import subprocess
import sys
from importlib import metadata

import psutil

from edgeport.export.artifact import Artifact
from edgeport.validate.machine import this_machine
from edgeport.validate.size import measure_size, model_bytes


def test_machine_names_what_measured():
    machine = this_machine()
    assert machine.versions["torch"] == metadata.version("torch")
    assert machine.versions["onnxruntime"] == metadata.version("onnxruntime")
    assert machine.memory_gb == round(psutil.virtual_memory().total / 1e9, 1)
    assert machine.cores == len(os.sched_getaffinity(0))
    assert machine.cpu


def test_machine_and_gate_import_nothing_heavy():
    code = (
        "import sys, edgeport.gate, edgeport.validate.run, edgeport.validate.machine as m; m.this_machine();"
        "print([n for n in ('torch', 'numpy', 'scipy', 'onnxruntime', 'executorch') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def artifact(root, entry):
    return Artifact(runtime="onnxruntime", delegate="cpu", root=root, entry=entry, inputs=(), outputs=())


def test_size_counts_what_the_runtime_loads(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"x" * 100)
    (tmp_path / "model.onnx.data").write_bytes(b"x" * 1000)
    (tmp_path / "model.ort").write_bytes(b"x" * 90)
    (tmp_path / "model.required_operators.config").write_bytes(b"x" * 9)
    assert model_bytes(artifact(tmp_path, "model.onnx")) == 1100
    assert model_bytes(artifact(tmp_path, "model.ort")) == 90


def test_size_of_a_package_folder(tmp_path):
    weights = tmp_path / "model.mlpackage" / "Data" / "weights"
    weights.mkdir(parents=True)
    (weights / "weight.bin").write_bytes(b"x" * 700)
    (tmp_path / "model.mlpackage" / "Manifest.json").write_bytes(b"x" * 30)
    size = measure_size(artifact(tmp_path, "model.mlpackage"), 2920, predicted_bytes=740)
    assert (size.bytes, size.ratio, size.predicted_bytes) == (730, 0.25, 740)
    assert measure_size(artifact(tmp_path, "model.mlpackage"), None).ratio is None
