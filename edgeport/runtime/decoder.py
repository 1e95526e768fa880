"""A language model with a cache, as every runtime offers it, and as a Session.

`Tokens` is what generation needs: feed tokens, get the scores of the next one. `DecoderSession` makes a Session of it
that reads a text the way a device does, a prompt at once and then token by token, so that whatever is measured through
a Session (parity, memory, latency) is measured through the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Protocol

from edgeport.errors import BadInputError

if TYPE_CHECKING:
    import numpy as np

IDS, LOGITS = "input_ids", "logits"


class Tokens(Protocol):
    """A loaded decoder and its cache.

    Attributes:
        name, vendor_kernels: as of a Session.
        context: tokens that the cache holds.
        length: tokens in it now.
    """

    name: str
    vendor_kernels: bool
    context: int
    length: int

    def feed(self, ids: np.ndarray) -> np.ndarray:
        """Append tokens, int64 (S,), and return the scores of the one that follows, float32 (V,).

        Raises:
            BadInputError: there are none, they don't fit the cache any more, or one is not in the vocabulary.
        """

    def rewind(self, length: int = 0) -> None:
        """Forget all tokens but the first `length`."""


def check_tokens(tokens: Tokens, ids: np.ndarray, vocabulary: int) -> None:
    """Refuse what `feed` can't take.

    Raises:
        BadInputError: see `Tokens.feed`.
    """
    if ids.ndim != 1 or len(ids) == 0:
        raise BadInputError(f"The tokens have the shape {tuple(ids.shape)}.", where=IDS, allowed="one row, not empty")
    if tokens.length + len(ids) > tokens.context:
        raise BadInputError(
            f"{len(ids)} tokens don't fit: the cache holds {tokens.context} and has {tokens.length}.",
            where=IDS,
            allowed=f"at most {tokens.context - tokens.length} tokens",
            next_step="Give a shorter text, or export with a larger --context.",
        )
    if int(ids.min()) < 0 or int(ids.max()) >= vocabulary:
        raise BadInputError("A token is not in the vocabulary.", where=IDS, allowed=f"0 to {vocabulary - 1}")


class DecoderSession:
    """A Session over a cache. See `edgeport.runtime.session.Session`."""

    def __init__(self, tokens: Tokens, scored: int) -> None:
        self.tokens, self.scored = tokens, scored
        self.name, self.vendor_kernels = tokens.name, tokens.vendor_kernels

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Read one text, `input_ids` (1, S), into an empty cache.

        Returns:
            `logits` (1, min(S, scored), V): after the prompt, and after each of the tokens that follow it one by one.
        """
        import numpy as np

        ids = self._row(inputs)
        split = len(ids) - min(self.scored, len(ids)) + 1
        self.tokens.rewind()
        rows = [self.tokens.feed(ids[:split])]
        rows += [self.tokens.feed(ids[at : at + 1]) for at in range(split, len(ids))]
        return {LOGITS: np.stack(rows)[None]}

    def step(self, inputs: Mapping[str, np.ndarray]) -> Callable[[], None]:
        """Read all of a text but its last token; what is returned decodes that one, as often as it is called."""
        ids = self._row(inputs)
        self.tokens.rewind()
        if len(ids) > 1:
            self.tokens.feed(ids[:-1])
        held = self.tokens.length

        def decode() -> None:
            self.tokens.rewind(held)
            self.tokens.feed(ids[-1:])

        return decode

    def _row(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        import numpy as np

        if set(inputs) != {IDS}:
            raise BadInputError("The inputs' names don't fit.", where=", ".join(sorted(inputs)), allowed=IDS)
        ids = np.asarray(inputs[IDS])
        if ids.ndim != 2 or ids.shape[0] != 1 or not np.issubdtype(ids.dtype, np.integer):
            raise BadInputError(f"The input has the shape {ids.shape}.", where=IDS, allowed="one row of token ids")
        row: np.ndarray = ids[0].astype(np.int64)
        return row
