"""Schemas of what the gate says: one check a claim, and all of them."""

from __future__ import annotations

from typing import Literal

from edgeport.schema import Strict


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
