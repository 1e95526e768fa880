"""How a decoder generates: speed of reading and of writing at several lengths, and whether a long cache stays right.

The long check feeds a text token by token and, into an empty cache, at once. Both must score the next token alike: a
cache that goes wrong with length (a window, a position, an overwritten row) shows here and in no short text. Files with
8-bit activations do not agree to the last digit, because a value near a rounding boundary may fall on either side.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from edgeport.errors import MeasurementError
from edgeport.runtime.decoder import IDS, TARGET_IDS
from edgeport.validate.evidence import Generation, GenerationRate
from edgeport.validate.parity import divergence

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np

    from edgeport.export.artifact import Artifact
    from edgeport.formats import CacheFormat
    from edgeport.runtime.decoder import EncodedTokens, Tokens

LENGTHS = (32, 512, 2048)
LENGTHS_ENCODED = (4, 32, 256)
"""Of a decoder beside an encoder, which begins with a few tokens and writes short texts."""
LONG, LONG_QUICK, LONG_REFERENCE = 512, 96, 24
"""Tokens of the long check: whole, with --quick, and in a reference evaluator."""
STEPS, STEPS_QUICK = 16, 4
ENCODINGS = 3
LEAST_COSINE = 0.99
"""Of the two score vectors. One position off gives 0.9 and less; 8-bit rounding was seen to leave 0.998."""


def text_of(samples: Sequence[Mapping[str, np.ndarray]], length: int) -> np.ndarray:
    """`length` tokens of the samples' texts, one behind the other, from the start again where they run out.

    Of an encoder-decoder the texts that were written.
    """
    import numpy as np

    name = TARGET_IDS if TARGET_IDS in samples[0] else IDS
    row = np.concatenate([sample[name].reshape(-1) for sample in samples])
    return np.resize(row, length)


def full_cache(samples: Sequence[Mapping[str, np.ndarray]], context: int) -> dict[str, np.ndarray]:
    """A text that fills the cache; behind the first sample's input where that is encoded before."""
    if TARGET_IDS not in samples[0]:
        return {IDS: text_of(samples, context)[None]}
    return {**samples[0], TARGET_IDS: text_of(samples, context)[None]}


def _rate(tokens: Tokens, ids: np.ndarray, length: int, steps: int, encoder_ms: float) -> GenerationRate:
    """Times at `length` tokens: reading them into an empty cache, then one more, several times."""
    tokens.rewind()
    start, cpu = time.perf_counter(), time.process_time()
    tokens.feed(ids[:length])
    first, first_cpu = time.perf_counter() - start, time.process_time() - cpu
    wall, processor = [], []
    for _ in range(steps):
        tokens.rewind(length)
        start, cpu = time.perf_counter(), time.process_time()
        tokens.feed(ids[length : length + 1])
        wall.append(time.perf_counter() - start)
        processor.append(time.process_time() - cpu)
    step, step_cpu = statistics.median(wall), statistics.median(processor)
    return GenerationRate(
        length=length,
        first_token_ms=first * 1e3 + encoder_ms,
        prefill_tokens_per_s=length / first,
        prefill_cpu_ms=first_cpu * 1e3,
        decode_tokens_per_s=1 / step,
        decode_cpu_ms=step_cpu * 1e3,
    )


def _encoded(
    artifact: Artifact, samples: Sequence[Mapping[str, np.ndarray]], threads: int
) -> tuple[EncodedTokens, float]:
    """An encoder-decoder that has encoded the first sample, and the milliseconds that took: the median of a few."""
    from edgeport.runtime.session import open_encoded

    tokens = open_encoded(artifact, threads=threads)
    wall = []
    for _ in range(ENCODINGS + 1):
        start = time.perf_counter()
        tokens.encode(samples[0][tokens.source])
        wall.append(time.perf_counter() - start)
    return tokens, statistics.median(wall[1:]) * 1e3


def measure_generation(
    artifact: Artifact,
    samples: Sequence[Mapping[str, np.ndarray]],
    *,
    cache: CacheFormat = "float",
    threads: int = 1,
    quick: bool = False,
    watch: Callable[[str], None] = lambda _detail: None,
) -> Generation:
    """Measure a decoder's file.

    Args:
        samples: real texts, `input_ids`.
            Those of an encoder-decoder hold its input as well.
        cache: what it keeps keys and values as.
        watch: told what is being measured.

    Raises:
        MeasurementError: the scores are not finite.
        BadInputError: the artifact has no cache.
    """
    import numpy as np

    from edgeport.runtime.session import open_tokens

    tokens: Tokens
    encoder_ms, lengths = None, LENGTHS
    if artifact.encoder is None:
        tokens = open_tokens(artifact, threads=threads)
    else:
        watch("the encoder")
        tokens, encoder_ms = _encoded(artifact, samples, threads)
        lengths = LENGTHS_ENCODED
    room = tokens.context
    wanted = LONG_REFERENCE if not tokens.vendor_kernels else LONG_QUICK if quick else LONG
    long = min(wanted, room)
    ids = text_of(samples, room)
    watch(f"a cache of {long} tokens")
    tokens.rewind()
    for at in range(long):
        grown = tokens.feed(ids[at : at + 1])
    tokens.rewind()
    whole = tokens.feed(ids[:long])
    if not (np.isfinite(grown).all() and np.isfinite(whole).all()):
        raise MeasurementError("The scores after a long text are not finite.", where=artifact.entry)
    a, b = whole.astype(np.float64), grown.astype(np.float64)
    rates = []
    for length in lengths if tokens.vendor_kernels else ():
        if length < room and (not quick or length == lengths[0]):
            watch(f"speed at {length} tokens")
            rates.append(_rate(tokens, ids, length, STEPS_QUICK if quick else STEPS, encoder_ms or 0.0))
    return Generation(
        context=room,
        cache=cache,
        cache_bytes=int(artifact.facts["cache_bytes"]),
        long_tokens=long,
        long_cosine=float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b))),
        long_kl=max(divergence(a[None], b[None]), 0.0),
        rates=tuple(rates),
        encoder_ms=encoder_ms,
    )
