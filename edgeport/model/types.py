"""Model: a loaded checkpoint with what every later stage needs to know about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

    from edgeport.activations import LayerRange
    from edgeport.formats import ActivationFormat, CacheFormat
    from edgeport.quantized import QuantizedTensor

SourceKind = Literal["huggingface", "hub", "gguf", "factory", "zoo", "compressed"]
Modality = Literal["text", "image", "audio", "other"]

SCORED = 32
"""Positions at the end of a text at which a decoder's scores are compared: after a prompt, and after each single
token that follows it."""


@dataclass(frozen=True)
class Axis:
    """A dimension that may vary from call to call.

    Attributes:
        name: the dimension's name, equal across tensors whose sizes must agree ("batch", "sequence").
        minimum: least size.
        maximum: largest size.
        example: the size traced with, and the fixed size where a target takes only fixed shapes.
    """

    name: str
    minimum: int
    maximum: int
    example: int

    @property
    def varies(self) -> bool:
        """It has more than one size."""
        return self.maximum > self.minimum


@dataclass(frozen=True)
class TensorSpec:
    """One input or output: name, numpy dtype name ("float32", "int64", ...), shape."""

    name: str
    dtype: str
    shape: tuple[int | Axis, ...]

    def fixed_shape(self) -> tuple[int, ...]:
        """The shape with each `Axis` at its example size."""
        return tuple(size.example if isinstance(size, Axis) else size for size in self.shape)


@dataclass(frozen=True)
class ImagePreprocessing:
    """How a picture becomes the model's input: resize, centre crop, then (pixel * scale - mean) / std per channel.

    Attributes:
        size: height and width of the input, pixels.
        mean, std: per RGB channel, applied to pixel values already multiplied by `scale`.
        crop: share of the shorter side kept by the centre crop, 0 to 1.
        stretch: resize the whole picture to `size` without keeping its proportions; `crop` is then unused.
    """

    size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    scale: float
    crop: float = 0.875
    resample: Literal["bilinear", "bicubic"] = "bicubic"
    stretch: bool = False


@dataclass(frozen=True)
class Source:
    """Where a model came from.

    Attributes:
        kind: how it was addressed.
        reference: what the user wrote ("zoo:minilm", a path's last part, a hub id).
        files: sha256 of each file that was read, by name.
        licence: SPDX id where known.
        note: what a reader of the evidence must know ("the checkpoint is already rounded to 4 bits").
    """

    kind: SourceKind
    reference: str
    files: Mapping[str, str]
    licence: str | None = None
    note: str | None = None


@dataclass(frozen=True)
class AttentionLayer:
    """One layer's attention: softmax(scale * q k^T, soft-capped) v over the tokens before, and the token itself.

    Attributes:
        heads, kv_heads: of queries, and of keys and values (fewer in grouped-query attention).
        window: tokens that a query sees, itself included; None for all.
        softcap: c of c * tanh(score / c), None for none.
        biased: a number is added to each score that depends on the head and on how far the two tokens are apart (T5).
    """

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int | None = None
    softcap: float | None = None
    biased: bool = False


@dataclass(frozen=True)
class CacheScales:
    """The steps to which one layer's keys and values are rounded, (kv_heads, head_dim) float32 each."""

    key: torch.Tensor
    value: torch.Tensor


@dataclass(frozen=True)
class Decoder:
    """A language model's cache of keys and values.

    Attributes:
        context: tokens that it holds.
        vocabulary: scores a token.
        cache: what keys and values are kept as.
        scales: of each layer, where the runtime takes fixed ones (`edgeport.compress.cache`); otherwise empty.
        forgets: layers with a window may drop what it has passed.
        cross: attention to the states of an encoder, whose keys and values are computed once; empty without an encoder.
        states: states that the encoder gives; None where it gives one a token of its input.
        start: tokens that a decoder beside an encoder begins every text with.
    """

    layers: tuple[AttentionLayer, ...]
    context: int
    vocabulary: int
    cache: CacheFormat = "float"
    scales: tuple[CacheScales, ...] = ()
    forgets: bool = True
    cross: tuple[AttentionLayer, ...] = ()
    states: int | None = None
    start: tuple[int, ...] = ()

    @property
    def cached_values(self) -> int:
        """Numbers that one token leaves in the cache."""
        return sum(2 * layer.kv_heads * layer.head_dim for layer in self.layers)


@dataclass(frozen=True)
class Model:
    """A checkpoint, ready to compress and lower.

    `module(**inputs)` takes the named input tensors and returns a ModelOutput, a dict, a tuple or a
    tensor; `outputs` names the tensors that are exported, in order. The module is in eval mode, in
    float32, and is never changed in place by another stage.

    Attributes:
        name: short name for files, for example "minilm".
        task: optimum's task name ("feature-extraction", "text-generation", "image-classification", ...).
        huggingface: the module is a transformers PreTrainedModel.
        example: one example value for each input, at the specs' example sizes.
        assets: files a device needs beside the model: destination name to path (tokenizer.json, ...).
        labels: class names for classifiers.
        quantized: weights that were compressed, by parameter name; the module holds their dequantised values.
        activations: activation format of each quantized layer, by parameter name.
        decoder: set when the model is to be lowered with a cache of keys and values (`edgeport.model.decoder`).
        ranges: grids of the layers whose activations are static_int8, by parameter name. The module does not round
            to them by itself: `edgeport.activations.round_layers` makes it.
        sparse: how many numbers are left of the weights that pruning put zeros into, by parameter name.
    """

    name: str
    module: torch.nn.Module
    source: Source
    task: str
    modality: Modality
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    example: Mapping[str, torch.Tensor]
    huggingface: bool
    assets: Mapping[str, Path] = field(default_factory=dict)
    image: ImagePreprocessing | None = None
    labels: tuple[str, ...] = ()
    quantized: Mapping[str, QuantizedTensor] = field(default_factory=dict)
    activations: Mapping[str, ActivationFormat] = field(default_factory=dict)
    decoder: Decoder | None = None
    ranges: Mapping[str, LayerRange] = field(default_factory=dict)
    sparse: Mapping[str, int] = field(default_factory=dict)
