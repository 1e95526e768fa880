"""A tokenizer.json for folders that only hold the older vocabulary files."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from edgeport.storage import cache_root, hash_file, hash_value, read_json, write_text

logger = logging.getLogger(__name__)

VOCABULARIES = ("vocab.txt", "vocab.json", "merges.txt", "tokenizer.model", "spiece.model")
CONFIGS = ("config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def end_tokens(generation_config: Path | None, otherwise: object = None) -> frozenset[int]:
    """The tokens that end a text, as generation_config.json names them.

    Args:
        generation_config: the file, if there is one.
        otherwise: what holds where it names none: an id, a list of ids, or None.
    """
    named: Any = otherwise
    if generation_config is not None and generation_config.is_file():
        named = read_json(generation_config).get("eos_token_id", otherwise)
    return frozenset(int(token) for token in (named if isinstance(named, list) else [] if named is None else [named]))


def tokenizer_file(folder: Path) -> Path | None:
    """The folder's tokenizer.json, or one that transformers makes of its vocabulary files, kept in the cache.

    None, with a warning, where transformers can't make one: the model then gets random inputs.
    """
    if (folder / "tokenizer.json").is_file():
        return folder / "tokenizer.json"
    sources = [folder / name for name in (*VOCABULARIES, *CONFIGS) if (folder / name).is_file()]
    if not any(path.name in VOCABULARIES for path in sources):
        return None
    key = hash_value({path.name: hash_file(path) for path in sources})
    path = cache_root() / "tokenizers" / key[:32] / "tokenizer.json"
    if not path.is_file():
        from transformers import AutoTokenizer

        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            write_text(path, tokenizer.backend_tokenizer.to_str(pretty=True))
        except Exception as error:  # noqa: BLE001 - tokenizers raises nothing more specific; the weights are still good
            logger.warning("No tokenizer.json could be made of %s: %s", ", ".join(p.name for p in sources), error)
            return None
    return path
