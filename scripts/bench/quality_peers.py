"""The peers of the quality bench: each quantizes the plain float export (or the torch model) at documented settings."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import onnx

    from edgeport.model.types import Model

OPSET = 21
BLOCK = 32
SYMMETRIC, ASYMMETRIC = f"int4 g{BLOCK} symmetric", f"int4 g{BLOCK} asymmetric"
# Codes, a float32 scale a block, and where there is one a 4-bit zero point.
BITS = {SYMMETRIC: 4 + 32 / BLOCK, ASYMMETRIC: 4 + 36 / BLOCK}
HQQ_BITS = 4 + 64 / BLOCK
"""ONNX Runtime's HQQ stores its zero points in float32."""
NNCF_SCRIPT = Path(__file__).with_name("quality_nncf.py")

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Peer:
    """One row of a peer.

    Attributes:
        make: (float file, calibration inputs, file to write); None for a row that runs in PyTorch.
        simulate: the torch model to a compressed torch model and its dense bytes; None for a row with a file.
        calibrated: the method looks at the calibration inputs.
    """

    tool: str
    name: str
    weights: str
    bits: float
    activations: str = "float"
    calibrated: bool = False
    make: Callable[[Path, list[Arrays], Path], None] | None = None
    simulate: Callable[[Model], tuple[Model, int]] | None = None


def export_plain(model: Model, out: Path) -> None:
    """The model in float32 through its exporter alone, as the peers' users have it."""
    import onnx
    import torch

    from edgeport.export.onnx.trace import quiet

    vary = torch.export.Dim.AUTO
    with quiet():
        if model.huggingface:
            from transformers.exporters import OnnxConfig, OnnxExporter

            # Two of each, so that the exporter does not take a batch of one for a constant.
            example = {name: torch.cat([value, value]) for name, value in model.example.items()}
            shapes = {name: {0: vary, 1: vary} for name in example}
            config = OnnxConfig(dynamic=True, dynamic_shapes=shapes, opset_version=OPSET)
            OnnxExporter().export(model.module, example, config).save_pretrained(out.parent / "exported")
            program = onnx.load(next((out.parent / "exported").rglob("*.onnx")))
        else:
            names = [spec.name for spec in model.outputs]
            exported = torch.onnx.export(
                model.module, kwargs=dict(model.example), opset_version=OPSET, dynamo=True, output_names=names
            )
            program = exported.model_proto
    # The quantizers infer the shapes again, and refuse to where the exporter's own differ.
    del program.graph.value_info[:]
    onnx.save(program, out)


def dynamic_int8(*, per_channel: bool) -> Callable[[Path, list[Arrays], Path], None]:
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
) -> Callable[[Path, list[Arrays], Path], None]:
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


def torchao(bits: int, group: int | None, *, symmetric: bool = True) -> Callable[[Model], tuple[Model, int]]:
    """torchao's weight-only integers in every Linear and Embedding, run in eager PyTorch."""

    def simulate(model: Model) -> tuple[Model, int]:
        import torch
        from torchao.quantization import quantize_
        from torchao.quantization.granularity import PerAxis, PerGroup
        from torchao.quantization.quant_api import IntxWeightOnlyConfig
        from torchao.quantization.quant_primitives import MappingType

        module = copy.deepcopy(model.module)
        config = IntxWeightOnlyConfig(
            weight_dtype=getattr(torch, f"int{bits}"),
            granularity=PerAxis(0) if group is None else PerGroup(group),
            mapping_type=MappingType.SYMMETRIC if symmetric else MappingType.ASYMMETRIC,
        )
        size = 4 * sum(p.numel() for p in module.parameters())
        for layer in module.modules():
            if isinstance(layer, torch.nn.Linear | torch.nn.Embedding):
                scales = layer.weight.numel() // (group or layer.weight.shape[1])
                size -= 4 * layer.weight.numel()
                size += layer.weight.numel() * bits // 8 + 4 * scales + (0 if symmetric else scales * bits // 8)
        quantize_(module, config, lambda layer, _: isinstance(layer, torch.nn.Linear | torch.nn.Embedding))
        return replace(model, module=module), size

    return simulate


def nncf(python: Path, mode: str) -> Callable[[Path, list[Arrays], Path], None]:
    """NNCF's 4-bit weights with AWQ and scale estimation, in an interpreter of its own."""

    def make(plain: Path, inputs: list[Arrays], out: Path) -> None:
        data = out.with_name("calibration.npz")
        np.savez(data, **{f"{i}/{name}": value for i, row in enumerate(inputs) for name, value in row.items()})
        command = [python, NNCF_SCRIPT, plain, data, out, mode, str(BLOCK)]
        subprocess.run(command, check=True, stdout=sys.stderr)
        data.unlink()

    return make


def nncf_bits(model: Model, grouped: float) -> float:
    """Average over linear weights in groups and embeddings in int8_asym, a scale and a zero point a row."""
    import torch

    bits = weights = 0.0
    for layer in model.module.modules():
        if isinstance(layer, torch.nn.Linear | torch.nn.Embedding):
            count = layer.weight.numel()
            bits += count * (grouped if isinstance(layer, torch.nn.Linear) else 8 + 40 / layer.weight.shape[1])
            weights += count
    return bits / weights


def peers(model: Model, nncf_python: Path | None) -> Iterator[Peer]:
    """The rows that apply to a model."""
    ort = f"onnxruntime {version('onnxruntime')}"
    dynamic = "dynamic uint8 per tensor"
    yield Peer(ort, "dynamic int8 per tensor", "int8 per tensor", 8.0, dynamic, make=dynamic_int8(per_channel=False))
    yield Peer(ort, "dynamic int8 per channel", "int8 per channel", 8.0, dynamic, make=dynamic_int8(per_channel=True))
    if model.modality == "image":
        static = "static uint8, min-max"
        yield Peer(ort, "static QDQ", "int8 per channel", 8.0, static, calibrated=True, make=static_int8)
        return
    only = "; embeddings float"
    grouped = f"int8 g{BLOCK} symmetric"
    yield Peer(ort, "MatMulNBits int8", grouped + only, 9.0, make=nbits(None, symmetric=True, tables=False, bits=8))
    for weights, symmetric in ((SYMMETRIC, True), (ASYMMETRIC, False)):
        kind = "symmetric" if symmetric else "asymmetric"
        yield Peer(ort, f"int4 {kind}", weights, BITS[weights], make=nbits(None, symmetric=symmetric))
        name = f"int4 {kind}, matrices only"
        yield Peer(ort, name, weights + only, BITS[weights], make=nbits(None, symmetric=symmetric, tables=False))
        yield Peer(ort, f"RTN {kind}", weights, BITS[weights], make=nbits(_round, symmetric=symmetric))
        gptq = nbits(_gptq, symmetric=symmetric)
        yield Peer(ort, f"GPTQ {kind}, act-order, MSE", weights, BITS[weights], calibrated=True, make=gptq)
    yield Peer(ort, "k-quant", ASYMMETRIC, BITS[ASYMMETRIC], make=nbits(_k_quant, symmetric=False))
    hqq = f"{ASYMMETRIC}, float zero points"
    yield Peer(ort, "HQQ", hqq, HQQ_BITS, make=nbits(_hqq, symmetric=False))
    yield Peer(ort, "HQQ, matrices only", hqq + only, HQQ_BITS, make=nbits(_hqq, symmetric=False, tables=False))
    ao = f"torchao {version('torchao')}"
    yield Peer(ao, "int8 weight-only", "int8 per channel symmetric", 8.1, simulate=torchao(8, None))
    yield Peer(ao, "int4 weight-only", SYMMETRIC, BITS[SYMMETRIC], simulate=torchao(4, BLOCK))
    yield Peer(
        ao, "int4 weight-only asymmetric", ASYMMETRIC, BITS[ASYMMETRIC], simulate=torchao(4, BLOCK, symmetric=False)
    )
    if nncf_python is not None:
        for mode, weights in (("INT4_SYM", SYMMETRIC), ("INT4_ASYM", ASYMMETRIC)):
            label = f"{weights}; embeddings int8"
            name = f"{mode}, AWQ + scale estimation"
            yield Peer(
                "nncf 3.4", name, label, nncf_bits(model, BITS[weights]), calibrated=True, make=nncf(nncf_python, mode)
            )
