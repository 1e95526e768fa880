"""The manifest: everything about a bundle that follows from its inputs alone.

No time, no machine, no path of the computer that made it: the same inputs give the same manifest, byte
for byte. What was measured is in `evidence.json` beside it (edgeport.validate.evidence).

The entries below mirror core types, field by field: the file's schema changes only on purpose.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pydantic import field_validator

from edgeport.export.artifact import Artifact, EncoderPart
from edgeport.formats import CacheFormat
from edgeport.model.types import Axis, TensorSpec
from edgeport.recipe import Recipe
from edgeport.schema import Strict
from edgeport.target import RuntimeName, ShapeMode, Target
from edgeport.validate.evidence import DataRecord

SCHEMA_VERSION: Literal[1] = 1
MODEL_FOLDER: Literal["model"] = "model"
ASSETS_FOLDER: Literal["assets"] = "assets"
GOLDEN_FOLDER = "golden"


def check_relative(path: str) -> str:
    """The path itself, if it is a plain POSIX path that stays below the folder it is relative to.

    Raises:
        ValueError: it is absolute, climbs with "..", or is written in a way that two readers could read
            differently (empty parts, ".", backslashes, control characters).
    """
    parts = path.split("/")
    if any(part in ("", ".", "..") for part in parts) or "\\" in path or not path.isprintable():
        raise ValueError(f"{path!r} is no plain relative path")
    if PurePosixPath(path).is_absolute() or ":" in parts[0]:
        raise ValueError(f"{path!r} leaves the bundle")
    return path


class AxisEntry(Strict):
    """A dimension that may vary: any size from `minimum` to `maximum`, `example` when it was traced."""

    name: str
    minimum: int
    maximum: int
    example: int


class TensorEntry(Strict):
    """One input or output as the file has it: name, numpy dtype name, sizes."""

    name: str
    dtype: str
    shape: tuple[int | AxisEntry, ...]

    def spec(self) -> TensorSpec:
        """The same as the core type."""
        shape = tuple(size if isinstance(size, int) else Axis(**size.model_dump()) for size in self.shape)
        return TensorSpec(self.name, self.dtype, shape)


class EncoderEntry(Strict):
    """What runs before a decoder with a cache (edgeport.export.artifact.EncoderPart); `entry` is below `model/`."""

    entry: str
    inputs: tuple[TensorEntry, ...]
    outputs: tuple[TensorEntry, ...]
    start: tuple[int, ...] = ()

    @field_validator("entry")
    @classmethod
    def _entry_is_inside(cls, value: str) -> str:
        return check_relative(value)

    def part(self) -> EncoderPart:
        """The same as the core type."""
        inputs, outputs = (tuple(tensor.spec() for tensor in side) for side in (self.inputs, self.outputs))
        return EncoderPart(self.entry, inputs, outputs, self.start)


class FileEntry(Strict):
    """One file of the bundle."""

    sha256: str
    bytes: int


class SourceEntry(Strict):
    """Where the model came from (edgeport.model.types.Source)."""

    kind: str
    reference: str
    files: dict[str, str]
    licence: str | None
    note: str | None


class SettingsEntry(Strict):
    """How the model became a file (edgeport.export.artifact.LoweringSettings)."""

    precision: Literal["fp32", "fp16"]
    shapes: ShapeMode
    enumerated: tuple[int, ...] = ()
    image_input: bool = False
    ort_format: bool = False
    kv_cache: CacheFormat = "float"


class OptionEntry(Strict):
    """One format of a layer that mixed precision could have taken (edgeport.compress.mixed.Option)."""

    format: str
    bytes: int
    cost: float
    chosen: bool


class LayerEntry(Strict):
    """What compression did to one weight (edgeport.compress.apply.LayerRecord)."""

    name: str
    kinds: tuple[str, ...]
    shape: tuple[int, ...]
    format: str
    activation: str
    bytes_before: int
    bytes_after: int
    method: str
    relative_error: float
    output_error: float | None
    tied: tuple[str, ...]
    reason: str
    sha256: str | None
    options: tuple[OptionEntry, ...] = ()


class PartEntry(Strict):
    """What a step did to one part of the model (edgeport.compress.restructure.PartRecord)."""

    name: str
    before: str
    after: str
    loss: float | None


class TrainingEntry(Strict):
    """What a distillation did (edgeport.compress.distill.run.TrainingRecord)."""

    teacher: str
    teacher_sha256: str
    data: DataRecord
    data_sha256: str
    loss_before: float
    loss_after: float
    held_out: tuple[tuple[int, float], ...]
    training: tuple[tuple[int, float], ...]
    best: int
    steps: int
    ended: str
    inputs: int
    inputs_held_out: int
    tokens: int | None
    parameters: int


class StepEntry(Strict):
    """What pruning, factorizing or the like did (edgeport.compress.restructure.StepRecord)."""

    method: str
    parameters_before: int
    parameters_after: int
    bytes_before: int
    bytes_after: int
    flops_before: int
    flops_after: int
    divergence: float | None
    parts: tuple[PartEntry, ...]
    training: TrainingEntry | None = None


class ImageEntry(Strict):
    """How a picture becomes the input (edgeport.model.types.ImagePreprocessing)."""

    size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    scale: float
    crop: float
    resample: Literal["bilinear", "bicubic"]
    stretch: bool


class Manifest(Strict):
    """`manifest.json`.

    Attributes:
        entry: the file (or .mlpackage folder) to load, below the bundle's root.
        inputs, outputs: as the file has them, in the file's order.
        files: every file of the bundle but manifest.json, evidence.json and report.html.
        parameters: values in the original model's parameters, tied ones once.
        layers: what compression did to each compressible weight, of those that the steps left.
        steps: what pruning, factorizing and the like did to the model before.
        weights: for each compressed parameter, its name in the file.
        data: the inputs that parity was measured on.
        calibration: the inputs that methods were tuned on; None where none needed any.
        toolchain: versions of the packages that decide what the files contain.
        facts: what lowering did: opset, operators, delegated nodes.
        context: tokens that a decoder's cache holds; None without a cache.
        encoder: of an encoder-decoder with a cache; `inputs` and `outputs` are then the decoder's.
        assets: the folder of the tokenizer and the like: the model's own where a generation library wants one folder.
        report_shell_sha256: of report.html with the bytes of evidence.json cut out.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    name: str
    task: str
    modality: str
    source: SourceEntry
    parameters: int
    recipe: Recipe
    target: Target
    settings: SettingsEntry
    runtime: RuntimeName
    delegate: Literal["cpu", "xnnpack", "coreml"]
    entry: str
    inputs: tuple[TensorEntry, ...]
    outputs: tuple[TensorEntry, ...]
    files: dict[str, FileEntry]
    layers: tuple[LayerEntry, ...]
    steps: tuple[StepEntry, ...] = ()
    weights: dict[str, str]
    image: ImageEntry | None = None
    labels: tuple[str, ...] = ()
    data: DataRecord
    calibration: DataRecord | None = None
    toolchain: dict[str, str]
    facts: dict[str, Any]
    context: int | None = None
    encoder: EncoderEntry | None = None
    assets: Literal["assets", "model"] = ASSETS_FOLDER
    report_shell_sha256: str | None = None

    @field_validator("entry")
    @classmethod
    def _entry_is_inside(cls, value: str) -> str:
        if not value.startswith(f"{MODEL_FOLDER}/"):
            raise ValueError(f"the model lies in {MODEL_FOLDER}/")
        return check_relative(value)

    @field_validator("files")
    @classmethod
    def _files_are_inside(cls, value: dict[str, FileEntry]) -> dict[str, FileEntry]:
        for path in value:
            check_relative(path)
        return value

    def artifact(self, root: Path) -> Artifact:
        """The lowered model of the bundle in the folder `root`."""
        return Artifact(
            runtime=self.runtime,
            delegate=self.delegate,
            root=root / MODEL_FOLDER,
            entry=self.entry.removeprefix(f"{MODEL_FOLDER}/"),
            inputs=tuple(tensor.spec() for tensor in self.inputs),
            outputs=tuple(tensor.spec() for tensor in self.outputs),
            weights=self.weights,
            facts=self.facts,
            context=self.context,
            encoder=None if self.encoder is None else self.encoder.part(),
        )

    def to_json(self) -> dict[str, Any]:
        """The manifest as JSON values."""
        return self.model_dump(mode="json")
