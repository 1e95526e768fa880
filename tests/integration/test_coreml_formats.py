"""Every weight format through a saved .mlpackage: numbers against torch, codes bit for bit, bytes, refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from edgeport.compress.quantize.grid import Grid
from edgeport.compress.quantize.palette import quantize_palette
from edgeport.compress.quantize.rtn import quantize_rtn
from edgeport.errors import TargetRefusesError
from edgeport.export import dispatch
from edgeport.export.artifact import Artifact, LoweringSettings
from edgeport.export.coreml.compressed import stored_arrays
from edgeport.export.coreml.lower import lower
from edgeport.export.coreml.weights import read_weights
from edgeport.formats import LAYER_KINDS, WeightFormat
from edgeport.model.types import Model, Source, TensorSpec
from edgeport.quantized import QuantizedTensor, dequantize, digest
from edgeport.runtime.coreml.session import CoreMLReferenceSession
from edgeport.target import load_target

LENGTH = 8


class Mixed(nn.Module):
    """An embedding tied to the head, a linear layer with bias, convolutions of one and two dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(96, 64)
        self.wide = nn.Linear(64, 128)
        self.narrow = nn.Conv1d(128, 64, 1)
        self.plane = nn.Conv2d(64, 32, 3, padding=1)
        self.depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32, bias=False)
        self.mix = nn.Linear(32, 64)
        self.head = nn.Linear(64, 96, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = F.silu(self.wide(self.embed(ids)))  # (1, LENGTH, 128)
        x = self.narrow(x.transpose(1, 2)).unsqueeze(-1)  # (1, 64, LENGTH, 1)
        x = F.relu(self.depthwise(self.plane(x)))
        return self.head(self.mix(x.squeeze(-1).transpose(1, 2)))


def quantized_as(weight: torch.Tensor, name: str, scale_dtype: str = "float16") -> QuantizedTensor:
    form = WeightFormat.parse(name)
    if form.scheme == "lut":
        return quantize_palette(weight, bits=form.bits, group_size=form.group_size, scale_dtype=scale_dtype)
    return quantize_rtn(weight, Grid(form.bits, form.group_size, form.scheme == "int", scale_dtype))


def a_model(formats: dict[str, str], scale_dtype: str = "float16") -> Model:
    """The module with the named weights quantized; their floats are what the codes stand for."""
    torch.manual_seed(0)
    module = Mixed().eval()
    quantized = {}
    with torch.no_grad():
        for name, form in formats.items():
            weight = module.get_parameter(name)
            weight += 0.02  # so that zero points are not all 0
            quantized[name] = quantized_as(weight, form, scale_dtype)
            weight.copy_(dequantize(quantized[name]))
    return Model(
        name="mixed",
        module=module,
        source=Source("factory", "mixed", {}),
        task="feature-extraction",
        modality="text",
        inputs=(TensorSpec("ids", "int64", (1, LENGTH)),),
        outputs=(TensorSpec("logits", "float32", (1, LENGTH, 96)),),
        example={"ids": torch.arange(LENGTH).reshape(1, -1) * 11},
        huggingface=False,
        quantized=quantized,
    )


MATRICES = ("embed.weight", "wide.weight", "mix.weight")
CONVOLUTIONS = ("narrow.weight", "plane.weight", "depthwise.weight")


def converted(model: Model, target: str, precision: str, out: Path) -> Artifact:
    return lower(model, load_target(target), LoweringSettings(precision, "fixed"), out)


def check(model: Model, artifact: Artifact, allowed: float) -> None:
    stored = read_weights(artifact)
    assert {name: digest(tensor) for name, tensor in stored.items()} == {
        name: digest(tensor) for name, tensor in model.quantized.items()
    }
    with torch.no_grad():
        expected = model.module(**model.example).numpy()
    measured = CoreMLReferenceSession(artifact).run({k: v.numpy() for k, v in model.example.items()})["logits"]
    assert np.linalg.norm(measured - expected) < allowed * np.linalg.norm(expected)


def check_bytes(model: Model, artifact: Artifact, width: int, *, zeros: bool = False) -> None:
    """weight.bin holds what `storage_bytes` says for each weight, and the floats: a tied weight once.

    `zeros`: the operator of iOS 17 stores a zero point a channel also where all are 0.
    """
    # Scales and palettes are stored at the precision of the package, whatever their logical type.
    stored = [replace(q, scale_dtype="float16" if width == 2 else "float32") for q in model.quantized.values()]
    packed = sum(q.storage_bytes() + (q.rows if zeros and q.symmetric else 0) for q in stored)
    floats = [p for name, p in model.module.named_parameters() if name not in model.quantized]
    exact = packed + width * sum(p.numel() for p in floats)
    # Blobs start at multiples of 64 and have a record of 64; small ones stand in the program itself.
    blobs = sum(2 + (zeros or q.zero_point is not None) for q in stored) + len(floats)
    size = artifact.facts["weight_file_bytes"]
    assert exact - 64 * blobs < size < exact + 128 * blobs + 64


@pytest.mark.parametrize("form", ["int4_g16", "uint4_g32", "uint8", "int8_g32", "lut3_g8", "lut4", "lut6_g32"])
def test_matrices_on_ios18(form, tmp_path):
    model = a_model(dict.fromkeys(MATRICES, form))
    artifact = converted(model, "ios18-coreml", "fp16", tmp_path)
    check(model, artifact, 3e-3)
    check_bytes(model, artifact, 2)
    operator = "constexpr_lut_to_dense" if form.startswith("lut") else "constexpr_blockwise_shift_scale"
    assert artifact.facts["operators"][operator] == len(MATRICES)


@pytest.mark.parametrize("form", ["uint4", "lut6_g8"])
def test_convolutions_on_ios18(form, tmp_path):
    model = a_model(dict.fromkeys(CONVOLUTIONS, form))
    artifact = converted(model, "ios18-coreml", "fp32", tmp_path)
    check(model, artifact, 1e-5)
    check_bytes(model, artifact, 4)


def test_groups_of_channels_of_a_kernel(tmp_path):
    """Two input channels with their 3 x 3 weights share a scale, 16 of a pointwise convolution."""
    model = a_model({"plane.weight": "uint4_g18", "narrow.weight": "int4_g16"})
    artifact = converted(model, "ios18-coreml", "fp32", tmp_path)
    check(model, artifact, 1e-5)
    assert model.quantized["plane.weight"].scale.shape == (32, 32)


@pytest.mark.parametrize(
    ("form", "precision"),
    [("int8", "fp16"), ("uint8", "fp32"), ("lut4", "fp32"), ("lut6", "fp16")],
)
def test_ios17(form, precision, tmp_path):
    model = a_model(dict.fromkeys((*MATRICES, *CONVOLUTIONS), form))
    artifact = converted(model, "ios17-coreml", precision, tmp_path)
    check(model, artifact, 5e-3 if precision == "fp16" else 1e-5)
    check_bytes(model, artifact, 2 if precision == "fp16" else 4, zeros=True)
    operator = "constexpr_lut_to_dense" if form.startswith("lut") else "constexpr_affine_dequantize"
    assert artifact.facts["operators"][operator] == 6


def test_mixed_forms_in_one_package(tmp_path):
    """8-bit codes that all fit four bits stay eight, equal codes with other scales stay apart."""
    model = a_model(
        {"wide.weight": "uint4_g32", "embed.weight": "lut4_g16", "mix.weight": "int8", "plane.weight": "lut6"}
    )
    small = model.quantized["mix.weight"]
    codes = small.codes.clamp(-7, 7)
    model = replace(model, quantized={**model.quantized, "mix.weight": replace(small, codes=codes)})
    with torch.no_grad():
        model.module.mix.weight.copy_(dequantize(model.quantized["mix.weight"]))
    artifact = converted(model, "ios18-coreml", "fp16", tmp_path)
    check(model, artifact, 3e-3)
    check_bytes(model, artifact, 2)


@pytest.mark.parametrize("form", ["int8", "uint8", "lut4"])
@pytest.mark.parametrize("target", ["ios17-coreml", "ios18-coreml"])
def test_extreme_weights_are_read_back(form, target, tmp_path):
    """All 0, constant, never negative, and so small that float16 has few digits left."""
    model = a_model({})
    generator = torch.Generator().manual_seed(0)
    values = {"mix.weight": lambda w: w * 0, "narrow.weight": lambda w: w * 0 + 0.5, "plane.weight": torch.abs}
    values["wide.weight"] = lambda w: torch.randn(w.shape, generator=generator) * 1e-4
    quantized = {}
    with torch.no_grad():
        for name, change in values.items():
            weight = model.module.get_parameter(name)
            quantized[name] = quantized_as(change(weight), form)
            weight.copy_(dequantize(quantized[name]))
    model = replace(model, quantized=quantized)
    artifact = converted(model, target, "fp16", tmp_path)
    for name, stored in read_weights(artifact).items():
        assert digest(stored) == digest(quantized[name]), name
        assert stored.scale_dtype == "float16"


class EveryFormat(nn.Module):
    """For each layer kind, one layer for each format of a target."""

    def __init__(self, counts: dict[str, int]) -> None:
        super().__init__()
        self.linear = nn.ModuleList(nn.Linear(128, 64, bias=False) for _ in range(counts["linear"]))
        self.embedding = nn.ModuleList(nn.Embedding(64, 128) for _ in range(counts["embedding"]))
        self.conv = nn.ModuleList(nn.Conv2d(8, 64, 3, bias=False) for _ in range(counts["conv"]))
        self.depthwise_conv = nn.ModuleList(
            nn.Conv2d(64, 64, 3, groups=64, bias=False) for _ in range(counts["depthwise_conv"])
        )

    def forward(self, ids):
        x = torch.cat([layer(ids) for layer in self.embedding], 1)  # (1, LENGTH * embeddings, 128)
        x = torch.cat([layer(x) for layer in self.linear], 1).transpose(1, 2)  # (1, 64, many)
        plane = x[..., : 8 * LENGTH].reshape(1, 8, 64, LENGTH)
        plane = torch.cat([layer(plane) for layer in self.conv], 3)
        plane = torch.cat([layer(plane) for layer in self.depthwise_conv], 3)
        return x, plane


@pytest.mark.parametrize("target", ["ios17-coreml", "ios18-coreml"])
def test_every_format_that_the_target_lists(target, tmp_path):
    table = load_target(target).weights.model_dump(include=set(LAYER_KINDS))
    torch.manual_seed(0)
    module = EveryFormat({kind: len(formats) for kind, formats in table.items()}).eval()
    quantized = {}
    with torch.no_grad():
        for kind, formats in table.items():
            for index, form in enumerate(formats):
                weight = module.get_parameter(f"{kind}.{index}.weight")
                weight += 0.02
                if form != "float":
                    tensor = quantized_as(weight, form)
                    quantized[f"{kind}.{index}.weight"] = tensor
                    weight.copy_(dequantize(tensor))
        outputs = module(ids=torch.arange(LENGTH).reshape(1, -1))
    model = replace(
        a_model({}),
        module=module,
        outputs=tuple(TensorSpec(n, "float32", tuple(t.shape)) for n, t in zip("xy", outputs, strict=True)),
        example={"ids": torch.arange(LENGTH).reshape(1, -1)},
        quantized=quantized,
    )
    artifact = converted(model, target, "fp32", tmp_path)
    stored = read_weights(artifact)
    assert len(stored) == sum(len(formats) - 1 for formats in table.values())
    for name, tensor in quantized.items():
        assert digest(stored[name]) == digest(tensor), name
    measured = CoreMLReferenceSession(artifact).run({"ids": model.example["ids"].numpy()})
    for name, expected in zip("xy", outputs, strict=True):
        assert np.linalg.norm(measured[name] - expected.numpy()) < 1e-5 * float(expected.norm())


def test_the_delegate_takes_what_the_package_does(tmp_path):
    """The same table, and a package with odd widths inside a .pte file reads back the same."""
    target = load_target("ios18-executorch-coreml")
    assert target.weights == load_target("ios18-coreml").weights
    model = a_model({"embed.weight": "lut3_g8", "wide.weight": "uint4_g16", "mix.weight": "lut6"})
    artifact = dispatch.lower(model, target, LoweringSettings("fp16", "fixed"), tmp_path)
    assert artifact.entry.endswith(".pte")
    for name, stored in dispatch.read_weights(artifact).items():
        assert digest(stored) == digest(model.quantized[name]), name


@pytest.mark.parametrize("target", ["ios17-coreml", "ios18-coreml"])
def test_coremltools_decompresses_to_the_same_numbers(target):
    """What is written for each listed format, decoded by coremltools' own operator definitions."""
    import coremltools as ct
    from coremltools.converters.mil import Builder
    from coremltools.converters.mil.mil import Function, types

    options = load_target(target)
    deployment = options.coreml.minimum_deployment_target
    generator = torch.Generator().manual_seed(0)
    shapes = {"linear": (64, 128), "embedding": (64, 128), "conv": (64, 8, 3, 3), "depthwise_conv": (64, 1, 3, 3)}
    with Function({"x": Builder.placeholder(shape=(1,), dtype=types.fp32)}, opset_version=ct.target[deployment]):
        for kind, shape in shapes.items():
            for form in options.weight_formats(kind):
                if form == "float":
                    continue
                tensor = quantized_as(torch.randn(shape, generator=generator) + 0.5, form)
                operator, parameters = stored_arrays(tensor, deployment)
                decoded = getattr(Builder, operator)(**parameters).op.materialized_val_inference()
                assert np.array_equal(decoded, dequantize(tensor).numpy()), (kind, form)


REFUSED = [
    ("int3", "ios18-coreml", "iOS18 stores no integers of 3 bits"),
    ("uint6_g32", "ios18-coreml", "iOS18 stores no integers of 6 bits"),
    ("lut5", "ios18-coreml", "iOS18 stores no palette indices of 5 bits"),
    ("lut3", "ios17-coreml", "iOS17 stores no palette indices of 3 bits"),
    ("lut4_g16", "ios17-coreml", "iOS17 stores one palette a weight, not 8"),
    ("int4", "ios17-coreml", "iOS17 stores no integers of 4 bits"),
    ("int8_g32", "ios17-coreml", "iOS17 stores one scale a channel"),
]


@pytest.mark.parametrize(("form", "target", "message"), REFUSED)
def test_forms_that_can_not_be_stored_densely(form, target, message, tmp_path):
    model = a_model({"wide.weight": form})
    with pytest.raises(TargetRefusesError, match=message) as refusal:
        converted(model, target, "fp16", tmp_path)
    assert refusal.value.where == "layer wide.weight"
    assert refusal.value.allowed
    assert not list(tmp_path.iterdir())


def test_other_refusals(tmp_path):
    model = a_model({"plane.weight": "int4_g32"})
    with pytest.raises(TargetRefusesError, match="A group of 32 weights cuts a filter's kernel of 9"):
        converted(model, "ios18-coreml", "fp16", tmp_path)
    for form in ("int8", "lut4"):
        model = a_model({"wide.weight": form}, scale_dtype="float32")
        with pytest.raises(TargetRefusesError, match="that float16 can't hold"):
            converted(model, "ios18-coreml", "fp16", tmp_path)
    scaled = a_model({"wide.weight": "lut4"})
    tensor = scaled.quantized["wide.weight"]
    scaled = replace(scaled, quantized={"wide.weight": replace(tensor, scale=2 * tensor.scale)})
    with pytest.raises(TargetRefusesError, match="A palette has scales beside it"):
        converted(scaled, "ios18-coreml", "fp16", tmp_path)
    assert not list(tmp_path.iterdir())
