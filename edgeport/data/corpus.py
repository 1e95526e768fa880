"""Texts out of files of the user's own, as inputs of a model."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeport.data.chats import rendered_prompts
from edgeport.data.generated import check_generates
from edgeport.data.samples import Arrays, SampleRecord, Samples, sequence_axis
from edgeport.data.text import open_tokenizer
from edgeport.errors import BadInputError
from edgeport.model.inputs import vocabulary_size
from edgeport.storage import hash_file

if TYPE_CHECKING:
    from edgeport.model.types import Model

INPUTS = frozenset({"input_ids", "attention_mask", "token_type_ids", "position_ids"})
NO_LIMIT = 1 << 30
"""Tokens that a text is cut to where it is not to be cut."""


def read_lines(path: Path, key: str) -> list[str]:
    """The texts of a file: one a line, or under `key` of one JSON object a line in a .jsonl file. Empty ones are left
    out.

    Raises:
        BadInputError: the file can't be read, or a line is not what it should be.
    """
    try:
        # Not splitlines: JSON may hold the other line ends of Unicode.
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInputError(f"The texts can't be read: {error}.", where=path) from error
    if path.suffix != ".jsonl":
        return [line for line in lines if line.strip()]
    texts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)[key]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise BadInputError(
                f"Line {number} is no JSON object with the key {key!r}.",
                where=path,
                next_step="Say which key holds the text: `key` of [compress.data] or [calibration].",
            ) from error
        if not isinstance(text, str):
            raise BadInputError(f"Line {number} has a {type(text).__name__} under {key!r}, no text.", where=path)
        if text.strip():
            texts.append(text)
    return texts


def read_files(files: Sequence[str], key: str) -> tuple[list[str], dict[str, str]]:
    """The texts of all files, and the sha256 of each file by its name.

    Raises:
        BadInputError: a file can't be read, or there is no text in any.
    """
    texts = [text for file in files for text in read_lines(Path(file), key)]
    if not texts:
        raise BadInputError("There is no text to learn from.", where=", ".join(files), allowed="one text a line")
    return texts, {Path(file).name: hash_file(Path(file)) for file in files}


def hash_files(files: Iterable[str | Path]) -> list[str]:
    """sha256 of each file.

    Raises:
        BadInputError: one can't be read.
    """
    try:
        return [hash_file(Path(file)) for file in files]
    except OSError as error:
        raise BadInputError(f"A file can't be read: {error}.", where=error.filename) from error


def check_takes_text(model: Model) -> None:
    """Refuse a model whose inputs are no tokens of its own tokenizer.

    Raises:
        BadInputError: saying what it lacks.
    """
    names = {spec.name for spec in model.inputs}
    if model.inputs[0].name != "input_ids" or not names <= INPUTS or "tokenizer.json" not in model.assets:
        raise BadInputError(
            f"{model.name} can't learn from texts: it has no tokenizer.json, or takes other inputs than tokens.",
            where="[compress.data] or [calibration]",
            allowed="encoders and causal language models; a data card for every other model",
        )


def corpus_samples(
    model: Model, files: Sequence[str], *, count: int, key: str = "text", sequence: int | None = None, seed: int = 0
) -> Samples:
    """Inputs made of the texts of files, batch 1, at most `count` of them, drawn with a seed.

    A causal language model reads windows of exactly `sequence` tokens out of all texts behind one another, an
    end-of-text token after each. Any other model reads each text by itself, longer ones in parts.

    Args:
        key: of the text in .jsonl files.
        sequence: tokens of an input at most; None takes the example length of the model's sequence axis.

    Raises:
        BadInputError: a file can't be read or has no text, the model takes no texts, or no input comes out.
    """
    check_takes_text(model)
    texts, hashes = read_files(files, key)
    length = _length(model, sequence)
    packed = model.task.startswith("text-generation")
    rows = _windows(model, texts, length) if packed else _parts(model, texts, length)
    if not rows:
        raise BadInputError(
            f"The texts are shorter than one input of {length} tokens.",
            where=", ".join(files),
            next_step="Give more text, or a smaller `sequence`.",
        )
    chosen = np.random.default_rng(seed).permutation(len(rows))[:count]
    inputs = [_arrays(model, rows[int(index)]) for index in chosen]
    form = f"windows of {length} tokens" if packed else f"parts of at most {length} tokens"
    words = f"{len(inputs)} of {len(rows)} {form}, seed {seed}"
    return Samples(inputs, SampleRecord(", ".join(hashes), True, hashes, words, None, len(inputs)))


def answer_samples(
    model: Model,
    prompts: Sequence[str],
    answers: Sequence[str],
    record: SampleRecord,
    *,
    sequence: int | None = None,
    chat: bool = False,
) -> Samples:
    """Prompts with their answers as inputs of a causal language model, batch 1: `answer_mask`, int64 (1, S), says which
    tokens are the answer's, its end-of-text token included. Longer ones are cut; those without any answer left go.

    Args:
        record: what the answers are.
        sequence: tokens at most; None takes the example length of the model's sequence axis.
        chat: put the prompts into the model's chat template.

    Raises:
        BadInputError: the model is no causal language model with a tokenizer, or has no chat template; or no input is
            left.
    """
    check_takes_text(model)
    check_generates(model, where="prompts of [compress.data]")
    length = _length(model, sequence)
    tokenizer = open_tokenizer(model.assets["tokenizer.json"], NO_LIMIT)
    _check_vocabulary(model, tokenizer.get_vocab_size(with_added_tokens=True))
    end = end_of_text(model)
    inputs = []
    for prompt, answer in zip(rendered_prompts(model, prompts) if chat else prompts, answers, strict=True):
        # A template writes the special tokens itself.
        asked = tokenizer.encode(prompt, add_special_tokens=not chat).ids
        told = tokenizer.encode(answer, add_special_tokens=False).ids + ([] if end is None else [end])
        ids = [*asked, *told][:length]
        if len(ids) > len(asked):
            mask = np.asarray([[0] * len(asked) + [1] * (len(ids) - len(asked))], np.int64)
            inputs.append({**_arrays(model, ids), "answer_mask": mask})
    if not inputs:
        raise BadInputError(
            f"The prompts leave no room for answers in {length} tokens.",
            where="sequence of [compress.data]",
            next_step="Give shorter prompts, or a larger `sequence`.",
        )
    words = f"{record.slice}; {len(inputs)} of them, cut to {length} tokens"
    return Samples(inputs, replace(record, slice=words, samples=len(inputs)))


def end_of_text(model: Model) -> int | None:
    """The token that ends a text, as the config names it."""
    named: Any = getattr(getattr(model.module, "config", None), "eos_token_id", None)
    return int(named[0]) if isinstance(named, list | tuple) else None if named is None else int(named)


def _length(model: Model, asked: int | None) -> int:
    """Tokens of an input at most.

    Raises:
        BadInputError: the model can't take so many.
    """
    axis = sequence_axis(model)
    if axis is None:
        return model.inputs[0].fixed_shape()[1]
    length = asked or axis.example
    if not axis.minimum <= length <= axis.maximum:
        raise BadInputError(
            f"The model can't take {length} tokens.",
            where="sequence of [compress.data] or [calibration]",
            allowed=f"{axis.minimum} to {axis.maximum}",
        )
    return length


def _windows(model: Model, texts: Iterable[str], length: int) -> list[list[int]]:
    tokenizer = open_tokenizer(model.assets["tokenizer.json"], NO_LIMIT)
    _check_vocabulary(model, tokenizer.get_vocab_size(with_added_tokens=True))
    end = end_of_text(model)
    ids: list[int] = []
    for encoding in tokenizer.encode_batch(list(texts)):
        ids += encoding.ids if end is None else [*encoding.ids, end]
    return [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]


def _parts(model: Model, texts: Iterable[str], length: int) -> list[list[int]]:
    tokenizer = open_tokenizer(model.assets["tokenizer.json"], length)
    _check_vocabulary(model, tokenizer.get_vocab_size(with_added_tokens=True))
    return [part.ids for text in tokenizer.encode_batch(list(texts)) for part in (text, *text.overflowing)]


def _check_vocabulary(model: Model, tokens: int) -> None:
    known = vocabulary_size(model.module)
    if known is not None and tokens > known:
        raise BadInputError(f"The tokenizer knows {tokens} tokens, the model {known}.", where="tokenizer.json")


def _arrays(model: Model, ids: Sequence[int]) -> Arrays:
    row = np.asarray([ids], np.int64)
    arrays = {
        "input_ids": row,
        "attention_mask": np.ones_like(row),
        "token_type_ids": np.zeros_like(row),
        "position_ids": np.arange(row.shape[1], dtype=np.int64)[None],
    }
    return {spec.name: arrays[spec.name] for spec in model.inputs}
