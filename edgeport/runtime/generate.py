"""Generate tokens with a decoder and its cache: greedy or sampled, one at a time."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from edgeport.errors import BadInputError

if TYPE_CHECKING:
    import numpy as np

    from edgeport.runtime.decoder import Tokens

Finish = Literal["stop", "length", "context"]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen from its scores.

    Attributes:
        temperature: scores are divided by it; 0 takes the best token always (greedy).
        top_k: only the k best can be chosen.
        top_p: only the fewest tokens whose shares together reach p (nucleus; Holtzman et al., 2020).
        seed: of the draws: the same one gives the same tokens.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        checks = (
            ("--temperature", self.temperature, self.temperature >= 0, "0 (greedy) or above"),
            ("--top-k", self.top_k, self.top_k is None or self.top_k >= 1, "1 or more"),
            ("--top-p", self.top_p, self.top_p is None or 0 < self.top_p <= 1, "above 0, at most 1"),
        )
        for where, value, fits, allowed in checks:
            if not fits:
                raise BadInputError(f"{value} is out of range.", where=where, allowed=allowed)


def probabilities(scores: np.ndarray, sampling: Sampling) -> np.ndarray:
    """The shares (V,) float64 that a token is drawn with; they sum to 1. Ties at the border of top-k all stay."""
    import numpy as np
    from scipy.special import softmax  # type: ignore[import-untyped]

    values = scores.astype(np.float64) / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < len(values):
        border = np.partition(values, -sampling.top_k)[-sampling.top_k]
        values = np.where(values >= border, values, -np.inf)
    shares: np.ndarray = softmax(values)
    if sampling.top_p is not None and sampling.top_p < 1:
        order = np.argsort(-shares, kind="stable")
        before = np.cumsum(shares[order]) - shares[order]
        shares[order[before >= sampling.top_p]] = 0.0
        shares /= shares.sum()
    return shares


def choose(scores: np.ndarray, sampling: Sampling, generator: np.random.Generator) -> int:
    """The next token, given the scores (V,) of all."""
    import numpy as np

    if sampling.temperature == 0:
        return int(np.argmax(scores))
    return int(generator.choice(len(scores), p=probabilities(scores, sampling)))


@dataclass
class Generation:
    """A running or finished generation.

    Attributes:
        prompt: tokens fed before the first new one (those already in the cache are not counted).
        ids: the new tokens, a stop token left out.
        finish: why it ended; None while it runs, or when it was left.
        first_seconds: from the start to the first new token (reading the prompt).
        decode_seconds: for the tokens after the first.
        encoder_seconds: of an encoder that ran before; in no other number.
    """

    prompt: int
    ids: list[int] = field(default_factory=list)
    finish: Finish | None = None
    first_seconds: float = 0.0
    decode_seconds: float = 0.0
    encoder_seconds: float = 0.0
    steps: int = 0

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens a second."""
        return self.prompt / self.first_seconds if self.first_seconds else 0.0

    @property
    def decode_rate(self) -> float:
        """New tokens a second after the first; 0 when there was none."""
        return self.steps / self.decode_seconds if self.decode_seconds else 0.0


def generate(
    tokens: Tokens,
    prompt: np.ndarray,
    *,
    most: int,
    stop: frozenset[int] = frozenset(),
    sampling: Sampling = Sampling(),
    never: Sequence[int] = (),
    never_first: Sequence[int] = (),
) -> tuple[Generation, Iterator[int]]:
    """Feed a prompt to what the cache holds and go on from there.

    Args:
        prompt: int64 (S,), at least one token.
        most: new tokens at most.
        stop: tokens that end the text; they are not part of it.
        never, never_first: tokens that can't be chosen at all, and not as the first one.

    Returns:
        The record, filled while the iterator is consumed, and the iterator over new tokens.

    Raises:
        BadInputError: the prompt is empty or does not fit (when the first token is asked for).
    """
    record = Generation(prompt=len(prompt))
    return record, _steps(tokens, prompt, most, stop, sampling, record, (list(never), [*never, *never_first]))


def _steps(
    tokens: Tokens,
    prompt: np.ndarray,
    most: int,
    stop: frozenset[int],
    sampling: Sampling,
    record: Generation,
    banned: tuple[list[int], list[int]],
) -> Iterator[int]:
    import numpy as np

    generator = np.random.default_rng(sampling.seed)
    start = time.perf_counter()
    scores = tokens.feed(prompt)
    record.first_seconds = time.perf_counter() - start
    while True:
        scores[banned[not record.ids]] = -np.inf
        token = choose(scores, sampling, generator)
        if token in stop:
            record.finish = "stop"
            return
        record.ids.append(token)
        yield token
        if len(record.ids) >= most:
            record.finish = "length"
            return
        if tokens.length >= tokens.context:
            record.finish = "context"
            return
        start = time.perf_counter()
        scores = tokens.feed(np.array([token], np.int64))
        record.decode_seconds += time.perf_counter() - start
        record.steps += 1
