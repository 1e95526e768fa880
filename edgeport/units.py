"""Quantities as budgets are written, with the unit they are in: "98%", "20 ms", "25 MB", "1 point", "1% relative".

A number without a unit is taken only where it can mean one thing. What could mean two is refused with both
readings: "1%" of a score of 0.80 is 0.79 to one reader and 0.792 to another.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

MetricUnit = Literal["share", "correlation", "nats", "score"]
"""What a score is counted in: a share of cases (0 to 1), a correlation (-1 to 1), nats, or a number of its own."""

WIDTHS: dict[MetricUnit, float] = {"share": 1.0, "correlation": 2.0}
"""From the worst to the best value, where a unit has both."""

TIMES = {"us": 1e-3, "ms": 1.0, "s": 1e3}
SIZES = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}

_QUANTITY = re.compile(r"\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*([a-zA-Z%]*(?: relative)?)\s*")


def split(value: object) -> tuple[float, str]:
    """The number and the unit of a quantity; "" where it is a bare number.

    Raises:
        ValueError: it is no quantity.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError('it must be a number, or a text with a number and a unit such as "20 ms"')
    found = _QUANTITY.fullmatch(str(value))
    if found is None:
        raise ValueError('it must be a number, optionally with a unit, such as "98%" or "20 ms"')
    return float(found[1]), " ".join(found[2].split())


def _short(number: float) -> str:
    return f"{number:.6g}"


def read_share(value: Any) -> float:
    """A share of all cases: 0.98 or "98%".

    Raises:
        ValueError: it has another unit, or is not between 0 and 1.
    """
    number, unit = split(value)
    if unit == "%":
        number /= 100
    elif unit:
        raise ValueError(f'a share has no unit {unit!r}; write 0.98 or "98%"')
    if not 0 <= number <= 1:
        meant = f'; {_short(number)} of 100 is written {_short(number / 100)} or "{_short(number)}%"'
        raise ValueError("it is a share from 0 to 1" + (meant if not unit and 1 < number <= 100 else ""))
    return number


def read_ratio(value: Any) -> float:
    """How many times another quantity: 0.45, "0.45x" or "45%".

    Raises:
        ValueError: it has another unit, or is not above 0.
    """
    number, unit = split(value)
    if unit not in ("", "x", "%"):
        raise ValueError(f'a ratio has no unit {unit!r}; write 0.45, "0.45x" or "45%"')
    number = number / 100 if unit == "%" else number
    if number <= 0:
        raise ValueError("it is a ratio above 0")
    return number


def read_nats(value: Any) -> float:
    """A divergence: 0.1 or "0.1 nats".

    Raises:
        ValueError: it has another unit, or is not above 0.
    """
    number, unit = split(value)
    if unit not in ("", "nats"):
        raise ValueError(f'a divergence has no unit {unit!r}; write 0.1 or "0.1 nats"')
    if number <= 0:
        raise ValueError("it is a number of nats above 0")
    return number


def _with_unit(value: Any, units: dict[str, float], example: str) -> float:
    number, unit = split(value)
    if unit not in units:
        said = "has no unit" if not unit else f"has the unit {unit!r}"
        raise ValueError(f'it {said}; write "{_short(number)} {example}", or use another of {", ".join(units)}')
    if number <= 0:
        raise ValueError("it must be above 0")
    return number * units[unit]


def milliseconds(value: Any) -> float:
    """A time such as "20 ms", "1.5 s" or "300 us", in milliseconds.

    Raises:
        ValueError: it has no unit of time.
    """
    return _with_unit(value, TIMES, "ms")


def count_bytes(value: Any) -> float:
    """A size such as "25 MB" (1e6 bytes) or "24 MiB" (2^20), in bytes.

    Raises:
        ValueError: it has no unit of size.
    """
    return _with_unit(value, {name: float(size) for name, size in SIZES.items()}, "MB")


@dataclass(frozen=True)
class Margin:
    """How much worse a score may be.

    Attributes:
        value: above 0; a share of the original's score where `relative`, else in `unit`.
        unit: "points" (hundredths), "nats", or "" for the metric's own.
    """

    value: float
    relative: bool
    unit: Literal["", "points", "nats"] = ""

    def absolute(self, original: float, unit: MetricUnit) -> float:
        """The margin in the metric's own unit.

        Args:
            original: the original model's score.
            unit: the metric's.

        Raises:
            ValueError: it doesn't fit the metric, in words that say what would.
        """
        if self.relative:
            return self.value * abs(original)
        width = WIDTHS.get(unit)
        if self.unit == "points":
            if width is None:
                raise ValueError(
                    f"points are hundredths of a metric from 0 to 1; this one is counted in "
                    f'{"its own unit" if unit == "score" else unit}: write a number of these, or "1% relative"'
                )
            margin = self.value / 100
        elif self.unit == "nats" and unit != "nats":
            raise ValueError(
                f'the metric is a {unit}, not counted in nats: write "1% relative", or "1 point" of a share'
            )
        else:
            margin = self.value
        if width is not None and margin >= width:
            number = _short(self.value)
            meant = (
                ""
                if self.unit
                else f'; {number} points of 100 are written "{number} points" or {_short(self.value / 100)}'
            )
            raise ValueError(f"a drop of {_short(margin)} is the whole range of this metric ({width:g}){meant}")
        return margin


def read_margin(value: Any) -> Margin:
    """A margin: "1 point" (0.01 of a metric from 0 to 1), "1% relative", "0.05 nats", or 0.01 in the metric's own unit.

    Raises:
        ValueError: it is none of these, or could be read in two ways.
    """
    number, unit = split(value)
    if number <= 0:
        raise ValueError("a margin is above 0")
    if unit == "% relative":
        if number >= 100:
            raise ValueError("a relative margin is below 100%")
        return Margin(number / 100, relative=True)
    if unit == "%":
        said = _short(number)
        raise ValueError(
            f'"{said}%" can be read in two ways: write "{said} points" (of 100) or "{said}% relative" (of the score)'
        )
    if unit in ("point", "points"):
        return Margin(number, relative=False, unit="points")
    if unit == "nats":
        return Margin(number, relative=False, unit="nats")
    if unit:
        raise ValueError(f'a margin has no unit {unit!r}; write "1 point", "1% relative", "0.05 nats" or 0.01')
    return Margin(number, relative=False)


def _checked(read: Any) -> Any:
    """Keeps a quantity as it is written, once `read` takes it: the unit stays in the file."""

    def check(value: Any) -> str:
        read(value)
        return str(value)

    return check


Share = Annotated[float, BeforeValidator(read_share), Field(ge=0, le=1)]
Ratio = Annotated[float, BeforeValidator(read_ratio), Field(gt=0)]
Nats = Annotated[float, BeforeValidator(read_nats), Field(gt=0)]
Duration = Annotated[str, BeforeValidator(_checked(milliseconds))]
Bytes = Annotated[str, BeforeValidator(_checked(count_bytes))]
MarginText = Annotated[str, BeforeValidator(_checked(read_margin))]
"""Fields of a schema. The first three hold a number; the others the text, whose unit is part of it."""
