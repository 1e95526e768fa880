"""The ONNX Runtime session: what it takes, what it refuses, on files of a few bytes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from edgeport.errors import BadInputError
from edgeport.export.artifact import Artifact
from edgeport.model.types import Axis, TensorSpec
from edgeport.runtime.onnxruntime import OnnxRuntimeSession
from edgeport.runtime.session import open_session

BATCH = Axis("batch", 1, 4, 1)


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    """total = a + b, difference = a - b; a and b of shape (batch, 3)."""
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 3]) for name in "ab"]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 3]) for name in ("total", "difference")]
    nodes = [helper.make_node("Add", ["a", "b"], ["total"]), helper.make_node("Sub", ["a", "b"], ["difference"])]
    graph = helper.make_graph(nodes, "sums", inputs, outputs)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), tmp_path / "m.onnx")
    return Artifact(
        runtime="onnxruntime",
        delegate="cpu",
        root=tmp_path,
        entry="m.onnx",
        inputs=tuple(TensorSpec(name, "float32", (BATCH, 3)) for name in "ab"),
        # Not the file's order: outputs come by name.
        outputs=tuple(TensorSpec(name, "float32", (BATCH, 3)) for name in ("difference", "total")),
    )


def feed(rows: int = 2, dtype: str = "float32") -> dict[str, np.ndarray]:
    return {"a": np.arange(3 * rows, dtype=dtype).reshape(rows, 3), "b": np.full((rows, 3), 2, dtype)}


def test_runs_by_name(artifact: Artifact) -> None:
    session = open_session(artifact)
    assert isinstance(session, OnnxRuntimeSession)
    result = session.run(feed())
    assert list(result) == ["difference", "total"]
    np.testing.assert_array_equal(result["total"], [[2, 3, 4], [5, 6, 7]])
    np.testing.assert_array_equal(result["difference"], [[-2, -1, 0], [1, 2, 3]])
    assert (session.name, session.vendor_kernels) == ("onnxruntime", True)


def test_casts_that_lose_nothing(artifact: Artifact) -> None:
    session = OnnxRuntimeSession(artifact)
    np.testing.assert_array_equal(session.run(feed(dtype="float64"))["total"], session.run(feed())["total"])
    with pytest.raises(BadInputError, match="float64"):
        session.run(feed() | {"b": np.full((2, 3), 0.1, "float64")})
    with pytest.raises(BadInputError, match="int64"):
        session.run(feed(dtype="int64"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"c": np.zeros((2, 3), "float32")}, "no input 'c'"),
        ({"a": np.zeros((2, 4), "float32")}, r"'a' has the shape \(2, 4\)"),
        ({"a": np.zeros((5, 3), "float32"), "b": np.zeros((5, 3), "float32")}, r"'a' has the shape \(5, 3\)"),
        ({"b": np.zeros((1, 3), "float32")}, r"'b' has the shape \(1, 3\)"),
        ({"a": np.zeros(3, "float32")}, r"'a' has the shape \(3,\)"),
    ],
)
def test_inputs_that_do_not_fit(artifact: Artifact, change: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(BadInputError, match=message):
        OnnxRuntimeSession(artifact).run(feed() | change)


def test_missing_input(artifact: Artifact) -> None:
    with pytest.raises(BadInputError, match="'b' is missing"):
        OnnxRuntimeSession(artifact).run({"a": np.zeros((1, 3), "float32")})


def test_files_that_do_not_load(artifact: Artifact) -> None:
    with pytest.raises(BadInputError, match="missing"):
        OnnxRuntimeSession(replace(artifact, entry="other.onnx"))
    data = artifact.path.read_bytes()
    for damaged in (data[: len(data) // 2], b"", b"not a model"):
        artifact.path.write_bytes(damaged)
        with pytest.raises(BadInputError, match="can't load"):
            OnnxRuntimeSession(artifact)
