"""The gate: measurements and budgets in, a verdict out. It fails closed.

What was not measured, or not measured validly, does not pass. Three checks need no budget: every output
is finite, no output is stuck, and the integer weights in the file are the logical ones, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence

from edgeport.budgets import Budgets
from edgeport.errors import EXIT_OK
from edgeport.gate.accuracy import accuracy_checks
from edgeport.gate.checks import PARITY_BUDGETS, measured_checks, parity_checks
from edgeport.gate.regression import regression_checks
from edgeport.validate.evidence import Check, Evidence, Measurements, OutputParity, Verdict

__all__ = ["conclude", "judge", "judge_parity"]


def judge(measurements: Measurements, budgets: Budgets, *, against: Measurements | None = None) -> Verdict:
    """Hold the measurements against the budgets, and against an older bundle's where one is given.

    Returns:
        One check for each budget that is set, parity for each output of the model; the exit code is the lowest
        of the failed checks' (10 parity, 11 accuracy, 12 latency, 13 size, 14 memory, 15 not measured validly), or 0.

    Raises:
        BadInputError: a margin doesn't fit its metric.
    """
    compared, notes = ([], []) if against is None else regression_checks(measurements, against, budgets.regression)
    checks = (*measured_checks(measurements, budgets), *accuracy_checks(measurements, budgets), *compared)
    return _verdict(checks, notes)


def judge_parity(compared: Sequence[OutputParity], budgets: Budgets) -> Verdict:
    """`judge` of the parity budgets alone: for files of which nothing else was measured."""
    return _verdict(parity_checks(compared, budgets), ())


def _verdict(checks: Sequence[Check], notes: Sequence[str]) -> Verdict:
    exit_code = min((check.exit_code for check in checks if not check.passed), default=EXIT_OK)
    return Verdict(passed=exit_code == EXIT_OK, exit_code=exit_code, checks=tuple(checks), notes=tuple(notes))


def conclude(measurements: Measurements, budgets: Budgets) -> Evidence:
    """The measurements with the gate's verdict, and with `numerics_verified` said."""
    verdict = judge(measurements, budgets)
    compared = bool(measurements.parity)
    passed = all(check.passed for check in verdict.checks if check.metric in ("finite", "varies", *PARITY_BUDGETS))
    verified = "no" if not compared else "yes" if passed else "failed"
    states = measurements.states.model_copy(update={"numerics_verified": verified})
    return Evidence(**{**dict(measurements), "states": states}, verdict=verdict)
