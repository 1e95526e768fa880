"""Load what `edgeport compress` wrote: a Hugging Face folder whose weights are packed codes and scales.

    config.json               the module's config; its quantization_config names edgeport; absent where the zoo or a
                              factory makes the module
    compressed.safetensors    float tensors as they are, compressed ones in parts (edgeport.model.packed);
                              model.safetensors, and no quantization_config, where only layers, channels or tokens were
                              removed: transformers loads such a folder like any other
    edgeport.json             `Record`: what the parts mean, how they came about, the sha256 of every other file
    reference/                real inputs and the uncompressed model's outputs on them (the stage "reference")
    tokenizer.json, ...       the model's assets

The weights are not called model.safetensors: transformers only warns about a quantization it does not know, and
would go on with random weights.

Names and shapes of the weights are those after edgeport folded the norms, not the original checkpoint's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from edgeport.activations import LayerRange
from edgeport.errors import BadInputError, first_line
from edgeport.formats import ActivationFormat
from edgeport.model.types import Model, Source
from edgeport.recipe import Recipe
from edgeport.schema import Strict, parse_mapping
from edgeport.storage import hash_file, list_files, read_json

if TYPE_CHECKING:
    import torch

RECORD = "edgeport.json"
CONFIG = "config.json"
Sizes = tuple[int, int, int]
"""Of a layer, as in edgeport.model.narrowed, which loads torch."""
WeightsFile = Literal["compressed.safetensors", "model.safetensors"]
WEIGHTS: WeightsFile = "compressed.safetensors"
PLAIN_WEIGHTS: WeightsFile = "model.safetensors"
REFERENCE = "reference"
SCHEMA_VERSION: Literal[1] = 1
METHOD = "edgeport"
"""`quant_method` in config.json."""


class SourceRecord(Strict):
    """Where the original came from (edgeport.model.types.Source)."""

    kind: str
    reference: str
    files: dict[str, str]
    licence: str | None
    note: str | None


class Record(Strict):
    """edgeport.json.

    Attributes:
        architecture: the transformers class that holds the weights.
        target: the target whose grids were used; None for the portable ones (edgeport.compress.portable).
        forms: how each compressed weight is stored (edgeport.model.packed.Form), by its parameter's first name.
        activations: activation format of each compressed weight's layer where the target has a choice.
        ranges: grids of the layers whose activations are static_int8.
        tied: the names of each parameter that has several, first name first.
        added: parameters which the config makes the model without: biases that preparation passes gave to layers,
            and the matrices of low-rank corrections and factored layers.
        weights: the file that holds them.
        made_by: what builds the module where no config can: the original's own reference, a model of the zoo or a
            factory. Of such a folder the weights are here, and the structure is the code's.
        narrowed: layers with other sizes than the config, or that code, gives them (edgeport.model.narrowed).
        transposed: weights that it holds as transformers does (K, N), and the module as Linear layers do.
        sparse: how many numbers are left of the weights that pruning put zeros into.
        steps: what pruning, factorizing and the like did (edgeport.compress.restructure).
        layers, calibration: what happened to each layer and what methods were tuned on (edgeport.compress).
        assets: files that a device needs beside the model.
        files: sha256 of every other file of the folder.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    name: str
    task: str
    architecture: str
    source: SourceRecord
    recipe: Recipe
    target: str | None
    forms: dict[str, dict[str, Any]]
    activations: dict[str, ActivationFormat]
    ranges: dict[str, LayerRange] = Field(default_factory=dict)
    tied: tuple[Annotated[tuple[str, ...], Field(min_length=2)], ...]
    added: tuple[str, ...]
    weights: WeightsFile = WEIGHTS
    made_by: str | None = None
    narrowed: dict[str, Sizes] = Field(default_factory=dict)
    transposed: tuple[str, ...] = ()
    sparse: dict[str, int] = Field(default_factory=dict)
    steps: tuple[dict[str, Any], ...] = ()
    layers: tuple[dict[str, Any], ...]
    calibration: dict[str, Any] | None
    toolchain: dict[str, str]
    assets: tuple[str, ...]
    files: dict[str, str]

    def formats(self) -> dict[str, str]:
        """The weight format of each compressed weight, as recipes and targets name it."""
        return {name: str(form.get("format")) for name, form in self.forms.items()}


def compressed_folder(reference: str) -> Path | None:
    """The folder that a model reference names, when `edgeport compress` wrote it. Reads one small file at most.

    Raises:
        BadInputError: its config.json can't be read.
    """
    folder = Path(reference)
    if (folder / RECORD).is_file():
        return folder
    if not (folder / CONFIG).is_file():
        return None
    quantization = read_json(folder / CONFIG).get("quantization_config")
    return folder if isinstance(quantization, dict) and quantization.get("quant_method") == METHOD else None


def read_record(folder: Path) -> Record:
    """The record of a compressed folder.

    Raises:
        BadInputError: it is missing, damaged, or of another schema version.
    """
    value = read_json(folder / RECORD)
    version = value.get("schema_version")
    if version != SCHEMA_VERSION:
        raise BadInputError(
            f"The compressed folder has the schema version {version!r}.",
            where=folder / RECORD,
            allowed=str(SCHEMA_VERSION),
            next_step="Use the edgeport that wrote it, or compress the original again.",
        )
    return parse_mapping(Record, value, folder / RECORD)


def check_files(folder: Path, record: Record) -> None:
    """See that every file is there and as it was written. Files that the record does not name are left alone.

    Raises:
        BadInputError: naming the first file that is missing or changed.
    """
    present = {path.relative_to(folder).as_posix(): path for path in list_files(folder)}
    config = () if record.made_by else (CONFIG,)
    for needed in (*config, record.weights, f"{REFERENCE}/inputs.safetensors", f"{REFERENCE}/outputs.safetensors"):
        if needed not in record.files:
            raise BadInputError(f"The record names no {needed}.", where=folder / RECORD)
    for name, digest in sorted(record.files.items()):
        if name not in present:
            raise BadInputError(f"The compressed folder lacks {name}.", where=folder, next_step="Copy it again whole.")
        if hash_file(present[name]) != digest:
            raise BadInputError(
                f"{name} is not what was written: its sha256 differs from the one in {RECORD}.",
                where=folder,
                next_step="Copy the folder again, or compress the original again.",
            )
    for asset in record.assets:
        if asset not in record.files:
            raise BadInputError(f"The record names no sha256 of the asset {asset!r}.", where=folder / RECORD)


def load_compressed(folder: Path, *, task: str | None = None) -> Model:
    """The Model of a compressed folder: the module holds the dequantised weights.

    Raises:
        BadInputError: a file is missing, damaged or does not fit the others.
    """
    from edgeport.model.build import build_huggingface
    from edgeport.model.huggingface import quiet
    from edgeport.model.narrowed import narrow

    record = read_record(folder)
    check_files(folder, record)
    if task not in (None, record.task):
        raise BadInputError(
            f"The model was compressed for the task {record.task!r}.", where="--task", allowed=record.task
        )
    quantized, floats = _read_weights(folder, record)
    source = _source(folder, record)
    if record.made_by is not None:
        model = _by_code(folder, record, source)
    else:
        with quiet():
            model = build_huggingface(
                _empty_module(folder, record, set(floats) | set(quantized)),
                name=record.name,
                reference=source.reference,
                kind=source.kind,
                task=record.task,
                files=source.files,
                assets={name: folder / name for name in record.assets},
                licence=source.licence,
                note=source.note,
            )
    # Behind the folding of norms, which runs the module.
    narrow(model.module, record.narrowed)
    _fill(model.module, record, quantized, floats, folder)
    unknown = set(record.activations) ^ set(quantized)
    if unknown:
        raise BadInputError("The record's activations don't fit its forms.", where=f"{folder / RECORD}: {min(unknown)}")
    unknown = {name for name, found in record.activations.items() if found == "static_int8"} ^ set(record.ranges)
    if unknown:
        raise BadInputError(
            "The record's ranges don't fit its activations.", where=f"{folder / RECORD}: {min(unknown)}"
        )
    return replace(
        model,
        quantized=quantized,
        activations=dict(record.activations),
        ranges=dict(record.ranges),
        sparse=dict(record.sparse),
    )


def _by_code(folder: Path, record: Record, source: Source) -> Model:
    """The model that the zoo or a factory makes, with layers of the record's sizes.

    Raises:
        BadInputError: it can't be made here, or has no such layers.
    """
    import copy

    from edgeport.model.load import load_model

    assert record.made_by is not None
    if Path(record.made_by).exists():
        raise BadInputError(
            "The record names a path where code makes the module.",
            where=folder / RECORD,
            allowed="zoo:NAME, or package.module:factory",
        )
    made = load_model(record.made_by, task=record.task)
    module = copy.deepcopy(made.module)
    if type(module).__name__ != record.architecture:
        raise BadInputError(
            f"{record.made_by} makes a {type(module).__name__}, the weights are of a {record.architecture}.",
            where=folder / RECORD,
            next_step="Use the code that the model was compressed with.",
        )
    assets = {name: folder / name for name in record.assets}
    return replace(made, module=module, name=record.name, source=source, assets=assets)


def _source(folder: Path, record: Record) -> Source:
    """The folder as a source. Its record, whose sha256 is among the files, names the original's files."""
    original = record.source
    grids = f"target {record.target}" if record.target else "any target"
    note = (
        f"Compressed before the export by recipe {record.recipe.name} for {grids}, from {original.reference}. Outputs "
        "are compared with those of the uncompressed model that were stored then; the fp32 baseline of size, latency "
        "and memory holds the dequantised weights."
    )
    if record.steps:
        note += " That baseline is the smaller model: what pruning and factorizing saved is not in these ratios."
    files = {**record.files, RECORD: hash_file(folder / RECORD)}
    if original.note:
        note += f" Of the original: {original.note}"
    return Source("compressed", folder.resolve().name, files, original.licence, note)


def _read_weights(folder: Path, record: Record) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The compressed weights (QuantizedTensor), and all other tensors."""
    from safetensors import safe_open

    from edgeport.model.huggingface import check_safetensors
    from edgeport.model.packed import Form, unpack_weight

    check_safetensors(folder / record.weights)
    quantized = {}
    with safe_open(folder / record.weights, framework="pt") as file:
        names = set(file.keys())
        for name, value in record.forms.items():
            form = parse_mapping(Form, value, f"{folder / RECORD}: forms.{name}")
            try:
                parts = {part: f"{name}.{part}" for part in form.layout()}
            except ValueError as error:
                raise BadInputError(f"The form is impossible: {error}.", where=f"{folder / RECORD}: {name}") from error
            lacking = sorted(set(parts.values()) - names)
            if lacking:
                raise BadInputError(f"The weights lack {lacking[0]}.", where=folder / WEIGHTS)
            names -= set(parts.values())
            quantized[name] = unpack_weight(name, form, {part: file.get_tensor(key) for part, key in parts.items()})
        floats = {name: file.get_tensor(name) for name in sorted(names)}
        floats |= {name: floats[name].T.contiguous() for name in record.transposed if name in floats}
    return quantized, floats


def _empty_module(folder: Path, record: Record, names: set[str]) -> Any:
    """The module that the config describes, with random weights and its norms not yet folded."""
    import torch

    from edgeport.model.fold import linearize
    from edgeport.model.huggingface import model_class, read_config

    where = folder / CONFIG
    raw = {key: value for key, value in read_json(where).items() if key != "quantization_config"}
    config = read_config(folder, raw)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    cls = model_class(config, {"architectures": [record.architecture]}, None, where=where)
    with torch.random.fork_rng(devices=[]):
        try:
            module = cls(config)
            if not any(name.startswith("pooler.") for name in names) and getattr(module, "pooler", None) is not None:
                module = cls(config, add_pooling_layer=False)
        except (ValueError, TypeError, KeyError, RuntimeError, ImportError) as error:
            raise BadInputError(f"{cls.__name__} can't be built: {first_line(error)}", where=where) from error
    linearize(module)
    return module.to(torch.float32)


def _fill(
    module: torch.nn.Module,
    record: Record,
    quantized: Mapping[str, Any],
    floats: Mapping[str, torch.Tensor],
    folder: Path,
) -> None:
    """Put the weights in their places; every place must get one, and every weight have a place."""
    from edgeport.quantized import dequantize

    state = {**floats, **{name: dequantize(tensor) for name, tensor in quantized.items()}}
    _match_structure(module, record, state, folder)
    for first, *others in record.tied:
        if first in state:
            state |= dict.fromkeys(others, state[first])
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if expected != found:
        name = min(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))
        raise BadInputError(
            f"The weights don't fit the config: {name} is {found.get(name, 'missing')} in the file and "
            f"{expected.get(name, 'unknown')} in {record.architecture}.",
            where=folder / WEIGHTS,
            next_step="Load it with the transformers version that edgeport.json names, or compress the original again.",
        )
    module.load_state_dict(state, strict=True)


def _match_structure(module: torch.nn.Module, record: Record, state: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Give the module the ties, biases and side branches that the compressed one had, in place."""
    import torch

    from edgeport.model.corrected import add_corrections
    from edgeport.model.factored import add_factors, factored_layer

    def owner(name: str) -> tuple[torch.nn.Module, str]:
        prefix, _, leaf = name.rpartition(".")
        try:
            return module.get_submodule(prefix), leaf
        except AttributeError as error:
            raise BadInputError(f"{record.architecture} has no layer {prefix!r}.", where=folder / RECORD) from error

    ranks = {factored_layer(name): state[name].shape[0] for name in record.added if name in state}
    try:
        add_factors(module, {layer: rank for layer, rank in ranks.items() if layer is not None})
        add_corrections(module, {name: tuple(state[name].shape) for name in record.added if name in state})
    except (AttributeError, TypeError) as error:
        raise BadInputError(
            f"A correction or a factor belongs to no Linear layer of {record.architecture}: {error}.",
            where=folder / RECORD,
        ) from error
    for name in record.added:
        layer, leaf = owner(name)
        # A layer made without a bias has the name all the same, for None.
        if name in state and leaf == "bias" and layer._parameters.get(leaf, module) is None:
            layer.register_parameter(leaf, torch.nn.Parameter(torch.empty_like(state[name]), requires_grad=False))
    parameters = dict(module.named_parameters(remove_duplicate=False))
    tied = {name for group in record.tied for name in group}
    unknown = sorted(tied - set(parameters))
    if unknown:
        raise BadInputError(f"{record.architecture} has no parameter {unknown[0]!r}.", where=folder / RECORD)
    for name in (name for group in tied_names(module) for name in group if name not in tied):
        layer, leaf = owner(name)
        setattr(layer, leaf, torch.nn.Parameter(parameters[name].detach().clone(), requires_grad=False))
    for first, *others in record.tied:
        for name in others:
            layer, leaf = owner(name)
            setattr(layer, leaf, parameters[first])


def tied_names(module: torch.nn.Module) -> tuple[tuple[str, ...], ...]:
    """The names of each parameter that has several, in the module's order."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return tuple(tuple(group) for group in names.values() if len(group) > 1)
