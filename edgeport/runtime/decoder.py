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

IDS, TARGET_IDS, LOGITS = "input_ids", "decoder_input_ids", "logits"


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


class EncodedTokens(Tokens, Protocol):
    """A loaded encoder-decoder: tokens are fed for what was encoded last."""

    source: str
    """Name of the encoder's input."""

    def encode(self, source: np.ndarray) -> None:
        """Run the encoder on its input, and forget all tokens.

        Raises:
            BadInputError: the input does not fit.
        """


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

        ids = self._begin(inputs)
        split = len(ids) - min(self.scored, len(ids)) + 1
        rows = [self.tokens.feed(ids[:split])]
        rows += [self.tokens.feed(ids[at : at + 1]) for at in range(split, len(ids))]
        return {LOGITS: np.stack(rows)[None]}

    def step(self, inputs: Mapping[str, np.ndarray]) -> Callable[[], None]:
        """Read all of a text but its last token; what is returned decodes that one, as often as it is called."""
        ids = self._begin(inputs)
        if len(ids) > 1:
            self.tokens.feed(ids[:-1])
        held = self.tokens.length

        def decode() -> None:
            self.tokens.rewind(held)
            self.tokens.feed(ids[-1:])

        return decode

    def _begin(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        """Empty the cache; the text's tokens, int64 (S,)."""
        check_names(inputs, {IDS})
        self.tokens.rewind()
        return row_of(IDS, inputs[IDS])


class EncoderDecoderSession(DecoderSession):
    """A Session over an encoder and the cache of its decoder. What `step` returns decodes: the encoder ran before."""

    def __init__(self, tokens: EncodedTokens, scored: int) -> None:
        super().__init__(tokens, scored)
        self.encoded = tokens

    def _begin(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        check_names(inputs, {self.encoded.source, TARGET_IDS})
        self.encoded.encode(inputs[self.encoded.source])
        return row_of(TARGET_IDS, inputs[TARGET_IDS])


def check_names(inputs: Mapping[str, np.ndarray], names: set[str]) -> None:
    """Refuse inputs of other names.

    Raises:
        BadInputError: one is missing or unknown.
    """
    if set(inputs) != names:
        raise BadInputError("The inputs' names don't fit.", where=", ".join(sorted(inputs)), allowed=sorted(names))


def row_of(name: str, value: np.ndarray) -> np.ndarray:
    """One row of token ids as int64 (S,).

    Raises:
        BadInputError: it is something else.
    """
    import numpy as np

    ids = np.asarray(value)
    if ids.ndim != 2 or ids.shape[0] != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise BadInputError(f"The input has the shape {ids.shape}.", where=name, allowed="one row of token ids")
    row: np.ndarray = ids[0].astype(np.int64)
    return row
