"""The products with weights that an ONNX file makes, as ONNX Runtime itself reports them while it runs the file."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeport.errors import MeasurementError
from edgeport.model.types import Axis
from edgeport.runtime.onnxruntime import PROVIDER

if TYPE_CHECKING:
    from edgeport.export.artifact import Artifact

MATRIX = frozenset(
    {
        *("MatMul", "FusedMatMul", "Gemm", "FusedGemm", "MatMulNBits", "QGemm", "QLinearMatMul", "MatMulInteger"),
        *("MatMulIntegerToFloat", "DynamicQuantizeMatMul"),
    }
)
CONVOLUTION = {"Conv": 1, "FusedConv": 1, "ConvInteger": 1, "QLinearConv": 3}
"""Operators that convolve, and which of their inputs is the kernel."""


def onnx_products(artifact: Artifact, inputs: Mapping[str, np.ndarray]) -> int:
    """Operations of the products with weights in one call, 2 for a multiply-add.

    Args:
        inputs: as the file takes them; what is missing (a cache) is filled with zeros.

    Raises:
        MeasurementError: the runtime does not report what it ran.
    """
    with tempfile.TemporaryDirectory() as folder:
        events = _profile(artifact.path, _filled(artifact, inputs), Path(folder) / "profile")
    found = sum(_operations(event["args"]) for event in events if "output_type_shape" in event.get("args", {}))
    if not events:
        raise MeasurementError("ONNX Runtime reports no operators.", where=artifact.entry)
    return found


def _filled(artifact: Artifact, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    feed = {}
    for spec in artifact.inputs:
        shape = [size.maximum if isinstance(size, Axis) else size for size in spec.shape]
        value = inputs[spec.name] if spec.name in inputs else np.zeros(shape)
        feed[spec.name] = value.astype(spec.dtype)
    return feed


def _profile(path: Path, feed: Mapping[str, np.ndarray], prefix: Path) -> list[dict[str, Any]]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(prefix)
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    # Channels in blocks would be rounded up to whole ones, and weights packed beforehand have no shape.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.add_session_config_entry("session.disable_prepacking", "1")
    session = onnxruntime.InferenceSession(str(path), sess_options=options, providers=[PROVIDER])
    session.run(None, dict(feed))
    events: list[dict[str, Any]] = json.loads(Path(session.end_profiling()).read_text())
    return events


def _shapes(values: list[dict[str, list[int]]]) -> list[list[int]]:
    return [next(iter(value.values()), []) for value in values]


def _operations(node: Mapping[str, Any]) -> int:
    """Of one operator that has a weight; 0 for all others."""
    kind, constant = node["op_name"], int(node.get("parameter_size", 0))
    if not constant or (kind not in MATRIX and kind not in CONVOLUTION):
        return 0
    given, output = _shapes(node["input_type_shape"]), _shapes(node["output_type_shape"])[0]
    if kind in CONVOLUTION:
        return 2 * math.prod(output) * math.prod(given[CONVOLUTION[kind]][1:])
    # Each number that goes in meets every column: whichever way round the first matrix is stored.
    return 2 * math.prod(given[0]) * output[-1]
