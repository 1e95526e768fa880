"""Artifact: the files that lowering wrote, and what they take and give."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from edgeport.model.types import Axis, TensorSpec

if TYPE_CHECKING:
    # Not at run time: the memory probe imports this module and must not carry pydantic.
    from edgeport.formats import CacheFormat
    from edgeport.target import RuntimeName, ShapeMode


@dataclass(frozen=True)
class LoweringSettings:
    """How a model becomes a file, with nothing left to decide.

    Attributes:
        precision: of uncompressed weights and of arithmetic where the backend has a choice.
        shapes: `dynamic` keeps every `Axis` of the model's inputs; `fixed` uses its example size.
        enumerated: sizes of the sequence axis to enumerate (Core ML), empty for a range.
        image_input: take a picture instead of a tensor (Core ML, image models).
        ort_format: also write an ORT-format file (ONNX Runtime).
        kv_cache: what a decoder keeps keys and values as.
    """

    precision: Literal["fp32", "fp16"]
    shapes: ShapeMode
    enumerated: tuple[int, ...] = ()
    image_input: bool = False
    ort_format: bool = False
    kv_cache: CacheFormat = "float"


@dataclass(frozen=True)
class EncoderPart:
    """An encoder that runs once before its decoder.

    Attributes:
        entry: POSIX path below the artifact's root of the file to load; the artifact's own where that holds both.
        inputs, outputs: as the file has them, in the file's order.
        start: tokens that every text of the decoder begins with.
    """

    entry: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    start: tuple[int, ...] = ()


@dataclass(frozen=True)
class Artifact:
    """One lowered model on disk.

    Attributes:
        runtime: the runtime that loads it.
        delegate: "cpu", "xnnpack" or "coreml".
        root: the folder that holds it.
        entry: POSIX path below `root` of the file (or .mlpackage folder) to load.
        inputs, outputs: names, dtypes and shapes as the *file* has them, in the file's order.
        weights: for each compressed parameter, the name under which the file stores it.
        facts: what lowering did, for the report: opset, operators, delegated nodes, passes.
        context: tokens that a decoder's cache holds; None without a cache.
        encoder: what runs before the decoder, of an encoder-decoder with a cache; `inputs` and `outputs` are then the
            decoder's.
    """

    runtime: RuntimeName
    delegate: Literal["cpu", "xnnpack", "coreml"]
    root: Path
    entry: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    weights: Mapping[str, str] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    context: int | None = None
    encoder: EncoderPart | None = None

    @property
    def path(self) -> Path:
        """The file or folder to load."""
        return self.root / self.entry

    @property
    def paths(self) -> tuple[Path, ...]:
        """All files or folders to load."""
        alone = self.encoder is None or self.encoder.entry == self.entry
        return (self.path,) if alone or self.encoder is None else (self.root / self.encoder.entry, self.path)

    def to_json(self) -> dict[str, Any]:
        """Everything but `root`, as JSON values; `from_json` undoes it."""
        value = asdict(self)
        del value["root"]
        return value

    @classmethod
    def from_json(cls, value: Mapping[str, Any], root: Path) -> Artifact:
        """Undo `to_json`, with the folder that holds the files now."""
        fields = dict(value)
        for name in ("inputs", "outputs"):
            fields[name] = tuple(tensor_from_json(spec) for spec in fields[name])
        if fields.get("encoder") is not None:
            fields["encoder"] = encoder_from_json(fields["encoder"])
        return cls(root=root, **fields)


def tensor_from_json(value: Mapping[str, Any]) -> TensorSpec:
    """Undo `dataclasses.asdict` of a TensorSpec."""
    shape = tuple(Axis(**size) if isinstance(size, Mapping) else int(size) for size in value["shape"])
    return TensorSpec(value["name"], value["dtype"], shape)


def encoder_from_json(value: Mapping[str, Any]) -> EncoderPart:
    """Undo `dataclasses.asdict` of an EncoderPart."""
    inputs, outputs = (tuple(tensor_from_json(spec) for spec in value[name]) for name in ("inputs", "outputs"))
    return EncoderPart(value["entry"], inputs, outputs, tuple(value["start"]))
