"""Load a GGUF file: llama.cpp's format of weights, config and tokenizer in one.

Specification: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. transformers does the reading, which
takes long, so its result is kept in the cache as a Hugging Face folder under the file's sha256.
"""

from __future__ import annotations

import contextlib
import io
import logging
import shutil
import struct
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgeport.errors import BadInputError, first_line
from edgeport.model.huggingface import ASSETS, load_folder, quiet
from edgeport.model.types import Model
from edgeport.packages import Progress
from edgeport.storage import cache_root, canonical_json, hash_file, hash_tree, new_folder, read_json

logger = logging.getLogger(__name__)

MAGIC = b"GGUF"
VERSIONS = (2, 3)
FLOAT_TYPES = frozenset({"F32", "F16", "BF16", "F64"})
RECORD = "conversion.json"  # sha256 of the folder's other files, and the types of the weights in the GGUF file
FORM = 1  # raised when the way of converting changes, so that older folders are not used


def load_gguf(
    path: Path,
    *,
    name: str,
    reference: str,
    task: str | None = None,
    hashes: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> Model:
    """A causal language model out of a GGUF file, its weights dequantised to float32.

    Args:
        hashes: sha256 by file name where they are already known.

    Raises:
        BadInputError: the file is missing, truncated, no GGUF, or of an architecture that transformers can't read.
    """
    check_head(path)
    if task not in (None, "text-generation"):
        raise BadInputError(f"A GGUF file can't be loaded for {task!r}.", where="--task", allowed="text-generation")
    digest = (hashes or {}).get(path.name) or hash_file(path)
    folder = cache_root() / "gguf" / f"{digest[:32]}-{FORM}"
    if not _is_whole(folder):
        if progress is not None:
            progress(f"dequantising {path.name} (once)")
        _convert(path, folder)
    quantized = sorted(set(read_json(folder / RECORD)["types"]) - FLOAT_TYPES)
    model = load_folder(folder, name=name, reference=reference, kind="gguf", hashes=_recorded(folder))
    note = f"Dequantised from {', '.join(quantized)}: the fp32 reference is already rounded." if quantized else None
    return replace(model, source=replace(model.source, files={path.name: digest}, note=note))


def check_head(path: Path) -> None:
    """Raise BadInputError when the file is missing or has another magic number or version."""
    if not path.is_file():
        raise BadInputError("The GGUF file is missing.", where=path)
    with path.open("rb") as file:
        head = file.read(8)
    if len(head) < 8 or head[:4] != MAGIC:
        raise BadInputError("The file is no GGUF file: it does not begin with 'GGUF'.", where=path)
    version = struct.unpack("<I", head[4:])[0]
    if version not in VERSIONS:
        raise BadInputError(f"The file has GGUF version {version}.", where=path, allowed=VERSIONS)


def weight_types(path: Path) -> list[str]:
    """The names of the weight types in a GGUF file ("F32", "Q4_1", ...), sorted; the whole file is seen to be there.

    Raises:
        BadInputError: the file ends before its last tensor, or holds none.
    """
    from gguf import GGUFReader

    try:
        tensors = GGUFReader(path).tensors
    except (ValueError, IndexError, KeyError, OverflowError, struct.error, UnicodeDecodeError) as error:
        raise BadInputError(
            f"The GGUF file is truncated or damaged: {first_line(error)}.",
            where=path,
            next_step="Download or copy it again, and compare its size and sha256 with the original's.",
        ) from error
    if not tensors:
        raise BadInputError("The GGUF file holds no weights (a vocabulary only?).", where=path)
    return sorted({tensor.tensor_type.name for tensor in tensors})


def _recorded(folder: Path) -> dict[str, str]:
    hashes: dict[str, str] = read_json(folder / RECORD)["sha256"]
    return hashes


def _is_whole(folder: Path) -> bool:
    """The folder is there and every file in it is as it was written; a damaged one is removed with a warning."""
    if not folder.is_dir():
        return False
    try:
        actual = {name: digest for name, digest in hash_tree(folder).items() if name != RECORD}
        if actual == _recorded(folder):
            return True
    except (BadInputError, KeyError):
        pass  # the record itself is damaged
    logger.warning("The cached conversion %s of a GGUF file is damaged; converting again.", folder.name)
    shutil.rmtree(folder)
    return False


def _convert(path: Path, folder: Path) -> None:
    """Write config, float32 weights and tokenizer as a Hugging Face folder."""
    types = weight_types(path)
    with new_folder(folder) as made, quiet():
        # transformers draws its own progress bar straight to stderr, whatever its settings say.
        with contextlib.redirect_stderr(io.StringIO()):
            module = _read_module(path)
        module.save_pretrained(made)
        _write_tokenizer(path, made)
        for file in made.iterdir():
            if file.name not in (*ASSETS, "config.json", "model.safetensors", "model.safetensors.index.json"):
                file.unlink()
        record = {"types": types, "sha256": hash_tree(made)}
        (made / RECORD).write_text(canonical_json(record))


def _read_module(path: Path) -> Any:
    """The transformers model.

    transformers marks a model from a GGUF file as quantized and refuses to save it; a fresh model with the same
    config and weights is not.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    where: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True}
    try:
        config = AutoConfig.from_pretrained(path.parent, **where)
        loaded = AutoModelForCausalLM.from_pretrained(path.parent, config=config, dtype=torch.float32, **where)
    except ImportError as error:
        raise BadInputError(f"Reading GGUF needs a library that is not installed: {first_line(error)}") from error
    except (OSError, ValueError, RuntimeError, KeyError, NotImplementedError) as error:
        raise BadInputError(f"transformers can't load the GGUF file: {first_line(error)}", where=path) from error
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    module = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    module.load_state_dict(loaded.state_dict())
    return module


def _write_tokenizer(path: Path, folder: Path) -> None:
    """The file's tokenizer in Hugging Face's form; none where the file holds none that transformers can convert."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    except Exception as error:  # noqa: BLE001 - tokenizers raises nothing more specific; the weights are still good
        logger.warning("The tokenizer of %s can't be converted: %s", path.name, first_line(error))
        return
    tokenizer.save_pretrained(folder)
