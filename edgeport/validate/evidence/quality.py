"""Schemas of what the file answers: parity with the original, scores of suites, weights, tokens, texts."""

from __future__ import annotations

from edgeport.schema import Strict
from edgeport.units import MetricUnit
from edgeport.validate.evidence.origin import DataRecord


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
