"""A graph written weight by weight is the message that protobuf itself would write."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeport.export.onnx.save import save


@pytest.mark.parametrize("count", [1, 127, 128, 20_000])
def test_the_file_parses_to_the_same_model(tmp_path: Path, count: int):
    weights = np.arange(count, dtype=np.float32)
    codes = np.arange(count, dtype=np.int8)
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "w"], ["y"]), helper.make_node("Cast", ["c"], ["z"], to=TensorProto.FLOAT)],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [count])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [count])],
        [numpy_helper.from_array(weights, "w"), numpy_helper.from_array(codes, "c")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])
    program = ir.from_proto(model)
    save(program, tmp_path)
    expected = ir.to_proto(program)
    del expected.graph.value_info[:]  # types of the weights, which each weight has itself
    assert onnx.load(tmp_path / "model.onnx") == expected
    onnx.checker.check_model(tmp_path / "model.onnx", full_check=True)
    assert list(program.graph.initializers) == ["w", "c"], "saving changed the graph"
