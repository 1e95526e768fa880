"""Numbers as the report writes them: for people, with their unit, and with as many digits as they deserve."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from edgeport.units import MetricUnit
from edgeport.validate.evidence import Interval

ABSENT = "–"
MINUS = "−"


def digits(value: float) -> str:
    """Three significant digits without an exponent: 1.53, 15.3, 153, 1530."""
    size = abs(value)
    return f"{value:.{0 if size >= 99.95 else 1 if size >= 9.995 else 2}f}"


def format_bytes(count: float) -> str:
    """Bytes in decimal units with three significant digits: 512 B, 22.9 MB."""
    size = abs(count)
    sign = MINUS if count < 0 else ""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor * 0.9995:
            return f"{sign}{digits(size / factor)} {unit}"
    return f"{sign}{size:.0f} B"


def format_ms(value: float) -> str:
    """Milliseconds, or seconds from one on: 15.3 ms, 1.53 s."""
    return f"{digits(value / 1000)} s" if abs(value) >= 1000 else f"{digits(value)} ms"


def format_shape(shape: list[int | dict[str, Any]]) -> str:
    """Sizes of a tensor, free ones with their range: batch 1–8 × sequence 1–512 × 384."""
    parts = [s if isinstance(s, int) else f"{s['name']} {s['minimum']}–{s['maximum']}" for s in shape]
    return " × ".join(str(part) for part in parts) or "scalar"


def format_share(value: float) -> str:
    """A share of 1 in percent: 95.3 %."""
    return f"{100 * value:.1f} %"


def format_cosine(value: float) -> str:
    """As many nines as there are, and two digits more: 0.9966, 0.999987."""
    nines = 6 if value >= 1 else max(0, math.floor(-math.log10(1 - value))) if value > 0 else 0
    return f"{value:.{min(8, max(4, nines + 2))}f}"


def format_score(value: float, unit: MetricUnit) -> str:
    """A suite's score in its unit."""
    if unit == "share":
        return format_share(value)
    return f"{value:.4f}" if unit == "correlation" else f"{value:.4g} nats" if unit == "nats" else f"{value:.4g}"


def format_change(value: float, unit: MetricUnit) -> str:
    """A difference of two scores, with its sign; shares in points of 100."""
    sign = MINUS if value < 0 else "+"
    size = abs(value)
    if unit == "share":
        return f"{sign}{100 * size:.2g} points" if 100 * size < 1 else f"{sign}{100 * size:.1f} points"
    return f"{sign}{size:.3g}" + (" nats" if unit == "nats" else "")


def format_growth(value: float) -> str:
    """A relative change: +3.1 %."""
    return f"{MINUS if value < 0 else '+'}{abs(100 * value):.1f} %"


def format_interval(value: Interval | None, form: Callable[[float], str]) -> str:
    """A mean with its interval: "84.2 % [80.1 % to 87.6 %]"."""
    if value is None:
        return ABSENT
    return form(value.mean) if value.n < 2 else f"{form(value.mean)} [{form(value.low)} to {form(value.high)}]"
