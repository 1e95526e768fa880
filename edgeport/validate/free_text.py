"""What an encoder-decoder writes by itself, beside what the original writes.

Scores are compared on texts that are given, word by word: a model can do well there and still go round in circles on
its own. Whisper tiny.en in 4 bits kept 88% of the most likely tokens and wrote "Hello." a hundred times over half a
minute of conversation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from edgeport.validate.evidence import FreeText

if TYPE_CHECKING:
    import numpy as np

    from edgeport.runtime.decoder import EncodedTokens

SOURCES, MOST = 8, 96
"""Inputs tried, and new tokens of each at most."""
MOST_ERROR = 0.25
"""Share of the original's tokens that may have to be changed, and of its texts that may not end. Of five-second windows
of a telephone conversation, cut in the middle of words, Whisper tiny.en in 8 bits changes 13% and in 4 bits 39%."""


def original_text(
    module: Any, source: np.ndarray, start: Sequence[int], stop: frozenset[int], rules: Mapping[str, Any], most: int
) -> list[int]:
    """What the original writes greedily, its stop token included.

    Args:
        module: of transformers.
        source: the encoder's input, batch 1.
        rules: `suppress_tokens` and `begin_suppress_tokens`, where the checkpoint has them.
        most: new tokens.
    """
    import torch
    from transformers import GenerationMixin

    ids = torch.tensor([list(start)])
    with torch.inference_mode():
        # Whisper's class has a longer one of its own, which writes recordings of any length.
        answer = GenerationMixin.generate(
            module,
            torch.from_numpy(source),
            decoder_input_ids=ids,
            max_new_tokens=most,
            do_sample=False,
            num_beams=1,
            eos_token_id=sorted(stop) or None,
            **rules,
        )
    return [int(token) for token in answer[0, ids.shape[1] :]]


def edits(wanted: Sequence[int], found: Sequence[int]) -> int:
    """Tokens to insert, delete or replace (Levenshtein 1966)."""
    row = list(range(len(found) + 1))
    for at, want in enumerate(wanted, 1):
        before, row[0] = row[0], at
        for place, token in enumerate(found, 1):
            before, row[place] = row[place], min(row[place] + 1, row[place - 1] + 1, before + (token != want))
    return row[-1]


def compare_texts(
    tokens: EncodedTokens,
    sources: Sequence[np.ndarray],
    original: Callable[[np.ndarray], list[int]],
    *,
    start: Sequence[int],
    stop: frozenset[int],
    never: Sequence[int] = (),
    never_first: Sequence[int] = (),
    most: int = MOST,
) -> FreeText | None:
    """Have both write for the first few sources, greedily.

    Texts that the original itself does not end are left out: a model that never stops is no yardstick.

    Args:
        original: gives the original's tokens for a source, with its stop token.
        most: new tokens.

    Returns:
        None where the original ends no text.
    """
    import numpy as np

    from edgeport.runtime.generate import generate

    wrong, same, unended, counts = 0, 0, 0, []
    for source in sources[:SOURCES]:
        wanted = original(source)
        if not wanted or wanted[-1] not in stop:
            continue
        tokens.encode(source)
        record, new = generate(
            tokens, np.array(start, np.int64), most=most, stop=stop, never=never, never_first=never_first
        )
        found = list(new)
        wrong += edits(wanted[:-1], found)
        same += wanted[:-1] == found
        unended += record.finish != "stop"
        counts.append(len(wanted) - 1)
    if not counts:
        return None
    return FreeText(texts=len(counts), tokens=sum(counts), edits=wrong, equal=same, unended=unended)
