"""The native weight forms, each written into a graph of one layer and compared with arithmetic done here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from edgeport.compress.quantize.grid import Grid
from edgeport.compress.quantize.rtn import quantize_rtn
from edgeport.errors import TargetRefusesError
from edgeport.export.artifact import Artifact
from edgeport.export.onnx.native import pack_nibbles, write_weights
from edgeport.export.onnx.weights import read_weights, unpack_nibbles
from edgeport.quantized import QuantizedTensor, dequantize


def one_layer(op_type: str, x: np.ndarray, weight: torch.Tensor, bias: np.ndarray | None = None) -> ir.Model:
    """A canonical graph: edgeport::Weight read by one edgeport::Linear, Gather or Conv."""
    parameter = ir.Value(name="w", const_value=ir.tensor(weight.numpy(), name="w"))
    parameter.shape, parameter.dtype = ir.Shape(weight.shape), ir.DataType.FLOAT
    data = ir.Value(name="x", shape=ir.Shape(x.shape), type=ir.TensorType(ir.DataType.from_numpy(x.dtype)))
    marker = ir.node("Weight", [parameter], {"name": "layer.weight"}, domain="edgeport")
    inputs: list[ir.Value] = [data, marker.outputs[0]]
    initializers = [parameter]
    if bias is not None:
        value = ir.Value(name="b", const_value=ir.tensor(bias, name="b"))
        value.shape, value.dtype = ir.Shape(bias.shape), ir.DataType.FLOAT
        initializers.append(value)
        inputs.append(value)
    if op_type == "Gather":
        inputs = [marker.outputs[0], data]
    layer = ir.node(op_type, inputs, domain="edgeport" if op_type == "Linear" else "")
    layer.outputs[0].name, layer.outputs[0].dtype = "y", ir.DataType.FLOAT
    graph = ir.Graph(
        [data],
        layer.outputs,
        nodes=[marker, layer],
        initializers=initializers,
        opset_imports={"": 21, "edgeport": 1},
        name="one",
    )
    return ir.Model(graph, ir_version=10)


def write_and_run(
    folder: Path, program: ir.Model, tensor: QuantizedTensor, activation: str, x: np.ndarray
) -> tuple[np.ndarray, QuantizedTensor, int]:
    """The output, the weight as the file has it, and the file's size."""
    stored = write_weights(program, {"layer.weight": tensor}, {"layer.weight": activation})  # type: ignore[dict-item]
    ir.save(program, folder / "m.onnx")
    result = onnxruntime.InferenceSession(folder / "m.onnx", providers=["CPUExecutionProvider"]).run(None, {"x": x})
    artifact = Artifact("onnxruntime", "cpu", folder, "m.onnx", (), (), stored)
    return result[0], read_weights(artifact)["layer.weight"], (folder / "m.onnx").stat().st_size


def assert_same_weight(stored: QuantizedTensor, logical: QuantizedTensor) -> None:
    assert torch.equal(stored.codes, logical.codes)
    assert stored.codes.dtype == torch.int8
    assert torch.equal(stored.scale, logical.scale)
    assert (stored.bits, stored.group_size, stored.axis) == (logical.bits, logical.group_size, 0)
    assert (stored.zero_point, stored.scale_dtype) == (None, "float32")


def quantize_tokens(x: np.ndarray) -> np.ndarray:
    """Each row rounded to its own asymmetric uint8 grid and back, in float64, from the definition."""
    low, high = np.minimum(x.min(-1, keepdims=True), 0.0), np.maximum(x.max(-1, keepdims=True), 0.0)
    step = np.where(high > low, (high - low) / 255, 1.0)
    zero = np.rint(-low / step)
    return (np.clip(np.rint(x / step) + zero, 0, 255) - zero) * step


def weight_and_rows(rows: int, columns: int, seed: int = 0) -> tuple[torch.Tensor, np.ndarray]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator), torch.randn(2, 5, columns, generator=generator).numpy()


@pytest.mark.parametrize("bias", [True, False])
def test_dynamic_linear_multiplies_per_token_codes(tmp_path: Path, bias: bool) -> None:
    weight, x = weight_and_rows(24, 64)
    x[0, 0] = 0.0  # a token of zeros
    x[0, 1] = 3.0  # a constant token
    x[0, 2] = np.abs(x[0, 2]) + 5  # no value near zero
    x[1, 1] *= 1000  # an outlier token, which must not coarsen the others
    b = np.linspace(-1, 1, 24, dtype=np.float32) if bias else None
    tensor = quantize_rtn(weight, Grid(bits=8, group_size=None))
    y, stored, _ = write_and_run(tmp_path, one_layer("Linear", x, weight, b), tensor, "dynamic_int8", x)
    assert_same_weight(stored, tensor)
    expected = quantize_tokens(x.astype(np.float64)) @ dequantize(tensor).double().numpy().T + (0 if b is None else b)
    # Float32 sums of 64 products: far below one step of the activations' grid, which would show as 1e-2.
    row_size = np.linalg.norm(expected, axis=-1, keepdims=True)
    assert np.all(np.abs(y - expected) <= 2e-5 * row_size + 1e-6)
    np.testing.assert_allclose(y[0, 0], np.zeros(24) if b is None else b, rtol=2e-7, atol=1e-30)


@pytest.mark.parametrize("op_type", ["Linear", "Gather", "Conv"])
def test_weight_only_int8_is_exact(tmp_path: Path, op_type: str) -> None:
    weight, x = weight_and_rows(24, 64)
    if op_type == "Conv":
        weight, x = torch.randn(8, 3, 3, 3), np.random.default_rng(0).standard_normal((2, 3, 9, 9), np.float32)
    if op_type == "Gather":
        x = np.array([[3, 0, 23]])
    tensor = quantize_rtn(weight, Grid(bits=8, group_size=None))
    y, stored, _ = write_and_run(tmp_path, one_layer(op_type, x, weight), tensor, "float", x)
    assert_same_weight(stored, tensor)
    full = dequantize(tensor)
    expected = {
        "Linear": lambda: torch.nn.functional.linear(torch.from_numpy(x), full),
        "Gather": lambda: full[torch.from_numpy(x)],
        "Conv": lambda: torch.nn.functional.conv2d(torch.from_numpy(x), full),
    }[op_type]()
    tolerance = 0.0 if op_type == "Gather" else 2e-5
    np.testing.assert_allclose(y, expected.numpy(), rtol=0, atol=tolerance * float(expected.abs().max()))


@pytest.mark.parametrize("op_type", ["Linear", "Gather"])
def test_int4_is_two_codes_a_byte(tmp_path: Path, op_type: str) -> None:
    weight, x = weight_and_rows(48, 96)  # three groups a row: an odd count
    if op_type == "Gather":
        x = np.array([[3, 0, 47]])
    tensor = quantize_rtn(weight, Grid(bits=4, group_size=32))
    y, stored, size = write_and_run(tmp_path, one_layer(op_type, x, weight), tensor, "float", x)
    assert_same_weight(stored, tensor)
    full = dequantize(tensor)
    expected = (
        torch.nn.functional.linear(torch.from_numpy(x), full) if op_type == "Linear" else full[torch.from_numpy(x)]
    )
    tolerance = 0.0 if op_type == "Gather" else 2e-5
    np.testing.assert_allclose(y, expected.numpy(), rtol=0, atol=tolerance * float(expected.abs().max()))
    assert size < tensor.storage_bytes() + 1000


def test_nibbles() -> None:
    codes = np.array([[-8, 7, 0, -1]], np.int8)
    packed = pack_nibbles(codes)
    assert packed.tolist() == [[0 | 15 << 4, 8 | 7 << 4]]
    np.testing.assert_array_equal(unpack_nibbles(packed), codes)


@pytest.mark.parametrize(("bits", "group_size"), [(3, 32), (8, 32), (4, None), (4, 24)])
def test_formats_without_a_native_form(tmp_path: Path, bits: int, group_size: int | None) -> None:
    weight, x = weight_and_rows(24, 96)
    tensor = quantize_rtn(weight, Grid(bits=bits, group_size=group_size))
    with pytest.raises(TargetRefusesError, match=f"no native form for {bits}-bit") as caught:
        write_and_run(tmp_path, one_layer("Linear", x, weight), tensor, "float", x)
    assert caught.value.where == "layer.weight"


def test_zero_points_have_no_native_form(tmp_path: Path) -> None:
    weight, x = weight_and_rows(24, 64)
    tensor = quantize_rtn(weight, Grid(bits=8, group_size=None))
    shifted = QuantizedTensor(tensor.codes, tensor.scale, torch.ones(24, 1, dtype=torch.int8), 8, 64)
    with pytest.raises(TargetRefusesError, match="zero points"):
        write_and_run(tmp_path, one_layer("Linear", x, weight), shifted, "float", x)


def test_int4_convolution_is_refused(tmp_path: Path) -> None:
    weight, x = torch.randn(8, 32, 1, 1), np.zeros((1, 32, 4, 4), np.float32)
    tensor = quantize_rtn(weight, Grid(bits=4, group_size=32))
    with pytest.raises(TargetRefusesError, match="Conv"):
        write_and_run(tmp_path, one_layer("Conv", x, weight), tensor, "float", x)
