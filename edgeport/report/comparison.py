"""What a page about several bundles says: the types. `edgeport.report.compare` fills them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from edgeport.units import MetricUnit
from edgeport.validate.evidence import Evidence, Interval

Answer = Literal["better", "worse", "no difference shown"]


@dataclass(frozen=True)
class Candidate:
    """One bundle to compare.

    Attributes:
        label: short, and unlike the others'.
        manifest: `Manifest.to_json()`.
    """

    label: str
    manifest: Mapping[str, Any]
    evidence: Evidence


@dataclass(frozen=True)
class Row:
    """What one bundle is and was measured to be; None where it was not.

    Attributes:
        executed: "runtime", "reference" or "none".
        failed: the metrics of the failed checks.
        quality: of the page's measure; why_quality: why it can't be compared with most others'.
        p50_ms, p90_ms: of any run; why_times, why_memory: why those can't be compared with most others'.
        dominated_by: a bundle that is at least as good in all that the front compares, and better in something.
    """

    label: str
    model: str
    target: str
    runtime: str
    recipe: str
    executed: str
    passed: bool
    exit_code: int
    failed: tuple[str, ...]
    bytes: int
    size_ratio: float | None
    quality: Interval | None
    why_quality: str | None
    p50_ms: float | None
    p90_ms: float | None
    latency_ratio: Interval | None
    valid: bool
    why_times: str | None
    peak_rss_mb: float | None
    why_memory: str | None
    measured_at: str
    machine: str
    manifest_sha256: str | None
    dominated_by: str | None = None


@dataclass(frozen=True)
class Pair:
    """Two bundles on the same samples of a suite.

    Attributes:
        change: second minus first in the metric's own unit; low, high: so that all pairs of the page hold together at
            95% (Bonferroni).
        better, worse: samples on which the second scored better or worse than the first.
        mcnemar_p: of right-or-wrong scores, not corrected.
        answer: what the second is.
    """

    suite: str
    metric: str
    unit: MetricUnit
    first: str
    second: str
    n: int
    change: float
    low: float
    high: float
    better: int
    worse: int
    mcnemar_p: float | None
    answer: Answer


@dataclass(frozen=True)
class Score:
    """A suite's main metric of one bundle; `original` is the uncompressed model on the same samples."""

    label: str
    suite: str
    metric: str
    unit: MetricUnit
    higher_is_better: bool
    n: int
    original: Interval | None
    artifact: Interval | None
    problem: str | None


@dataclass(frozen=True)
class Measure:
    """What the page calls quality.

    Attributes:
        name: of a suite, or of a kind of agreement with the original.
        baseline: what the uncompressed model scores.
    """

    name: str
    title: str
    unit: MetricUnit
    higher_is_better: bool
    baseline: float | None


@dataclass(frozen=True)
class Comparison:
    """A page. `axes` are what the front compares, `notes` what a reader must know before believing it."""

    measure: Measure | None
    axes: tuple[str, ...]
    rows: tuple[Row, ...]
    scores: tuple[Score, ...]
    pairs: tuple[Pair, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The comparison as JSON values."""
        from pydantic_core import to_jsonable_python

        return dict(to_jsonable_python(self))
