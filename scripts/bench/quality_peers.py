"""The peers of the quality bench: each quantizes the plain float export (or the torch model) at documented settings."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from quality_bench import Bench, Made, artifact
from quality_table import ORT

from edgeport.runtime.session import open_session
from edgeport.runtime.torch import TorchSession

if TYPE_CHECKING:
    import onnx

    from edgeport.model.types import Model

BLOCK = 32
SYMMETRIC, ASYMMETRIC = f"int4 g{BLOCK} symmetric", f"int4 g{BLOCK} asymmetric"
# Codes, a float32 scale a block, and where there is one a 4-bit zero point.
BITS = {SYMMETRIC: 4 + 32 / BLOCK, ASYMMETRIC: 4 + 36 / BLOCK}
HQQ_BITS = 4 + 64 / BLOCK
"""ONNX Runtime's HQQ stores its zero points in float32."""

Arrays = dict[str, np.ndarray]
Maker = Callable[[Path, list[Arrays], Path], None]
"""(float file, calibration inputs, file to write)"""


@dataclass(frozen=True)
class Peer:
    """One row of a peer.

    Attributes:
        make: writes its files into a folder and answers the bench's inputs.
        calibrated: the method looks at the calibration inputs.
    """

    tool: str
    name: str
    weights: str
    make: Callable[[Bench, Path], Made]
    activations: str = "float"
    calibrated: bool = False


def onnx_file(make: Maker, bits: float | None = None) -> Callable[[Bench, Path], Made]:
    """A tool that turns the float ONNX file into another; `bits` None reads them from the file."""

    def run(bench: Bench, folder: Path) -> Made:
        path = folder / "model.onnx"
        make(bench.plain, bench.calibration, path)
        outputs = bench.ask(open_session(artifact(bench.model, path)).run)
        return Made(outputs, path.stat().st_size, onnx_bits(path) if bits is None else bits, ORT, path)

    return run


def onnx_bits(path: Path) -> float:
    """Bits a weight on average, scales and zero points included, of the weights that a file stores as integers.

    Weights are the integer initializers of two or more axes that an operator other than Reshape or Gather of indices
    reads; the scales and zero points are the other initializers of that operator.
    """
    import onnx

    program = onnx.load(path)
    tensors = {tensor.name: tensor for tensor in program.graph.initializer}
    stored = weights = 0.0
    for node in program.graph.node:
        if node.op_type == "MatMulNBits":
            sizes = {item.name: item.i for item in node.attribute}
            weights += sizes["K"] * sizes["N"]
        elif node.op_type in _QUANTIZED and node.input[_QUANTIZED[node.op_type]] in tensors:
            tensor = tensors[node.input[_QUANTIZED[node.op_type]]]
            if len(tensor.dims) < 2:
                continue
            packed = {item.name: item.i for item in node.attribute}.get("bits", 0)
            in_bytes = tensor.data_type in (onnx.TensorProto.UINT8, onnx.TensorProto.INT8)
            each = 8 // packed if packed and in_bytes and node.op_type == "GatherBlockQuantized" else 1
            weights += float(np.prod(tensor.dims)) * each
        else:
            continue
        inputs = {name for name in node.input if name in tensors}
        stored += 8 * sum(len(tensors[name].SerializeToString()) for name in inputs)
    return stored / weights if weights else float("nan")


_QUANTIZED = {
    "DequantizeLinear": 0,
    "GatherBlockQuantized": 0,
    "MatMulInteger": 1,
    "ConvInteger": 1,
    "QLinearConv": 3,
    "QLinearMatMul": 3,
    "DynamicQuantizeMatMul": 1,
}
"""Operators on integer weights, and which input those are."""


def dynamic_int8(*, per_channel: bool) -> Maker:
    def make(plain: Path, _inputs: list[Arrays], out: Path) -> None:
        from onnxruntime.quantization import QuantType, quantize_dynamic

        kinds = ["MatMul", "Gemm", "Gather", "Conv"]
        quantize_dynamic(plain, out, per_channel=per_channel, weight_type=QuantType.QInt8, op_types_to_quantize=kinds)

    return make


def static_int8(plain: Path, inputs: list[Arrays], out: Path) -> None:
    """Static QDQ, unsigned activations and signed weights per channel: ONNX Runtime's advice for x86."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._left = iter(inputs)

        def get_next(self) -> Arrays | None:
            return next(self._left, None)

    quantize_static(
        plain,
        out,
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )


def _not_tables(program: onnx.ModelProto) -> list[str]:
    """Gathers that read something other than a float matrix in blocks: GatherBlockQuantized can't hold those."""
    import onnx

    tables = {
        tensor.name
        for tensor in program.graph.initializer
        if tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) == 2 and tensor.dims[1] % BLOCK == 0
    }
    return [node.name for node in program.graph.node if node.op_type == "Gather" and node.input[0] not in tables]


def nbits(
    config: Callable[[list[Arrays]], Any] | None, *, symmetric: bool, tables: bool = True, bits: int = 4
) -> Maker:
    """`MatMulNBitsQuantizer`: matrices by `config` (None: its default, round to nearest), then embeddings."""

    def make(plain: Path, inputs: list[Arrays], out: Path) -> None:
        import onnx
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

        program = onnx.load(plain)
        # Block size and symmetry also as arguments of the constructor: some algorithms read them only there.
        common: dict[str, Any] = {"block_size": BLOCK, "is_symmetric": symmetric}
        algorithm = None if config is None else config(inputs)
        matrices = MatMulNBitsQuantizer(program, bits=bits, algo_config=algorithm, **common)
        matrices.process()
        program = matrices.model.model
        if tables:
            axes, skipped = (("Gather", 1),), _not_tables(program)
            embeddings = MatMulNBitsQuantizer(
                program, op_types_to_quantize=("Gather",), quant_axes=axes, nodes_to_exclude=skipped, **common
            )
            embeddings.process()
            program = embeddings.model.model
        onnx.save(program, out)

    return make


def _round(_inputs: list[Arrays]) -> Any:
    from onnxruntime.quantization.matmul_nbits_quantizer import RTNWeightOnlyQuantConfig

    return RTNWeightOnlyQuantConfig()


def _k_quant(_inputs: list[Arrays]) -> Any:
    from onnxruntime.quantization.matmul_nbits_quantizer import KQuantWeightOnlyQuantConfig

    return KQuantWeightOnlyQuantConfig()


def _hqq(_inputs: list[Arrays]) -> Any:
    from onnxruntime.quantization.matmul_nbits_quantizer import HQQWeightOnlyQuantConfig

    return HQQWeightOnlyQuantConfig(block_size=BLOCK, bits=4)


def _gptq(inputs: list[Arrays]) -> Any:
    from onnxruntime.quantization.matmul_nbits_quantizer import GPTQWeightOnlyQuantConfig

    return GPTQWeightOnlyQuantConfig(calibration_data_reader=inputs, actorder=True, mse=True)


def torchao(bits: int, group: int | None, average: float, *, symmetric: bool = True) -> Callable[[Bench, Path], Made]:
    """torchao's weight-only integers in every Linear and Embedding, run in eager PyTorch."""

    def run(bench: Bench, _folder: Path) -> Made:
        import torch
        from torchao.quantization import quantize_
        from torchao.quantization.granularity import PerAxis, PerGroup
        from torchao.quantization.quant_api import IntxWeightOnlyConfig
        from torchao.quantization.quant_primitives import MappingType

        module = copy.deepcopy(bench.model.module)
        config = IntxWeightOnlyConfig(
            weight_dtype=getattr(torch, f"int{bits}"),
            granularity=PerAxis(0) if group is None else PerGroup(group),
            mapping_type=MappingType.SYMMETRIC if symmetric else MappingType.ASYMMETRIC,
        )
        size = 4 * sum(p.numel() for p in module.parameters())
        taken = (torch.nn.Linear, torch.nn.Embedding)  # not what derives from them: Whisper cuts its table of positions
        seen: set[int] = set()  # a tied weight would be stored once
        for layer in module.modules():
            if type(layer) in taken and id(layer.weight) not in seen:
                seen.add(id(layer.weight))
                scales = layer.weight.numel() // (group or layer.weight.shape[1])
                size -= 4 * layer.weight.numel()
                size += layer.weight.numel() * bits // 8 + 4 * scales + (0 if symmetric else scales * bits // 8)
        quantize_(module, config, lambda layer, _: type(layer) in taken)
        outputs = bench.ask(TorchSession(replace(bench.model, module=module)).run)
        return Made(outputs, size, average, "PyTorch", simulated=True)

    return run


def peers(model: Model) -> Iterator[Peer]:
    """The rows that apply to a model, of the tools in this environment."""
    ort, ao = f"onnxruntime {version('onnxruntime')}", f"torchao {version('torchao')}"
    only = "; embeddings float"
    dynamic = "dynamic uint8 per tensor"
    for per_channel, words in ((False, "int8 per tensor"), (True, "int8 per channel")):
        make = onnx_file(dynamic_int8(per_channel=per_channel))
        yield Peer(ort, f"dynamic {words}", words, make, dynamic)
    if model.modality in ("image", "audio"):
        make = onnx_file(static_int8)
        yield Peer(ort, "static QDQ", "int8 per channel", make, "static uint8, min-max", calibrated=True)
    if model.modality == "image":
        return
    grouped = f"int8 g{BLOCK} symmetric"
    yield Peer(
        ort, "MatMulNBits int8", grouped + only, onnx_file(nbits(None, symmetric=True, tables=False, bits=8), 9.0)
    )
    for weights, symmetric in ((SYMMETRIC, True), (ASYMMETRIC, False)):
        kind, bits = "symmetric" if symmetric else "asymmetric", BITS[weights]
        yield Peer(ort, f"int4 {kind}", weights, onnx_file(nbits(None, symmetric=symmetric), bits))
        make = onnx_file(nbits(None, symmetric=symmetric, tables=False), bits)
        yield Peer(ort, f"int4 {kind}, matrices only", weights + only, make)
        yield Peer(ort, f"RTN {kind}", weights, onnx_file(nbits(_round, symmetric=symmetric), bits))
        make = onnx_file(nbits(_gptq, symmetric=symmetric), bits)
        yield Peer(ort, f"GPTQ {kind}, act-order, MSE", weights, make, calibrated=True)
    yield Peer(ort, "k-quant", ASYMMETRIC, onnx_file(nbits(_k_quant, symmetric=False), BITS[ASYMMETRIC]))
    hqq = f"{ASYMMETRIC}, float zero points"
    yield Peer(ort, "HQQ", hqq, onnx_file(nbits(_hqq, symmetric=False), HQQ_BITS))
    make = onnx_file(nbits(_hqq, symmetric=False, tables=False), HQQ_BITS)
    yield Peer(ort, "HQQ, matrices only", hqq + only, make)
    yield Peer(ao, "int8 weight-only", "int8 per channel symmetric", torchao(8, None, 8.1))
    yield Peer(ao, "int4 weight-only", SYMMETRIC, torchao(4, BLOCK, BITS[SYMMETRIC]))
    make = torchao(4, BLOCK, BITS[ASYMMETRIC], symmetric=False)
    yield Peer(ao, "int4 weight-only asymmetric", ASYMMETRIC, make)
