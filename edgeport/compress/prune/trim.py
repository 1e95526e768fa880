"""A model with a smaller vocabulary: the rows of its tables, its head and its tokenizer, cut together.

Done before anything else sees the model: what follows has one vocabulary. Texts of kept tokens get the original's
scores for them, exactly, so evidence compares with this model's float form and its size with the original's.
"""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from edgeport.compress.prune.cut import skeleton
from edgeport.compress.prune.vocabulary import choose_tokens, count_tokens, pruned_tokenizer, renumbered_ids
from edgeport.data.cards import load_card
from edgeport.data.samples import CARDS
from edgeport.data.text import read_texts
from edgeport.errors import BadInputError
from edgeport.model.build import build_huggingface
from edgeport.model.compressed import tied_names
from edgeport.model.types import Model
from edgeport.restructuring import PruneVocabulary
from edgeport.storage import canonical_json, read_json, write_text

TOKENIZER, KEPT = "tokenizer.json", "kept.json"
RENUMBERED = ("tokenizer_config.json", "generation_config.json")
REPLACED = ("vocab.txt", "vocab.json", "merges.txt", "tokenizer.model", "spiece.model", "added_tokens.json")
"""Older forms of the vocabulary, which tokenizer.json stands for."""


def read_corpus(step: PruneVocabulary) -> list[str]:
    """The texts whose tokens count.

    Raises:
        BadInputError: the file is missing or empty.
    """
    if step.corpus is None:
        card = load_card(CARDS["text"])
        return read_texts(card, card.fetch(), "calibration")
    path = Path(step.corpus)
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise BadInputError(f"The corpus can't be read: {error}.", where=path) from error
    if not lines:
        raise BadInputError("The corpus is empty.", where=path, allowed="a text file with one text a line")
    return lines


def write_trimmed(folder: Path, model: Model, step: PruneVocabulary) -> None:
    """Choose the tokens and write the tokenizer's files, and the ids that stay, into an existing folder.

    Raises:
        BadInputError: the model has no tokenizer, or can't be cut to so many tokens.
    """
    if TOKENIZER not in model.assets or not model.huggingface or model.modality != "text":
        raise BadInputError(
            f"{model.name} has no text tokenizer: its vocabulary can't be pruned.",
            where="prune_vocabulary",
            allowed="transformers models of text with a tokenizer.json",
        )
    raw = read_json(model.assets[TOKENIZER])
    tokenizer = Tokenizer.from_file(str(model.assets[TOKENIZER]))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    named = _named_ids(json.loads(_config(model).to_json_string(use_diff=False)))
    kept = choose_tokens(raw, count_tokens(tokenizer, read_corpus(step)), step.tokens, named)
    new = {old: place for place, old in enumerate(kept)}
    write_text(folder / TOKENIZER, json.dumps(pruned_tokenizer(raw, kept), ensure_ascii=False))
    for name in RENUMBERED:
        if name in model.assets:
            write_text(folder / name, canonical_json(renumbered_ids(read_json(model.assets[name]), new)))
    write_text(folder / KEPT, canonical_json({"kept": kept}))


def _named_ids(config: Any) -> set[int]:
    """Tokens that a config names: they have a part to play whatever the corpus says."""
    found: set[int] = set()
    for key, value in config.items() if isinstance(config, dict) else ():
        if key.endswith("_token_id") and value is not None:
            found |= {int(one) for one in (value if isinstance(value, list) else [value])}
        else:
            found |= _named_ids(value)
    return found


def _config(model: Model) -> Any:
    return model.module.config


def read_trimmed(folder: Path, model: Model) -> Model:
    """The model with the vocabulary that `write_trimmed` chose.

    Raises:
        BadInputError: the model's tables are not of its config's vocabulary.
    """
    kept = [int(one) for one in read_json(folder / KEPT)["kept"]]
    module = trimmed_module(model, kept)
    assets = {name: path for name, path in model.assets.items() if name not in REPLACED}
    assets |= {name: folder / name for name in (TOKENIZER, *RENUMBERED) if (folder / name).is_file()}
    source = model.source
    before = int(_config(model).vocab_size)
    words = (
        f"The vocabulary was cut from {before} to {len(kept)} tokens: outputs are compared with the original's scores "
        "of these tokens, on texts cut into them."
    )
    made = build_huggingface(
        module,
        name=model.name,
        reference=source.reference,
        kind=source.kind,
        task=model.task,
        files=source.files,
        assets=assets,
        licence=source.licence,
        note=f"{source.note} {words}" if source.note else words,
    )
    return replace(made, labels=model.labels)


def trimmed_module(model: Model, kept: list[int]) -> Any:
    """The module with these rows of its tables and its head; tied ones stay tied. The given one is not changed.

    Raises:
        BadInputError: a table has another number of rows than the config says.
    """
    before = int(_config(model).vocab_size)
    new = {old: place for place, old in enumerate(kept)}
    config: Any = type(_config(model)).from_dict(renumbered_ids(copy.deepcopy(_config(model).to_dict()), new))
    config.vocab_size = len(kept)
    config._attn_implementation = _config(model)._attn_implementation
    smaller = skeleton(model, config)
    state, index = {}, torch.tensor(kept)
    shapes = {name: tuple(tensor.shape) for name, tensor in smaller.state_dict().items()}
    for name, tensor in model.module.state_dict().items():
        for axis, (have, want) in enumerate(zip(tensor.shape, shapes[name], strict=True)):
            if have != want:
                if have != before or want != len(kept):
                    raise BadInputError(
                        f"{name} has {have} rows, the config's vocabulary {before}.", where="prune_vocabulary"
                    )
                tensor = tensor.index_select(axis, index)
        state[name] = tensor
    assert tied_names(smaller) == tied_names(model.module), "a smaller vocabulary unties nothing"
    smaller.load_state_dict(state)
    return smaller
