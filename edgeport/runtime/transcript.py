"""Texts out of an encoder-decoder: a recording written down, a text answered by another."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeport.errors import BadInputError
from edgeport.runtime.conversation import Texts
from edgeport.runtime.generate import Generation, Sampling, generate
from edgeport.storage import read_json

if TYPE_CHECKING:
    import numpy as np

    from edgeport.runtime.decoder import EncodedTokens

SETTINGS = "generation_config.json"


def settings(assets: Path) -> Mapping[str, Any]:
    """What the checkpoint says about generating: generation_config.json of a folder, empty where it has none."""
    return read_json(assets / SETTINGS) if (assets / SETTINGS).is_file() else {}


def speech_start(start: tuple[int, ...], texts: Texts, given: Mapping[str, Any], language: str | None) -> list[int]:
    """The tokens that a Whisper transcript begins with: start, language and task if it knows several, no timestamps.

    Args:
        start: the token that begins every text.
        given: the checkpoint's settings.
        language: such as "de"; None takes English.

    Raises:
        BadInputError: the model has no such language, or only one.
    """
    known = texts.tokenizer.get_vocab()
    wanted = []
    if given.get("is_multilingual"):
        wanted += [f"<|{language or 'en'}|>", "<|transcribe|>"]
    elif language not in (None, "en"):
        raise BadInputError("The model knows English only.", where="--language", allowed="en")
    if wanted and wanted[0] not in known:
        raise BadInputError(f"The model knows no language {language!r}.", where="--language", allowed="such as en, de")
    return [*start, *(known[token] for token in (*wanted, "<|notimestamps|>") if token in known)]


def write(
    tokens: EncodedTokens,
    texts: Texts,
    source: np.ndarray,
    start: list[int],
    most: int,
    show: Callable[[str], None],
    *,
    sampling: Sampling,
    given: Mapping[str, Any] | None = None,
) -> Generation:
    """Encode a source and write a text for it, calling `show` with each piece.

    Args:
        source: the encoder's input, batch 1.
        start: tokens that the text begins with; they are not shown.
        most: new tokens at most.
        given: the checkpoint's settings, of which the tokens that must never be written are kept
            (`suppress_tokens`, `begin_suppress_tokens`).

    Raises:
        BadInputError: the source does not fit the encoder, or the start the cache.
    """
    import numpy as np

    never = given or {}
    began = time.perf_counter()
    tokens.encode(source)
    seconds = time.perf_counter() - began
    record, new = generate(
        tokens,
        np.array(start, np.int64),
        most=most,
        stop=texts.stop,
        sampling=sampling,
        never=tuple(never.get("suppress_tokens") or ()),
        never_first=tuple(never.get("begin_suppress_tokens") or ()),
    )
    record.encoder_seconds = seconds
    for piece in texts.stream(new):
        show(piece)
    return record
