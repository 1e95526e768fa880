"""Evidence: what was measured on the shipped file, by whom, when, and how far it can be trusted.

These schemas are `evidence.json`. A number that was not measured is absent, never zero; the field
beside it says why.

`edgeport.validate.run.measure` makes `Measurements`; `edgeport.gate.judge` reads them against a recipe's
budgets and gives the `Verdict`; `edgeport.gate.conclude` puts the two together as `Evidence`.
"""

from __future__ import annotations

from typing import Literal

from edgeport.formats import CacheFormat
from edgeport.schema import Strict
from edgeport.units import MetricUnit

State = Literal["yes", "no", "failed"]


class States(Strict):
    """Three claims kept apart.

    Attributes:
        lowered: the file was written and loads.
        executed_here: "runtime" (the very runtime), "reference" (edgeport's evaluator), or "none".
        numerics_verified: outputs of the file were compared with the uncompressed torch model; "failed"
            when the comparison was made and went outside the gate's parity budgets, "no" when not made.
            It is the gate's to say: before the gate has judged (`Measurements`) it is "no".
        statement: the same in words, as the report prints it.
    """

    lowered: State
    executed_here: Literal["runtime", "reference", "none"]
    numerics_verified: State
    statement: str


class DataRecord(Strict):
    """The inputs that a measurement used.

    Attributes:
        name: data card, or "synthetic".
        real: real data; False for random tensors.
        sha256: of the data file, by name.
        slice: which samples, in words.
        licence: SPDX id.
        samples: how many.
    """

    name: str
    real: bool
    sha256: dict[str, str]
    slice: str
    licence: str | None
    samples: int


class Interval(Strict):
    """A mean with a 95% confidence interval over n samples, unit in the field's name.

    The interval is a bootstrap over samples (edgeport/validate/intervals.py). With n = 1 there is nothing
    to resample: low and high equal the mean and say nothing about the spread.
    """

    mean: float
    low: float
    high: float
    n: int


class OutputParity(Strict):
    """One output of the file against the uncompressed torch model, over all samples, padding left out.

    Where the artifact's output is not finite, no number can be computed: `finite` is False and the
    numbers are absent.

    Attributes:
        max_abs: largest absolute difference, in the output's own unit.
        relative_l2: ||difference|| / ||reference|| over everything.
        cosine: mean cosine similarity a sample, with interval; over all samples at once where a sample
            is a single number. cosine_worst: the least of all samples.
        top1_agreement: share of equal argmax over the classes (classifiers and language models).
        kl: mean KL(reference || artifact), nats (classifiers and language models).
        positions: argmax comparisons made; absent where the output is no distribution over classes.
        finite: every value of the artifact's output is finite.
        varies: False when the artifact gives one constant value, or the same output for every sample,
            where the original does not.
    """

    output: str
    max_abs: float | None
    relative_l2: float | None
    cosine: Interval | None
    cosine_worst: float | None
    top1_agreement: Interval | None = None
    kl: Interval | None = None
    positions: int | None = None
    finite: bool
    varies: bool = True


class TaskScore(Strict):
    """One metric of a suite: original and artifact on the same samples (`edgeport.validate.tasks.score_task`).

    The scores themselves are kept, one a sample, so that the gate can hold any margin against them, and a later
    bundle can be compared with this one sample by sample.

    Attributes:
        suite, metric: names; a suite's first metric is its main one.
        unit: of the scores; higher_is_better: their direction (False for an error rate).
        chance: score of an answer that knows nothing; None where there is no such thing.
        n: samples.
        original, artifact: the scores' means; None where a score is not finite.
        difference: artifact minus original, paired, with a two-sided 95% interval.
        worse, better: samples on which the artifact scored worse or better than the original.
        mcnemar_p: exact test of equal right-or-wrong scores; None for other scores.
        baseline_problem: why the original's own score is no yardstick; None when it is one.
        original_scores, artifact_scores: one a sample; a score that is not finite is None.
        rows: which rows of the suite's evaluation slice the samples are, from 0; None where they are no rows.
        original_answers, artifact_answers: one a sample, None where the suite has no answers.
        confidence: the original's probability of its own answer; None where it gives none.
        weights: of the samples in the mean; None when all count alike.
        data: the samples.
    """

    suite: str
    metric: str
    unit: MetricUnit
    higher_is_better: bool = True
    chance: float | None = None
    n: int
    original: Interval | None
    artifact: Interval | None
    difference: Interval | None
    worse: int
    better: int
    mcnemar_p: float | None = None
    baseline_problem: str | None = None
    original_scores: tuple[float | None, ...]
    artifact_scores: tuple[float | None, ...]
    weights: tuple[float, ...] | None = None
    rows: tuple[int, ...] | None = None
    original_answers: tuple[str, ...] | None = None
    artifact_answers: tuple[str, ...] | None = None
    confidence: tuple[float | None, ...] | None = None
    data: DataRecord


class WeightCheck(Strict):
    """The weights in the file against the logical ones, bit for bit.

    Attributes:
        checked: logical tensors looked for in the file; 0 only when nothing was compressed.
        equal: those with the same codes, the same scales and the same dequantised values.
        different: "name: what differs" for the rest, and for compressed tensors that only the file has.
        unused: compressed weights that no exported output depends on, so that the exporter left them out.
    """

    checked: int
    equal: int
    different: tuple[str, ...]
    unused: tuple[str, ...] = ()


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


class Memory(Strict):
    """Measured in a fresh process that only loads the file and runs it once.

    Attributes:
        peak_rss_mb: most memory ever resident in that process (VmHWM on Linux), MB (1e6 bytes).
        runtime_rss_mb: resident after importing the runtime, before loading the file.
        baseline_peak_rss_mb: the same for the fp32 artifact.
        load_ms: time to load the file, which the system had in memory.
        cold_load_ms: the same after the system was made to forget the file; None where it can't be.
        first_run_ms: time of the first inference.
        tokens: that a decoder read meanwhile: as many as its cache holds.
    """

    peak_rss_mb: float
    runtime_rss_mb: float
    baseline_peak_rss_mb: float | None
    load_ms: float
    cold_load_ms: float | None = None
    first_run_ms: float
    tokens: int | None = None


class MemoryPlan(Strict):
    """What the file was planned to take of a device's memory (`edgeport.device_memory`), bytes. What it took of this
    machine's, beside the runtime's own code, is `Memory.peak_rss_mb - Memory.runtime_rss_mb`.

    Attributes:
        context: tokens that the cache holds; None without a cache.
        weights_bytes: of the file.
        cache_bytes: of keys and values, when the cache is full.
        activations_bytes: of the largest call; None where it can't be counted.
        activations_from: "planned arena" where the file itself says so.
        loading_bytes: estimate of what loading takes beside.
        ram_bytes: of the target's device; None where the target's file does not say.
        longest_context: the largest context, up to the one asked for, that fits into it; 0 where none does.
    """

    context: int | None
    weights_bytes: int
    cache_bytes: int
    activations_bytes: int | None
    activations_from: Literal["estimate", "planned arena"]
    loading_bytes: int
    total_bytes: int
    ram_bytes: int | None
    longest_context: int | None


class Size(Strict):
    """Bytes on disk of the model file(s) alone, and of the fp32 artifact of the same runtime.

    `baseline_bytes` and `ratio` are absent where there is no such artifact to compare with.
    """

    bytes: int
    baseline_bytes: int | None
    ratio: float | None
    predicted_bytes: int | None = None


class Work(Strict):
    """What one inference has to do (`edgeport.validate.work`), and what the machine that measured can do.

    Attributes:
        input_shapes: counted at; of a decoder with a cache the text before the one token that is counted.
        flops: operations, 2 for a multiply-add.
        weight_bytes: of the file that one inference reads; activation_bytes: that layers with weights read and give, in
            float32; cache_bytes: a decoder's keys and values.
        peak_gflops, bandwidth_gb_s: of the machine, with the threads of the latency run; None where it runs no such
            file.
    """

    input_shapes: dict[str, tuple[int, ...]]
    flops: int
    weight_bytes: int
    activation_bytes: int
    cache_bytes: int = 0
    peak_gflops: float | None = None
    bandwidth_gb_s: float | None = None

    @property
    def moved_bytes(self) -> int:
        """All of them."""
        return self.weight_bytes + self.activation_bytes + self.cache_bytes


class Products(Strict):
    """Operations of the products with weights in one call, 2 for a multiply-add (`edgeport.validate.products`).

    Attributes:
        input_shapes: counted at.
        file: as the shipped file makes them; model: as the compressed torch model does.
    """

    input_shapes: dict[str, tuple[int, ...]]
    file: int
    model: int


class CompressionCost(Strict):
    """What compressing the model took, where it was compressed; the stage cache keeps it with the weights.

    Attributes:
        cpu_seconds: processor time of all threads.
        start_rss_mb: resident when it began, with the libraries and the float model, MB (1e6 bytes).
        peak_rss_mb: most memory resident meanwhile; absent where the system can't tell it from a higher peak before.
        weights: how many were quantized.
        weights_before: how many of them an interrupted run had finished; their cost is not in here.
        samples: calibration inputs; 0 for a method that needs none.
        tokens: of these inputs together; absent for other inputs than text.
    """

    cpu_seconds: float
    start_rss_mb: float | None
    peak_rss_mb: float | None
    weights: int
    weights_before: int
    samples: int
    tokens: int | None


class Check(Strict):
    """One line of the gate.

    Attributes:
        metric: the budget's name in the recipe; "regression." before it where an older bundle is the measure.
        output: the output or the suite that it is about.
        measured, allowed: in `unit`; measured is None when it could not be measured.
        low, high: how far `measured` can be trusted, where it comes with an interval; n: over how many samples.
        passed: False also when it could not be measured: the gate fails closed.
        undecided: measured, but the interval holds the budget: no answer at the stated confidence.
        needed: samples that would decide.
        exit_code: the code this check fails with.
        advice: the first thing to try.
    """

    metric: str
    output: str | None = None
    measured: float | None
    allowed: float
    unit: str = ""
    low: float | None = None
    high: float | None = None
    n: int | None = None
    passed: bool
    undecided: bool = False
    needed: int | None = None
    exit_code: int
    message: str
    advice: str

    @property
    def outcome(self) -> Literal["passed", "failed", "undecided", "not measured"]:
        """What became of it, in words."""
        if self.passed:
            return "passed"
        return "undecided" if self.undecided else "not measured" if self.measured is None else "failed"


class Verdict(Strict):
    """The gate's answer. `exit_code` is 0, or the lowest code of the failed checks.

    Attributes:
        notes: what was not judged, and why that is no failure.
    """

    passed: bool
    exit_code: int
    checks: tuple[Check, ...]
    notes: tuple[str, ...] = ()


class Machine(Strict):
    """Where and with what the measurement was made."""

    platform: str
    cpu: str
    cores: int
    memory_gb: float
    python: str
    versions: dict[str, str]


class TokenizerParity(Strict):
    """One tokenizer implementation on the bundle's own files, against the original tokenizer.

    Attributes:
        implementation: the package that brings it.
        device: it is what the artifact's runtime uses on a device.
        version: of the package; None when it is not installed.
        texts, templates: texts split, and conversations rendered by the chat template.
        different: how many came out differently; examples: the first of them, in words.
        absent: why it was not tried; failed: why it could not read the files.
    """

    implementation: str
    device: bool
    version: str | None = None
    texts: int = 0
    templates: int = 0
    different: int = 0
    examples: tuple[str, ...] = ()
    absent: str | None = None
    failed: str | None = None


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


class FreeText(Strict):
    """What an encoder-decoder writes greedily beside what the original writes (`edgeport.validate.free_text`).

    Attributes:
        texts: that the original ended by itself; tokens: of the original's texts together.
        edits: tokens to insert, delete or replace until the artifact's texts are the original's.
        equal: texts that are the original's; unended: those that went on to the limit.
    """

    texts: int
    tokens: int
    edits: int
    equal: int
    unended: int


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


class Measurements(Strict):
    """Everything measured about one artifact, before the gate has judged it."""

    schema_version: Literal[1] = 1
    measured_at: str
    machine: Machine
    manifest_sha256: str | None = None
    states: States
    data: DataRecord
    parity: tuple[OutputParity, ...]
    weights: WeightCheck | None
    delegation: Delegation | None = None
    size: Size
    latency: Latency | None
    latency_absent: str | None = None
    memory: Memory | None
    memory_absent: str | None = None
    memory_plan: MemoryPlan | None = None
    work: Work | None = None
    products: Products | None = None
    compression: CompressionCost | None = None
    tokenizers: tuple[TokenizerParity, ...] = ()
    generation: Generation | None = None
    tasks: tuple[TaskScore, ...] = ()


class Evidence(Measurements):
    """Everything measured about one artifact, and what the gate says of it."""

    verdict: Verdict
