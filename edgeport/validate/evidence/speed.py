"""Schemas of how fast the file runs, and of what makes it slow: noise of the machine, parts that no delegate took."""

from __future__ import annotations

from edgeport.formats import CacheFormat
from edgeport.schema import Strict
from edgeport.validate.evidence.quality import FreeText, Interval


class Noise(Strict):
    """What a fixed piece of arithmetic took, run between the timed calls: the machine alone, without any model.

    Attributes:
        runs: of it.
        median_us: wall time of one, microseconds.
        spread: its p90 over its median, minus 1.
        drift: median of the second half of the run over the first's, minus 1.
    """

    runs: int
    median_us: float
    spread: float
    drift: float


class CallTimes(Strict):
    """All timed calls of one artifact, in brief.

    Attributes:
        percentiles_ms: wall time, the 0th to the 100th percentile: 101 numbers.
        course_ms: medians of equal stretches of the run, in order: what drift looks like.
    """

    percentiles_ms: tuple[float, ...]
    course_ms: tuple[float, ...]


class Latency(Strict):
    """Latency as MLPerf's single stream measures it: the next call when the last is done, measured p90.

    Calls alternate with those of the fp32 artifact of the same runtime; without one, what needs it is None.

    Attributes:
        queries: timed calls of each of the two artifacts; seconds: of this one's calls together.
        cores: the processors that the process was held to; empty where the system can't.
        cpu_ms, baseline_cpu_ms: median processor time of a call, all threads of the process: where the
            machine was shared, their ratio says more than the wall times'.
        min_queries_met, min_duration_met: at least 1024 calls, at least 60 s: MLPerf's own two demands.
        valid: False also when the run was too noisy to be a claim; `note` says why.
        p90: of this artifact, ms, with the 95% interval of order statistics.
        ratio: p50 of this artifact / p50 of the baseline, with a bootstrap interval over pairs of calls.
        cpu_ratio: the same of processor time; None with too few calls to say.
        outliers: share of this artifact's calls that took more than twice the median.
        noise: of the machine during the run.
        calls, baseline_calls: how long each of the timed calls took, in brief.
    """

    threads: int
    queries: int
    warmup: int
    seconds: float = 0.0
    cores: tuple[int, ...] = ()
    p50_ms: float
    p90_ms: float
    p90: Interval | None = None
    cpu_ms: float
    baseline_p50_ms: float | None
    baseline_p90_ms: float | None
    baseline_cpu_ms: float | None = None
    ratio: Interval | None
    cpu_ratio: Interval | None = None
    outliers: float = 0.0
    noise: Noise | None = None
    calls: CallTimes | None = None
    baseline_calls: CallTimes | None = None
    min_queries_met: bool = False
    min_duration_met: bool = False
    valid: bool
    note: str
    input_shapes: dict[str, tuple[int, ...]]


class Delegation(Strict):
    """What the file hands over to its delegate, and what it leaves to the runtime's portable kernels.

    Attributes:
        delegate: that the target asks for.
        delegates: parts of the file that it runs.
        kernels: called outside of them, "namespace::name.overload".
    """

    delegate: str
    delegates: int
    kernels: tuple[str, ...]


class GenerationRate(Strict):
    """Speed with a text of some length in the cache; wall time, and processor time of the same calls.

    Attributes:
        length: tokens in the cache.
        first_token_ms, prefill_tokens_per_s, prefill_cpu_ms: reading them at once into an empty cache. The first has an
            encoder's time in it, where there is one.
        decode_tokens_per_s, decode_cpu_ms: one more token (median).
    """

    length: int
    first_token_ms: float
    prefill_tokens_per_s: float
    prefill_cpu_ms: float
    decode_tokens_per_s: float
    decode_cpu_ms: float


class Generation(Strict):
    """How a decoder generates (`edgeport.validate.generation`).

    Attributes:
        context: tokens that the cache holds.
        cache: what it keeps keys and values as.
        cache_bytes: of its buffers, full or not.
        long_tokens: of the long text; long_cosine, long_kl: its last scores token by token against all at once.
        rates: at several lengths; empty in a reference evaluator.
        encoder_ms: wall time of the encoder, which runs before the first token; absent without one.
        free_text: absent without an encoder, where the original is not at hand, and where it ends no text.
    """

    context: int
    cache: CacheFormat = "float"
    cache_bytes: int
    long_tokens: int
    long_cosine: float
    long_kl: float
    rates: tuple[GenerationRate, ...] = ()
    encoder_ms: float | None = None
    free_text: FreeText | None = None
