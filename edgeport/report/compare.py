"""Several bundles on one page: what each weighs, how good and how fast it is, and which of them nobody needs.

Only what can be compared is: bundles of one model, quality on the same inputs, times of valid runs on one machine. What
can't is in the tables all the same, with the reason beside it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations

from edgeport.errors import BadInputError
from edgeport.gate.accuracy import main_metrics
from edgeport.gate.regression import incomparable
from edgeport.report.comparable import same_model, why_memory_differs, why_parity_differs, why_times_differ
from edgeport.report.comparison import Answer, Candidate, Comparison, Measure, Pair, Row, Score
from edgeport.units import MetricUnit
from edgeport.validate.evidence import Interval, TaskScore
from edgeport.validate.paired import mcnemar
from edgeport.validate.tasks import difference_of

PARITY: dict[str, tuple[str, bool]] = {
    "top1_agreement": ("same top answer as the original", True),
    "kl": ("KL divergence from the original, nats", False),
    "cosine": ("cosine to the original", True),
}
"""Kinds of agreement with the original, the most telling first: title, and whether more is better."""
ERROR = 0.05
"""Chance, over all paired intervals of a page together, that one of them misses the truth."""


def compare(candidates: Sequence[Candidate], *, by: str | None = None, different_models: bool = False) -> Comparison:
    """Everything of a page.

    Args:
        by: what to call quality: a suite's name, or "cosine", "top1_agreement" or "kl". By default a suite that all
            were asked on the same samples, otherwise agreement with the original.
        different_models: take bundles of different originals: then nothing is paired and no front is drawn.

    Raises:
        BadInputError: fewer than two bundles, of different models, or none has been measured by `by`.
    """
    if len(candidates) < 2:
        raise BadInputError(
            "One bundle can't be compared.",
            where="BUNDLE...",
            next_step="Name two at least; `edgeport report BUNDLE` is about one.",
        )
    first = candidates[0]
    others = [each.label for each in candidates[1:] if not same_model(first.manifest, each.manifest)]
    if others and not different_models:
        raise BadInputError(
            f"The bundles were made of different models: {', '.join(others)} not of the files that {first.label} was "
            f"made of ({first.manifest['source']['reference']}, {first.manifest['task']}).",
            where="BUNDLE...",
            next_step="Compare bundles of one model, or pass --different-models to see them side by side.",
        )
    measure = _measure(candidates, by)
    rows = _rows(candidates, measure)
    axes: tuple[str, ...] = ()
    if not others and sum(row.quality is not None and row.why_quality is None for row in rows) > 1:
        axes = ("size", "quality", *(["latency"] if all(row.why_times is None for row in rows) else []))
        rows = _dominated(rows, axes, higher_is_better=measure is not None and measure.higher_is_better)
    return Comparison(
        measure=measure,
        axes=axes,
        rows=rows,
        scores=_scores(candidates),
        pairs=() if others else _pairs(candidates),
        notes=_notes(candidates, others, rows, measure),
    )


def unique_labels(names: Sequence[Sequence[str]]) -> list[str]:
    """For each path (its parts) as few of its last parts as tell it from the others."""
    for count in range(1, max(len(parts) for parts in names) + 1):
        labels = ["/".join(parts[-count:]) for parts in names]
        if len(set(labels)) == len(labels):
            return labels
    twice = next(name for name, count in Counter(map(tuple, names)).items() if count > 1)
    raise BadInputError("A bundle is named twice.", where="/".join(twice))


def _shared_suites(candidates: Sequence[Candidate]) -> list[str]:
    """Suites that all were asked on the same samples, and that the original solves."""
    each = [main_metrics(candidate.evidence.tasks) for candidate in candidates]
    found = []
    for name, task in each[0].items():
        usable = all(
            incomparable(tasks.get(name), task) is None
            and tasks[name].artifact is not None
            and tasks[name].baseline_problem is None
            for tasks in each
        )
        if usable:
            found.append(name)
    return found


def _measure(candidates: Sequence[Candidate], by: str | None) -> Measure | None:
    suites: dict[str, TaskScore] = {}
    for candidate in candidates:
        suites = {**main_metrics(candidate.evidence.tasks), **suites}
    known = [*suites, *PARITY]
    if by is not None and by not in known:
        raise BadInputError(f"No bundle was measured by {by!r}.", where="--by", allowed=known)
    shared = _shared_suites(candidates)
    chosen = by or (shared[0] if shared else None)
    if chosen is None:
        chosen = next((kind for kind in PARITY if all(_agreement(each, kind) for each in candidates)), None)
    if chosen is None:
        return None
    if chosen in suites:
        task = suites[chosen]
        baseline = None if task.original is None else task.original.mean
        return Measure(chosen, f"{chosen}: {task.metric}", task.unit, task.higher_is_better, baseline)
    title, higher = PARITY[chosen]
    unit: MetricUnit = "share" if chosen == "top1_agreement" else "nats" if chosen == "kl" else "score"
    return Measure(chosen, title, unit, higher, 1.0 if higher else 0.0)


def _agreement(candidate: Candidate, kind: str) -> Interval | None:
    """Of the output that agrees least."""
    found: list[Interval] = [v for p in candidate.evidence.parity if (v := getattr(p, kind)) is not None]
    worst = max if kind == "kl" else min
    return worst(found, key=lambda interval: interval.mean) if found else None


def _quality(candidate: Candidate, measure: Measure) -> Interval | None:
    if measure.name in PARITY:
        return _agreement(candidate, measure.name)
    task = main_metrics(candidate.evidence.tasks).get(measure.name)
    return None if task is None else task.artifact


def _why_quality(candidate: Candidate, against: Candidate, measure: Measure) -> str | None:
    if measure.name in PARITY:
        return why_parity_differs(candidate.evidence, against.evidence)
    mine, theirs = (main_metrics(each.evidence.tasks) for each in (candidate, against))
    return incomparable(mine.get(measure.name), theirs[measure.name])


def _most_alike(candidates: Sequence[Candidate], alike: Callable[[Candidate, Candidate], bool]) -> Candidate:
    """The first of those that the most can be compared with: the others are told why they can't."""
    return max(candidates, key=lambda one: sum(alike(one, other) for other in candidates))


def _rows(candidates: Sequence[Candidate], measure: Measure | None) -> tuple[Row, ...]:
    qualities = [None if measure is None else _quality(each, measure) for each in candidates]
    asked = [each for each, found in zip(candidates, qualities, strict=True) if found is not None]
    yardstick = None
    if measure is not None and asked:
        yardstick = _most_alike(asked, lambda one, other: _why_quality(one, other, measure) is None)
    timed = _most_alike(candidates, lambda one, other: why_times_differ(one.evidence, other.evidence) is None)
    weighed = _most_alike(candidates, lambda one, other: why_memory_differs(one.evidence, other.evidence) is None)
    rows = []
    for candidate, quality in zip(candidates, qualities, strict=True):
        manifest, evidence = candidate.manifest, candidate.evidence
        latency, memory, machine = evidence.latency, evidence.memory, evidence.machine
        why_quality = None
        if measure is not None and yardstick is not None:
            why_quality = "not measured" if quality is None else _why_quality(candidate, yardstick, measure)
        rows.append(
            Row(
                label=candidate.label,
                model=manifest["name"],
                target=manifest["target"]["name"],
                runtime=manifest["runtime"],
                recipe=manifest["recipe"]["name"],
                executed=evidence.states.executed_here,
                passed=evidence.verdict.passed,
                exit_code=evidence.verdict.exit_code,
                failed=tuple(dict.fromkeys(check.metric for check in evidence.verdict.checks if not check.passed)),
                bytes=evidence.size.bytes,
                size_ratio=evidence.size.ratio,
                quality=quality,
                why_quality=why_quality,
                p50_ms=None if latency is None else latency.p50_ms,
                p90_ms=None if latency is None else latency.p90_ms,
                latency_ratio=None if latency is None else latency.ratio,
                valid=latency is not None and latency.valid,
                why_times=why_times_differ(evidence, timed.evidence),
                peak_rss_mb=None if memory is None else memory.peak_rss_mb,
                why_memory=why_memory_differs(evidence, weighed.evidence),
                measured_at=evidence.measured_at,
                machine=f"{machine.cpu}, {machine.cores} cores, {machine.platform}",
                manifest_sha256=evidence.manifest_sha256,
            )
        )
    return tuple(rows)


def _dominated(rows: Sequence[Row], axes: Sequence[str], *, higher_is_better: bool) -> tuple[Row, ...]:
    """Mark each row that another one beats in all axes; those without comparable quality are left out."""
    sign = -1 if higher_is_better else 1

    def costs(row: Row) -> tuple[float, ...] | None:
        if row.quality is None or row.why_quality is not None:
            return None
        values = {"size": row.bytes, "quality": sign * row.quality.mean, "latency": row.p50_ms or 0.0}
        return tuple(values[axis] for axis in axes)

    found = {row.label: cost for row in rows if (cost := costs(row)) is not None}

    def beats(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
        return all(a <= b for a, b in zip(one, other, strict=True)) and one != other

    marked = []
    for row in rows:
        mine = found.get(row.label)
        better = [] if mine is None else [label for label, cost in found.items() if beats(cost, mine)]
        # The one with the least cost first, so that it is on the front itself.
        name = min(better, key=lambda label: found[label], default=None)
        marked.append(replace(row, dominated_by=name))
    return tuple(marked)


def _scores(candidates: Sequence[Candidate]) -> tuple[Score, ...]:
    found = [
        Score(
            label=candidate.label,
            suite=name,
            metric=task.metric,
            unit=task.unit,
            higher_is_better=task.higher_is_better,
            n=task.n,
            original=task.original,
            artifact=task.artifact,
            problem=task.baseline_problem,
        )
        for candidate in candidates
        for name, task in main_metrics(candidate.evidence.tasks).items()
    ]
    return tuple(sorted(found, key=lambda score: score.suite))


def _pairs(candidates: Sequence[Candidate]) -> tuple[Pair, ...]:
    found: list[tuple[Candidate, Candidate, TaskScore, TaskScore]] = []
    for one, other in combinations(candidates, 2):
        theirs = main_metrics(other.evidence.tasks)
        for name, first in main_metrics(one.evidence.tasks).items():
            second = theirs.get(name)
            if second is not None and incomparable(second, first) is None:
                found.append((one, other, first, second))
    made = [_pair(one.label, other.label, first, second, len(found)) for one, other, first, second in found]
    return tuple(sorted((pair for pair in made if pair is not None), key=lambda pair: pair.suite))


def _pair(one: str, other: str, first: TaskScore, second: TaskScore, count: int) -> Pair | None:
    found = difference_of(
        second, first.artifact_scores, second.artifact_scores, confidence=1 - ERROR / 2 / max(1, count)
    )
    if found is None:
        return None
    sign = 1 if second.higher_is_better else -1
    low, high = sorted((sign * found.lower, sign * found.upper))
    changes = [
        sign * (after - before)
        for before, after in zip(first.artifact_scores, second.artifact_scores, strict=True)
        if before is not None and after is not None
    ]
    better, worse = sum(change > 0 for change in changes), sum(change < 0 for change in changes)
    answer: Answer = "better" if found.lower > 0 else "worse" if found.upper < 0 else "no difference shown"
    binary = first.mcnemar_p is not None and second.mcnemar_p is not None
    return Pair(
        suite=second.suite,
        metric=second.metric,
        unit=second.unit,
        first=one,
        second=other,
        n=second.n,
        change=sign * found.mean,
        low=low,
        high=high,
        better=better,
        worse=worse,
        mcnemar_p=mcnemar(worse, better) if binary else None,
        answer=answer,
    )


def _notes(
    candidates: Sequence[Candidate], others: Sequence[str], rows: Sequence[Row], measure: Measure | None
) -> tuple[str, ...]:
    """What can't be compared, in words."""
    notes = []
    if others:
        notes.append(
            f"Different models: {', '.join(others)} were not made of the files that {candidates[0].label} was made of. "
            "Nothing is paired, and no front is drawn."
        )
    elif sum(row.quality is not None and row.why_quality is None for row in rows) < 2:
        notes.append("No two bundles have a comparable measure of quality, so no front is drawn.")
    for row in rows:
        if row.why_quality is not None and measure is not None:
            notes.append(f"{row.label}: {measure.title} is not comparable ({row.why_quality}).")
        if row.why_times is not None:
            notes.append(f"{row.label}: times are not comparable ({row.why_times}).")
        if row.executed != "runtime":
            how = "by a reference evaluator" if row.executed == "reference" else "nowhere"
            notes.append(f"{row.label}: converted, executed here {how}, not by the target's own runtime.")
    return tuple(notes)
