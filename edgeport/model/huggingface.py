"""Load a Hugging Face folder: config.json, safetensors weights and, maybe, a tokenizer."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeport.errors import BadInputError, first_line
from edgeport.model.build import build_huggingface
from edgeport.model.tokenizer import tokenizer_file
from edgeport.model.types import Model, SourceKind
from edgeport.storage import hash_file, read_json

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")

# What a device or a tokenizer needs beside the weights; config.json may hold the author's paths and is left out.
ASSETS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "preprocessor_config.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
)


def load_folder(
    folder: Path,
    *,
    name: str,
    reference: str,
    kind: SourceKind = "huggingface",
    task: str | None = None,
    allow_pickle: bool = False,
    licence: str | None = None,
    note: str | None = None,
    hashes: Mapping[str, str] | None = None,
) -> Model:
    """A Model out of a folder with config.json, safetensors weights and, maybe, a tokenizer.

    Args:
        task: optimum's task name; None takes the head that the checkpoint was saved with.
        allow_pickle: also read `pytorch_model.bin` (with torch's weights-only unpickler).
        hashes: sha256 by file name where they are already known.

    Raises:
        BadInputError: a file is missing, damaged or a pickle, or the architecture is unknown.
    """
    raw = read_json(folder / "config.json")
    files = check_weights(folder, allow_pickle=allow_pickle)
    config = read_config(folder, raw)
    cls = model_class(config, raw, task, where=folder / "config.json")
    with quiet():
        module = _from_pretrained(cls, folder, config, allow_pickle=allow_pickle)
    assets = {asset: folder / asset for asset in ASSETS if (folder / asset).is_file()}
    with quiet():
        tokenizer = tokenizer_file(folder)
    if tokenizer is not None:
        assets["tokenizer.json"] = tokenizer
    read = [folder / "config.json", *files, *assets.values()]
    known = hashes or {}
    return build_huggingface(
        module,
        name=name,
        reference=reference,
        kind=kind,
        task=task,
        files={path.name: known.get(path.name) or hash_file(path) for path in read},
        assets=assets,
        licence=licence,
        note=note,
    )


def check_weights(folder: Path, *, allow_pickle: bool = False) -> list[Path]:
    """The weight files of a folder, each seen to be whole.

    Raises:
        BadInputError: there is none, a shard is missing, one is truncated, or there are only pickles.
    """
    if (folder / WEIGHTS).is_file():
        names = [WEIGHTS]
    elif (folder / WEIGHTS_INDEX).is_file():
        weight_map = read_json(folder / WEIGHTS_INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise BadInputError("The index of the weights has no 'weight_map'.", where=folder / WEIGHTS_INDEX)
        names = [WEIGHTS_INDEX, *sorted({str(value) for value in weight_map.values()})]
    else:
        pickles = [pickle for pickle in PICKLES if (folder / pickle).is_file()]
        if pickles and allow_pickle:
            return sorted(folder.glob("pytorch_model*.bin*"))
        if pickles:
            raise BadInputError(
                f"The weights are only there as a pickle ({pickles[0]}), which can run code when it is read.",
                where=folder,
                allowed=WEIGHTS,
                next_step="Convert it to safetensors, or give --allow-pickle if you trust who made it.",
            )
        raise BadInputError("The folder holds no weights.", where=folder, allowed=f"{WEIGHTS} or {WEIGHTS_INDEX}")
    for name in names:
        path = folder / name
        if Path(name).name != name or not path.is_file():
            raise BadInputError("A file of weights that the index names is missing.", where=path)
        if path.suffix == ".safetensors":
            check_safetensors(path)
    return [folder / name for name in names]


def check_safetensors(path: Path) -> None:
    """Raise BadInputError when a safetensors file is truncated or damaged; reads only its header."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy"):
            pass
    except (SafetensorError, OSError) as error:
        raise BadInputError(
            f"The file of weights is truncated or damaged: {error}.",
            where=path,
            next_step="Download or copy it again, and compare its size and sha256 with the original's.",
        ) from error


def read_config(folder: Path, raw: Mapping[str, Any]) -> PretrainedConfig:
    """The model's config.

    Raises:
        BadInputError: the model type is unknown, needs code from the checkpoint, or is already quantized.
    """
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    where = folder / "config.json"
    if "auto_map" in raw:
        raise BadInputError(
            "The checkpoint brings its own Python code (auto_map), which edgeport does not run.",
            where=where,
            next_step="Import that code yourself and name the model as `package.module:factory`.",
        )
    model_type = raw.get("model_type")
    if model_type not in CONFIG_MAPPING:
        raise BadInputError(
            f"The model type {model_type!r} is unknown to transformers."
            if model_type
            else "The config names no 'model_type'.",
            where=where,
            next_step="Check the config, or name the model as `package.module:factory`.",
        )
    if raw.get("quantization_config"):
        method = raw["quantization_config"].get("quant_method", "an unknown method")
        raise BadInputError(
            f"The checkpoint is already quantized ({method}).",
            where=where,
            next_step="Start from the float checkpoint: edgeport quantizes it for the target.",
        )
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise BadInputError(f"The config is wrong: {first_line(error)}", where=where) from error
    except Exception as error:
        # huggingface_hub's strict dataclasses raise errors of their own for a field of the wrong type.
        if type(error).__module__.startswith("huggingface_hub"):
            raise BadInputError(f"The config is wrong: {first_line(error)}", where=where) from error
        raise


def model_class(config: PretrainedConfig, raw: Mapping[str, Any], task: str | None, where: Path) -> Any:
    """The transformers class to load with: the task's when one is given, else the one that saved the checkpoint.

    Raises:
        BadInputError: the task or the architecture is unknown.
    """
    import transformers

    if task is not None:
        from optimum.exporters.tasks import TasksManager

        try:
            auto = TasksManager.get_model_class_for_task(task, model_type=config.model_type, library="transformers")
            return auto if not hasattr(auto, "_model_mapping") else auto._model_mapping[type(config)]
        except (KeyError, ValueError) as error:
            raise BadInputError(
                f"A model of type {config.model_type!r} has no task {task!r}.",
                where="--task",
                allowed=sorted(TasksManager.get_all_tasks()),
            ) from error
    architectures = raw.get("architectures") or []
    if not architectures:
        try:
            return transformers.AutoModel._model_mapping[type(config)]
        except KeyError as error:
            raise BadInputError(
                "The config names no 'architectures'.", where=where, next_step="Give --task."
            ) from error
    cls = getattr(transformers, str(architectures[0]), None)
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        raise BadInputError(
            f"The architecture {architectures[0]!r} is unknown to transformers {transformers.__version__}.",
            where=where,
            next_step="Name the model as `package.module:factory`.",
        )
    return cls


def _from_pretrained(cls: Any, folder: Path, config: PretrainedConfig, *, allow_pickle: bool) -> PreTrainedModel:
    """The model in float32, with every weight taken from the file: none may be left at random."""
    import torch

    def load(**extra: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
        return cls.from_pretrained(  # type: ignore[no-any-return]
            folder,
            config=config,
            dtype=torch.float32,
            local_files_only=True,
            use_safetensors=None if allow_pickle else True,
            output_loading_info=True,
            **extra,
        )

    try:
        module, info = load()
        missing = sorted(info["missing_keys"])
        if missing and all(key.startswith("pooler.") for key in missing):
            module, info = load(add_pooling_layer=False)  # saved from a model with a head, which has no pooler
            missing = sorted(info["missing_keys"])
    except ImportError as error:
        raise BadInputError(f"{cls.__name__} needs a library that is not installed: {first_line(error)}") from error
    except pickle.UnpicklingError as error:
        raise BadInputError(
            "The pickle holds more than tensors, which edgeport never loads.",
            where=folder,
            next_step="Convert it to safetensors on a machine where its code may run.",
        ) from error
    except (OSError, ValueError, RuntimeError, KeyError, EOFError) as error:
        raise BadInputError(
            f"transformers can't load the weights as {cls.__name__}: {first_line(error)}", where=folder
        ) from error
    if missing:
        raise BadInputError(
            f"{len(missing)} weights of {cls.__name__} are not in the checkpoint; they would be random numbers.",
            where=", ".join(missing[:5]) + (", ..." if len(missing) > 5 else ""),
            next_step="Give the --task that the checkpoint was trained for, or a checkpoint that has them.",
        )
    for parameter in module.parameters():
        # They are views of the mapped file: whoever writes to it would change the model under our hands.
        parameter.data = parameter.data.clone()
    return module


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' and huggingface_hub's progress bars and load reports off the terminal."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    hub_bars = not are_progress_bars_disabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
        if hub_bars:
            enable_progress_bars()


__all__ = ["check_safetensors", "check_weights", "load_folder", "quiet"]
