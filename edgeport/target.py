"""Where a model must run: a target is data, one TOML file in `targets/`.

It says what the backend takes (weight formats per layer kind, how scales are stored, activation
formats, shapes) and what the device is, with a source for every device figure. Adding a phone is
adding a file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationInfo, field_validator

from edgeport.errors import BadInputError
from edgeport.formats import ActivationFormat, CacheFormat, LayerKind, WeightFormat
from edgeport.quantized import ScaleDtype
from edgeport.resources import data_folder
from edgeport.schema import Strict, named_toml, read_toml, toml_names

RuntimeName = Literal["onnxruntime", "executorch", "coreml"]
ShapeMode = Literal["fixed", "dynamic"]


class Weights(Strict):
    """Weight formats the backend takes, per layer kind."""

    linear: tuple[str, ...]
    embedding: tuple[str, ...]
    conv: tuple[str, ...]
    depthwise_conv: tuple[str, ...]
    integer_only: tuple[str, ...] = Field(
        default=(), description="formats whose products are fast with dynamic_int8 activations only"
    )
    sparse: bool = Field(default=False, description="weights with zeros are stored as a mask and the other numbers")

    @field_validator("linear", "embedding", "conv", "depthwise_conv", "integer_only")
    @classmethod
    def _formats_parse(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            WeightFormat.parse(name)
        return value


class Activations(Strict):
    """Activation formats the backend takes in layers with integer weights, per layer kind.

    A kind whose list lacks `float` can't run weight-only; one with an empty list can't be quantized.
    """

    linear: tuple[ActivationFormat, ...]
    conv: tuple[ActivationFormat, ...]
    depthwise_conv: tuple[ActivationFormat, ...]
    embedding: tuple[ActivationFormat, ...] = ("float",)
    static_outputs: tuple[LayerKind, ...] = Field(
        default=("conv", "depthwise_conv"), description="kinds whose static_int8 kernels give int8 as well as read it"
    )


class ScaleStorage(Strict):
    """The float type in which the backend stores scales: methods search on that very grid."""

    per_channel: ScaleDtype = "float32"
    grouped: ScaleDtype = "float32"
    signed: bool = Field(default=False, description="the backend takes negative scales in grouped forms")


class OnnxRuntimeOptions(Strict):
    """Lowering for ONNX Runtime."""

    opset: int = Field(ge=17, le=24)
    ort_format: bool = Field(default=False, description="write an ORT-format file beside the .onnx file")
    attention: Literal["fused", "standard"] = Field(
        default="fused",
        description="of decoders with a cache: ONNX Runtime's GroupQueryAttention, or operators of the ONNX standard "
        "alone (opset 23 or later), for other runtimes as well",
    )

    @field_validator("attention")
    @classmethod
    def _is_in_the_opset(cls, value: str, info: ValidationInfo) -> str:
        if value == "standard" and info.data.get("opset", 0) < 23:
            raise ValueError("the standard's Attention came with opset 23")
        return value


class ExecuTorchOptions(Strict):
    """Lowering for ExecuTorch."""

    delegate: Literal["xnnpack", "coreml"]
    minimum_deployment_target: Literal["iOS17", "iOS18"] | None = None


class CoreMLOptions(Strict):
    """Lowering for Core ML."""

    minimum_deployment_target: Literal["iOS17", "iOS18"]


class Execution(Strict):
    """Where the artifact can be run by edgeport, and in what sense.

    `runtime`: the very runtime, on this machine's processor. `reference`: edgeport's evaluator of the
    saved file, not the vendor's kernels. `none`: converted, not executed here.
    """

    here: Literal["runtime", "reference", "none"]
    statement: str


class Device(Strict):
    """Figures of the device, each with a source in `sources`."""

    ram_gb: float | None = None
    cpu: str | None = None
    cores: int | None = None
    memory_bandwidth_gb_s: float | None = None


class Source(Strict):
    """Where a figure or a statement comes from."""

    what: str
    source: str


class Target(Strict):
    """A whole target file."""

    schema_version: Literal[1] = 1
    name: str
    title: str
    os: str
    arch: str
    runtime: RuntimeName
    precisions: tuple[Literal["fp32", "fp16"], ...] = Field(description="first is the one the target prefers")
    shapes: tuple[ShapeMode, ...] = Field(description="first is the default")
    max_batch: int | None = Field(
        default=None, ge=1, description="largest batch, where the runtime plans its memory for the largest shapes"
    )
    max_sequence: int | None = Field(
        default=None, ge=1, description="longest sequence, for the same reason; `--sequence` may ask for more"
    )
    cache: bool = Field(
        default=False, description="decoder language models are lowered with a cache of keys and values"
    )
    kv_cache: tuple[CacheFormat, ...] = Field(
        default=("float",), description="what the runtime's attention reads keys and values as"
    )
    weights: Weights
    activations: Activations
    scales: ScaleStorage = ScaleStorage()
    onnxruntime: OnnxRuntimeOptions | None = None
    executorch: ExecuTorchOptions | None = None
    coreml: CoreMLOptions | None = None
    execution: Execution
    device: Device = Device()
    sources: tuple[Source, ...] = ()

    def weight_formats(self, kind: LayerKind) -> tuple[str, ...]:
        """Weight formats taken for a layer kind."""
        value: tuple[str, ...] = getattr(self.weights, kind)
        return value

    def activation_formats(self, kind: LayerKind) -> tuple[ActivationFormat, ...]:
        """Activation formats taken for a quantized layer of a kind."""
        value: tuple[ActivationFormat, ...] = getattr(self.activations, kind)
        return value


def target_names() -> list[str]:
    """The targets of this installation, sorted."""
    return toml_names(data_folder("targets"))


def target_path(reference: str) -> Path:
    """The file of a target given by name, or by the path of a TOML file (which may not exist).

    Raises:
        BadInputError: there is no such target.
    """
    return named_toml(
        "target",
        reference,
        data_folder("targets"),
        where="--target",
        next_step="`edgeport targets` shows what each takes.",
    )


def load_target(reference: str) -> Target:
    """Read a target by name, or by the path of a TOML file.

    Raises:
        BadInputError: there is no such target, or the file is wrong.
    """
    path = target_path(reference)
    target = read_toml(Target, path)
    if getattr(target, target.runtime) is None:
        raise BadInputError(f"The target runs on {target.runtime} but has no [{target.runtime}] table.", where=path)
    return target
