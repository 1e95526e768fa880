"""A bundle beside an older one, number by number: what the pull request changed, and whether the data shows it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from edgeport.gate.accuracy import main_metrics
from edgeport.gate.regression import growth_of_ratio, incomparable
from edgeport.report.comparable import (
    why_memory_differs,
    why_parity_differs,
    why_ratios_differ,
    why_times_differ,
)
from edgeport.report.numbers import (
    ABSENT,
    MINUS,
    format_bytes,
    format_change,
    format_cosine,
    format_growth,
    format_interval,
    format_ms,
    format_score,
    format_share,
)
from edgeport.validate.evidence import Interval, Measurements, TaskScore
from edgeport.validate.tasks import difference_of

EACH_SIDE = 0.975
"""Confidence of each end of a two-sided 95% interval."""

Direction = Literal["better", "worse", "not shown", "same", "unknown"]
"""What a change is; "not shown" where its interval holds no change."""

UNKNOWN: Direction = "unknown"


def _nats(value: float) -> str:
    return format_score(value, "nats")


PARITY: dict[str, tuple[str, Callable[[float], str], int]] = {
    "cosine": ("cosine to the original", format_cosine, 1),
    "top1_agreement": ("same top answer", format_share, 1),
    "kl": ("KL divergence", _nats, -1),
}
"""Kinds of agreement: words, how a value is written, and the sign of what is better."""


@dataclass(frozen=True)
class Delta:
    """One number then and now, in words.

    Attributes:
        change: signed, with its 95% interval where there is one; "–" where the two can't be compared.
        note: why not, or of what the interval speaks.
    """

    what: str
    before: str
    after: str
    change: str
    direction: Direction
    note: str = ""


ROUNDING = 1e-7
"""Outputs are float32: a mean of them that moved by less did so by the order of summation."""


def deltas(new: Measurements, old: Measurements) -> tuple[Delta, ...]:
    """Every number that both have, and those that only one has, in the order of a report."""
    return (
        _amount("size", new.size.bytes, old.size.bytes),
        *_parity(new, old),
        *_suites(new, old),
        *_latency(new, old),
        *_memory(new, old),
    )


def _amount(what: str, now: float, was: float) -> Delta:
    """Bytes, of which fewer are better."""
    direction: Direction = "same" if now == was else "better" if now < was else "worse"
    return Delta(what, format_bytes(was), format_bytes(now), format_growth(now / was - 1), direction)


def _judged(low: float, high: float) -> Direction:
    """Of an interval in which more is better."""
    return "better" if low > 0 else "worse" if high < 0 else "not shown"


def _parity(new: Measurements, old: Measurements) -> Iterator[Delta]:
    why = why_parity_differs(new, old)
    found = {parity.output: parity for parity in old.parity}
    for after in new.parity:
        before = found.get(after.output)
        for field, (words, form, sign) in PARITY.items():
            now: Interval | None = getattr(after, field)
            was: Interval | None = None if before is None else getattr(before, field)
            if now is None and was is None:
                continue
            texts = [ABSENT if each is None else form(each.mean) for each in (was, now)]
            change, direction, note = ABSENT, UNKNOWN, why or "one of the two has it"
            if now is not None and was is not None and why is None:
                moved = now.mean - was.mean
                moved = 0.0 if abs(moved) <= ROUNDING * max(1.0, abs(was.mean)) else moved
                direction = "same" if moved == 0 else "better" if sign * moved > 0 else "worse"
                change, note = f"{moved:+.2g}".replace("-", MINUS), "the same inputs"
            yield Delta(f"{words}, {after.output}", texts[0], texts[1], change, direction, note)


def _suites(new: Measurements, old: Measurements) -> Iterator[Delta]:
    after, before = main_metrics(new.tasks), main_metrics(old.tasks)
    for name in dict.fromkeys([*after, *before]):
        now, was = after.get(name), before.get(name)
        if now is not None and was is not None and incomparable(now, was) is None:
            yield _paired(now, was)
            continue
        why = "run on one of the two only" if now is None or was is None else incomparable(now, was)
        metric = (now or before[name]).metric
        yield Delta(f"{name}: {metric}", _score(was), _score(now), ABSENT, "unknown", why or "")


def _score(task: TaskScore | None) -> str:
    return ABSENT if task is None or task.artifact is None else format_score(task.artifact.mean, task.unit)


def _paired(now: TaskScore, was: TaskScore) -> Delta:
    what = f"{now.suite}: {now.metric}"
    found = difference_of(now, was.artifact_scores, now.artifact_scores, confidence=EACH_SIDE)
    if found is None:
        return Delta(what, _score(was), _score(now), ABSENT, "unknown", "a score is not finite")
    # `found` is turned so that less is worse; the change is told in the metric's own direction.
    sign = 1 if now.higher_is_better else -1
    low, high = sorted((sign * found.lower, sign * found.upper))
    ends = f"{format_change(low, now.unit)} to {format_change(high, now.unit)}"
    change = f"{format_change(sign * found.mean, now.unit)} [{ends}]"
    return Delta(what, _score(was), _score(now), change, _judged(found.lower, found.upper), f"paired, n = {now.n}")


def _why_times(new: Measurements, old: Measurements) -> str | None:
    """Why the times can't be compared, in few words: each run's own page says what was wrong with it."""
    for whose, measured in (("this", new), ("the older", old)):
        if measured.latency is not None and not measured.latency.valid:
            return f"{whose} bundle's run is not valid"
    return why_times_differ(new, old)


def _latency(new: Measurements, old: Measurements) -> Iterator[Delta]:
    now, was = new.latency, old.latency
    if now is None and was is None:
        return
    why = _why_times(new, old)
    for name in ("p50", "p90"):
        values = [None if each is None else float(getattr(each, f"{name}_ms")) for each in (was, now)]
        texts = [ABSENT if value is None else format_ms(value) for value in values]
        change, direction, note = ABSENT, UNKNOWN, why or ""
        if why is None and values[0] is not None and values[1] is not None:
            change, direction = format_growth(values[1] / values[0] - 1), "not shown"
            note = "two runs, no interval: see the ratio"
        yield Delta(f"latency, {name}", texts[0], texts[1], change, direction, note)
    if now is not None and was is not None and now.ratio is not None and was.ratio is not None:
        valid = now.valid and was.valid
        yield _ratio(now.ratio, was.ratio, why_ratios_differ(now, was) if valid else why)


def _ratio(now: Interval, was: Interval, why: str | None) -> Delta:
    what = "latency over the fp32 file's"
    before, after = format_interval(was, _times), format_interval(now, _times)
    if why is not None:
        return Delta(what, before, after, ABSENT, "unknown", why)
    growth = growth_of_ratio(now, was)
    change = f"{format_growth(growth.mean)} [{format_growth(growth.low)} to {format_growth(growth.high)}]"
    return Delta(what, before, after, change, _judged(-growth.high, -growth.low), "each beside fp32 in its own run")


def _times(value: float) -> str:
    return f"{value:.2f}×"


def _memory(new: Measurements, old: Measurements) -> Iterator[Delta]:
    now, was = new.memory, old.memory
    if now is None and was is None:
        return
    why = why_memory_differs(new, old)
    if why is None and now is not None and was is not None:
        yield _amount("peak memory", now.peak_rss_mb * 1e6, was.peak_rss_mb * 1e6)
        return
    texts = [ABSENT if each is None else format_bytes(each.peak_rss_mb * 1e6) for each in (was, now)]
    yield Delta("peak memory", texts[0], texts[1], ABSENT, "unknown", why or "")
