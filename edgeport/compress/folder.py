"""Write a compressed model as a folder that `edgeport.model.compressed` loads again, on this machine or another."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import save_file

from edgeport.compress.apply import LayerRecord
from edgeport.compress.restructure import StepRecord
from edgeport.data.samples import SampleRecord
from edgeport.errors import BadInputError
from edgeport.model.compressed import (
    CONFIG,
    METHOD,
    PLAIN_WEIGHTS,
    RECORD,
    REFERENCE,
    WEIGHTS,
    Record,
    Sizes,
    SourceRecord,
    WeightsFile,
    tied_names,
)
from edgeport.model.narrowed import narrowed_layers
from edgeport.model.packed import form_of, pack_weight
from edgeport.model.types import Model
from edgeport.recipe import Recipe
from edgeport.storage import canonical_json, hash_tree

_LAYERS: TypeAdapter[tuple[LayerRecord, ...]] = TypeAdapter(tuple[LayerRecord, ...])
_STEPS: TypeAdapter[tuple[StepRecord, ...]] = TypeAdapter(tuple[StepRecord, ...])
_CALIBRATION: TypeAdapter[SampleRecord | None] = TypeAdapter(SampleRecord | None)

ParsedT = TypeVar("ParsedT")


@dataclass(frozen=True)
class Compressed:
    """What goes into the folder.

    Attributes:
        original: the uncompressed model; its source is recorded.
        model: the compressed one.
        target: name of the target whose grids were used; None for the portable ones.
        layers, calibration: what `apply_recipe` did, and on which inputs.
        steps: what pruning, factorizing and the like did before.
        reference: folder with the original's inputs.safetensors, outputs.safetensors and record.json.
        toolchain: versions of the packages that decide what the files contain.
    """

    original: Model
    model: Model
    recipe: Recipe
    target: str | None
    layers: tuple[LayerRecord, ...]
    calibration: SampleRecord | None
    reference: Path
    toolchain: Mapping[str, str]
    steps: tuple[StepRecord, ...] = ()


def check_can_be_stored(model: Model) -> None:
    """Refuse a model that no folder can hold.

    Raises:
        BadInputError: neither a config of transformers, nor the zoo, nor a factory makes its module again.
    """
    if _has_config(model) or model.source.kind in ("zoo", "factory"):
        return
    raise BadInputError(
        f"{model.name} ({type(model.module).__name__}) can't be made again out of a folder.",
        where="MODEL",
        allowed="Hugging Face folders and hub ids, .gguf files, models of the zoo, package.module:factory",
        next_step="Compress and export it in one run: `edgeport export` takes it.",
    )


def _has_config(model: Model) -> bool:
    """The module is a class of transformers, loaded in the ordinary way."""
    import transformers

    cls = type(model.module)
    return model.huggingface and model.source.kind != "factory" and getattr(transformers, cls.__name__, None) is cls


def _narrowed(contents: Compressed, made_by: str | None) -> dict[str, Sizes]:
    """Layers with other sizes than the config, or the code, gives them."""
    module: Any = contents.model.module
    if made_by is not None:
        return narrowed_layers(module, contents.original.module)
    if not any(step.method == "prune_channels" for step in contents.steps):
        return {}
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return narrowed_layers(module, type(module)(module.config))


def write_compressed(folder: Path, contents: Compressed) -> Record:
    """Write the files into an existing empty folder. The same contents give the same bytes."""
    model = contents.model
    made_by = None if _has_config(model) else model.source.reference
    transposed = _transposed(model) if contents.steps and made_by is None else None
    weights: WeightsFile = WEIGHTS if transposed is None else PLAIN_WEIGHTS
    if made_by is None:
        config = _config(model)
        if transposed is not None:
            del config["quantization_config"]
        (folder / CONFIG).write_text(canonical_json(config))
    save_file(_tensors(model, transposed or ()), folder / weights, metadata={"format": "pt"})
    for name, path in model.assets.items():
        shutil.copyfile(path, folder / name)
    (folder / REFERENCE).mkdir()
    for path in sorted(contents.reference.iterdir()):
        shutil.copyfile(path, folder / REFERENCE / path.name)
    formats = {layer.name: layer.format for layer in contents.layers}
    original = set(dict(contents.original.module.named_parameters(remove_duplicate=False)))
    record = Record(
        name=model.name,
        task=model.task,
        architecture=type(model.module).__name__,
        source=SourceRecord.model_validate(asdict(model.source)),
        recipe=contents.recipe,
        target=contents.target,
        forms={
            name: form_of(tensor, formats[name]).model_dump(mode="json") for name, tensor in model.quantized.items()
        },
        activations=dict(model.activations),
        ranges=dict(model.ranges),
        tied=tied_names(model.module),
        added=tuple(name for name, _ in model.module.named_parameters() if name not in original),
        weights=weights,
        made_by=made_by,
        narrowed=_narrowed(contents, made_by),
        transposed=transposed or (),
        sparse=dict(model.sparse),
        steps=tuple(json.loads(_STEPS.dump_json(contents.steps))),
        layers=tuple(json.loads(_LAYERS.dump_json(contents.layers))),
        calibration=json.loads(_CALIBRATION.dump_json(contents.calibration)),
        toolchain=dict(contents.toolchain),
        assets=tuple(sorted(model.assets)),
        files=hash_tree(folder),
    )
    (folder / RECORD).write_text(canonical_json(record.model_dump(mode="json")))
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return record


def _config(model: Model) -> dict[str, Any]:
    """The module's config as JSON values, marked so that no other tool takes the codes for float weights."""
    config: Any = model.module.config
    value: dict[str, Any] = _without_paths(json.loads(config.to_json_string(use_diff=False)))
    return {
        **value,
        "architectures": [type(model.module).__name__],
        "quantization_config": {"quant_method": METHOD, "schema_version": 1},
    }


def _without_paths(value: Any) -> Any:
    """A config without the paths of the machine it was loaded on."""
    if isinstance(value, dict):
        return {key: _without_paths(item) for key, item in value.items() if key != "_name_or_path"}
    return [_without_paths(item) for item in value] if isinstance(value, list) else value


def _transposed(model: Model) -> tuple[str, ...] | None:
    """The weights that transformers holds transposed (GPT-2's Conv1D), where `from_pretrained` can load the module as
    it is; None where it can't: quantized, factored, or with norms that edgeport folded."""
    from transformers.pytorch_utils import Conv1D

    module: Any = model.module
    if model.quantized:
        return None
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        plain = type(module)(module.config)
        if getattr(plain, "pooler", None) is not None and getattr(module, "pooler", None) is None:
            plain = type(module)(module.config, add_pooling_layer=False)
    found = tuple(f"{name}.weight" for name, child in plain.named_modules() if isinstance(child, Conv1D))
    linearized = {
        name: tuple(tensor.shape)[::-1] if name in found else tuple(tensor.shape)
        for name, tensor in plain.state_dict().items()
    }
    if linearized != {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}:
        return None
    return found if tied_names(plain) == tied_names(module) else None


def _tensors(model: Model, transposed: Collection[str]) -> dict[str, torch.Tensor]:
    """Everything in the module's state: each parameter once, the compressed ones in parts."""
    others = {name for _, *names in tied_names(model.module) for name in names}
    state = model.module.state_dict()
    tensors = {
        name: (tensor.T if name in transposed else tensor).detach().clone(memory_format=torch.contiguous_format)
        for name, tensor in state.items()
        if name not in others and name not in model.quantized
    }
    for name, tensor in model.quantized.items():
        tensors |= {f"{name}.{part}": value.contiguous() for part, value in pack_weight(tensor).items()}
    return tensors


def step_records(record: Record) -> tuple[StepRecord, ...]:
    """What pruning, factorizing and the like did before.

    Raises:
        BadInputError: the record's steps are not of the form that this version writes.
    """
    return _parsed(_STEPS, list(record.steps), "steps")


def layer_records(record: Record) -> tuple[LayerRecord, ...]:
    """What happened to each layer.

    Raises:
        BadInputError: the record's layers are not of the form that this version writes.
    """
    return _parsed(_LAYERS, list(record.layers), "layers")


def calibration_record(record: Record) -> SampleRecord | None:
    """What methods were tuned on.

    Raises:
        BadInputError: it is not of the form that this version writes.
    """
    return _parsed(_CALIBRATION, record.calibration, "calibration")


def _parsed(adapter: TypeAdapter[ParsedT], value: Any, key: str) -> ParsedT:
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise BadInputError(f"The record is wrong at {key}.{place}: {first['msg']}.", where=RECORD) from error
