"""The native weight forms, each written into a graph of one layer and compared with arithmetic done here."""

from __future__ import annotations

from collections.abc import Callable
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
from edgeport.export.onnx.canonical import canonicalize
from edgeport.export.onnx.forms import FORMS, formats
from edgeport.export.onnx.native import write_weights
from edgeport.export.onnx.packing import pack, unpack
from edgeport.export.onnx.weights import read_weights
from edgeport.formats import LAYER_KINDS
from edgeport.quantized import QuantizedTensor, ScaleDtype, dequantize, round_scale
from edgeport.target import load_target, target_names


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
    stored = write_weights(program, {"layer.weight": tensor}, {"layer.weight": activation}, {})  # type: ignore[dict-item]
    ir.save(program, folder / "m.onnx")
    result = onnxruntime.InferenceSession(folder / "m.onnx", providers=["CPUExecutionProvider"]).run(None, {"x": x})
    artifact = Artifact("onnxruntime", "cpu", folder, "m.onnx", (), (), stored)
    return result[0], read_weights(artifact)["layer.weight"], (folder / "m.onnx").stat().st_size


def assert_same_weight(stored: QuantizedTensor, logical: QuantizedTensor) -> None:
    assert torch.equal(stored.codes, logical.codes)
    assert stored.codes.dtype == torch.int8
    assert torch.equal(stored.scale, logical.scale)
    assert (stored.bits, stored.group_size, stored.axis) == (logical.bits, logical.group_size, 0)
    assert stored.scale_dtype == logical.scale_dtype
    if logical.zero_point is None:
        assert stored.zero_point is None
    else:
        assert stored.zero_point is not None
        assert stored.zero_point.dtype == torch.int8
        assert torch.equal(stored.zero_point, logical.zero_point)


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


@pytest.mark.parametrize("grid", [Grid(8, None), Grid(8, 32), Grid(4, 16, symmetric=False)], ids=str)
def test_a_table_looked_up_by_gathernd_is_a_gather(tmp_path, grid):
    weight, _ = weight_and_rows(9, 64)
    tensor = quantize_rtn(weight, grid)
    ids = np.array([[[3], [0]], [[8], [3]]], np.int64)
    program = one_layer("Gather", ids, weight)
    layer = program.graph[-1]
    layer.op_type = "GatherND"
    layer.attributes.clear()
    assert canonicalize(program, ["layer.weight"]) == []
    y, stored, size = write_and_run(tmp_path, program, tensor, "float", ids)
    assert y.shape == (2, 2, 64)
    np.testing.assert_array_equal(y, dequantize(tensor)[torch.from_numpy(ids[..., 0])].numpy())
    assert_same_weight(stored, tensor)
    assert size < weight.numel() * 4  # the float table is not in the file


BLOCKS = [
    pytest.param(form.bits, form.zero_points, size, id=name)
    for form in FORMS
    for name, size in zip(form.formats, form.group_sizes, strict=False)
]


def random_blocks(
    rows: int, columns: int, bits: int, group_size: int, *, zero_points: bool, scale_dtype: ScaleDtype = "float16"
) -> QuantizedTensor:
    """Any codes and zero points of the range, at both its ends too, and scales of both signs."""
    generator = torch.Generator().manual_seed(bits + group_size)
    half, groups = 2 ** (bits - 1), columns // group_size
    lowest = -127 if bits == 8 and not zero_points else -half
    codes = torch.randint(lowest, half, (rows, columns), generator=generator, dtype=torch.int8)
    codes[0], codes[1] = lowest, half - 1
    scale = (torch.rand(rows, groups, generator=generator) + 0.1) * 0.02
    scale[2::3] *= -1
    zero = torch.randint(-half, half, (rows, groups), generator=generator, dtype=torch.int8) if zero_points else None
    if zero is not None:
        zero[0], zero[1] = half - 1, -half
    return QuantizedTensor(codes, round_scale(scale, scale_dtype), zero, bits, group_size, scale_dtype=scale_dtype)


def blocks_of_activations(x: np.ndarray, group_size: int) -> np.ndarray:
    """Symmetric int8 in blocks along the last axis, in float64: what accuracy level 4 allows a kernel to do."""
    groups = x.astype(np.float64).reshape(*x.shape[:-1], -1, group_size)
    step = np.abs(groups).max(-1, keepdims=True) / 127
    return (np.rint(groups / step) * step).reshape(x.shape)


@pytest.mark.parametrize("activation", ["float", "dynamic_int8"])
@pytest.mark.parametrize(("bits", "zero_points", "group_size"), BLOCKS)
def test_linear_in_blocks(tmp_path: Path, bits: int, zero_points: bool, group_size: int, activation: str) -> None:
    columns = 3 * group_size  # an odd number of groups: the last byte of the zero points is not full
    tensor = random_blocks(37, columns, bits, group_size, zero_points=zero_points)
    full = dequantize(tensor)
    _, x = weight_and_rows(37, columns)
    b = np.linspace(-1, 1, 37, dtype=np.float32)
    if bits == 2 and activation == "float":
        with pytest.raises(TargetRefusesError, match="2-bit weights by float activations"):
            write_and_run(tmp_path, one_layer("Linear", x, full, b), tensor, activation, x)
        return
    y, stored, size = write_and_run(tmp_path, one_layer("Linear", x, full, b), tensor, activation, x)
    assert_same_weight(stored, tensor)
    assert size < tensor.storage_bytes() + 1500
    weight = full.double().numpy().T
    exact = x.astype(np.float64) @ weight + b
    rounded = blocks_of_activations(x, group_size) @ weight + b
    # A code of an activation that falls on the other side of a border moves one row by 1e-4 of its size.
    near = np.linalg.norm(y - rounded) < 3e-4 * np.linalg.norm(exact)
    same = np.linalg.norm(y - exact) < 1e-6 * np.linalg.norm(exact)
    assert same if activation == "float" else near or same  # kernels may be more accurate than they are allowed to


@pytest.mark.parametrize(("bits", "zero_points", "group_size"), BLOCKS)
def test_embedding_in_blocks(tmp_path: Path, bits: int, zero_points: bool, group_size: int) -> None:
    tensor = random_blocks(37, 3 * group_size, bits, group_size, zero_points=zero_points)
    full, ids = dequantize(tensor), np.array([[3, 0, 36, 1]])
    y, stored, size = write_and_run(tmp_path, one_layer("Gather", ids, full), tensor, "float", ids)
    assert_same_weight(stored, tensor)
    assert size < tensor.storage_bytes() + 1000
    np.testing.assert_array_equal(y, full[torch.from_numpy(ids)].numpy())


@pytest.mark.parametrize("optimizations", ["ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_ALL"])
@pytest.mark.parametrize("zero_points", [False, True])
@pytest.mark.parametrize(
    ("bits", "activation"), [(2, "dynamic_int8"), (4, "dynamic_int8"), (4, "float"), (8, "dynamic_int8"), (8, "float")]
)
def test_right_with_any_graph_optimizations(
    tmp_path: Path, bits: int, zero_points: bool, optimizations: str, activation: str
) -> None:
    """MatMulNBits computes nonsense from constant codes with scales behind a Cast: both must fold, or neither."""
    tensor = random_blocks(40, 96, bits, 32, zero_points=zero_points)
    full = dequantize(tensor)
    _, x = weight_and_rows(40, 96)
    write_and_run(tmp_path, one_layer("Linear", x, full), tensor, activation, x)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, optimizations)
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", options, providers=["CPUExecutionProvider"])
    expected = x @ full.numpy().T
    assert np.linalg.norm(session.run(None, {"x": x})[0] - expected) < 1e-2 * np.linalg.norm(expected)
    operators = [node.op_type for node in ir.load(tmp_path / "optimized.onnx").graph]
    if optimizations != "ORT_DISABLE_ALL":
        # Nothing else is left to do at a call.
        assert operators == ["MatMul" if (bits, activation) == (8, "float") else "MatMulNBits"]


@pytest.mark.parametrize("op_type", ["Linear", "Gather", "Conv"])
@pytest.mark.parametrize("activation", ["float", "dynamic_int8"])
def test_float16_scales_a_channel(tmp_path: Path, op_type: str, activation: str) -> None:
    weight, x = weight_and_rows(24, 48)
    if op_type == "Conv":
        weight, x = torch.randn(8, 3, 3, 3), np.random.default_rng(0).standard_normal((2, 3, 9, 9), np.float32)
    if op_type == "Gather":
        x = np.array([[3, 0, 23]])
    tensor = quantize_rtn(weight, Grid(bits=8, scale_dtype="float16"))
    _, stored, _ = write_and_run(tmp_path, one_layer(op_type, x, weight), tensor, activation, x)
    assert_same_weight(stored, tensor)
    assert stored.scale_dtype == "float16"


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_packing(bits: int) -> None:
    half = 2 ** (bits - 1)
    codes = np.random.default_rng(0).integers(-half, half, (3, 2, 5)).astype(np.int8)
    packed = pack(codes, bits)
    assert packed.shape == (3, 2, -(-5 * bits // 8))
    np.testing.assert_array_equal(unpack(packed, bits, 5), codes)
    whole = sum((int(code) + half) << (bits * index) for index, code in enumerate(codes[0, 0]))
    assert packed[0, 0].tobytes() == whole.to_bytes(packed.shape[-1], "little")


def with_palette(weight: torch.Tensor) -> QuantizedTensor:
    codes = torch.zeros(weight.shape, dtype=torch.uint8)
    scale = torch.ones(weight.shape[0], 1)
    return QuantizedTensor(codes, scale, None, 4, weight.shape[1], palette=torch.zeros(1, 16))


REFUSED: dict[str, Callable[[torch.Tensor], QuantizedTensor]] = {
    "3-bit": lambda w: quantize_rtn(w, Grid(bits=3, group_size=32)),
    "5-bit": lambda w: quantize_rtn(w, Grid(bits=5, group_size=32, symmetric=False)),
    "6-bit": lambda w: quantize_rtn(w, Grid(bits=6)),
    "7-bit": lambda w: quantize_rtn(w, Grid(bits=7, group_size=16)),
    "groups of 24": lambda w: quantize_rtn(w, Grid(bits=4, group_size=24)),
    "one scale a channel": lambda w: quantize_rtn(w, Grid(bits=4)),
    "one scale a channel and zero points": lambda w: quantize_rtn(w, Grid(bits=8, symmetric=False)),
    "palettes of 4-bit indices": with_palette,
    "2-bit weights with groups of 16": lambda w: quantize_rtn(w, Grid(bits=2, group_size=16)),
    "8-bit": lambda w: quantize_rtn(w, Grid(bits=8, scale_dtype="bfloat16")),
}


@pytest.mark.parametrize("what", list(REFUSED))
def test_formats_without_a_native_form(tmp_path: Path, what: str) -> None:
    weight, x = weight_and_rows(24, 96)
    with pytest.raises(TargetRefusesError, match=f"no native form for .*{what}") as caught:
        write_and_run(tmp_path, one_layer("Linear", x, weight), REFUSED[what](weight), "float", x)
    assert caught.value.where == "layer.weight"
    assert caught.value.allowed is not None
    for name in ("int8", "uint8_g128", "int4_g32", "uint4_g16", "int2_g64", "uint2_g128"):
        assert f"{name}," in f"{caught.value.allowed.replace(';', ',')}"


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_convolution_in_blocks_is_refused(tmp_path: Path, bits: int) -> None:
    weight, x = torch.randn(8, 64, 1, 1), np.zeros((1, 64, 4, 4), np.float32)
    tensor = quantize_rtn(weight, Grid(bits=bits, group_size=32))
    with pytest.raises(TargetRefusesError, match=f"{bits}-bit groups for the operator Conv"):
        write_and_run(tmp_path, one_layer("Conv", x, weight), tensor, "float", x)


@pytest.mark.parametrize("name", [name for name in target_names() if load_target(name).runtime == "onnxruntime"])
def test_targets_list_what_can_be_written(name: str) -> None:
    target = load_target(name)
    for kind in LAYER_KINDS:
        assert set(target.weight_formats(kind)) <= set(formats(kind))
