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
from edgeport.validate.evidence import Generation, GenerationRate
from edgeport.validate.parity import divergence

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np

    from edgeport.export.artifact import Artifact
    from edgeport.runtime.decoder import Tokens

LENGTHS = (32, 512, 2048)
LONG, LONG_QUICK, LONG_REFERENCE = 512, 96, 24
"""Tokens of the long check: whole, with --quick, and in a reference evaluator."""
STEPS, STEPS_QUICK = 16, 4
CACHE_BYTES = {"onnxruntime": 4, "executorch": 4, "coreml": 2}
"""Of one number in a runtime's cache: Core ML's states are float16, whatever the arithmetic."""
LEAST_COSINE = 0.99
"""Of the two score vectors. One position off gives 0.9 and less; 8-bit rounding was seen to leave 0.998."""


def text_of(samples: Sequence[Mapping[str, np.ndarray]], length: int) -> np.ndarray:
    """`length` tokens of the samples' texts, one behind the other, from the start again where they run out."""
    import numpy as np

    row = np.concatenate([sample["input_ids"].reshape(-1) for sample in samples])
    return np.resize(row, length)


def _rate(tokens: Tokens, ids: np.ndarray, length: int, steps: int) -> GenerationRate:
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
        first_token_ms=first * 1e3,
        prefill_tokens_per_s=length / first,
        prefill_cpu_ms=first_cpu * 1e3,
        decode_tokens_per_s=1 / step,
        decode_cpu_ms=step_cpu * 1e3,
    )


def measure_generation(
    artifact: Artifact,
    samples: Sequence[Mapping[str, np.ndarray]],
    *,
    cache_values: int,
    threads: int = 1,
    quick: bool = False,
    watch: Callable[[str], None] = lambda _detail: None,
) -> Generation:
    """Measure a decoder's file.

    Args:
        samples: real texts, `input_ids`.
        cache_values: numbers that one token leaves in the cache.
        watch: told what is being measured.

    Raises:
        MeasurementError: the scores are not finite.
        BadInputError: the artifact has no cache.
    """
    import numpy as np

    from edgeport.runtime.session import open_tokens

    tokens = open_tokens(artifact, threads=threads)
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
    for length in LENGTHS if tokens.vendor_kernels else ():
        if length < room and (not quick or length == LENGTHS[0]):
            watch(f"speed at {length} tokens")
            rates.append(_rate(tokens, ids, length, STEPS_QUICK if quick else STEPS))
    return Generation(
        context=room,
        cache_bytes_per_token=cache_values * CACHE_BYTES[artifact.runtime],
        long_tokens=long,
        long_cosine=float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b))),
        long_kl=max(divergence(a[None], b[None]), 0.0),
        rates=tuple(rates),
    )
