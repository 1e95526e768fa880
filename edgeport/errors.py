"""Every error a user can meet, in one form: what was wrong, where, what is allowed, what to do next.

The exit codes are the product's contract with CI systems (see docs/architecture.md):

0 all gates passed · 2 bad input or usage · 3 this target can't take this · 10 parity ·
11 accuracy · 12 latency · 13 size · 14 memory · 15 measurement not valid · 70 a bug of ours.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

EXIT_OK = 0
EXIT_BAD_INPUT = 2
EXIT_TARGET_REFUSES = 3
EXIT_PARITY = 10
EXIT_ACCURACY = 11
EXIT_LATENCY = 12
EXIT_SIZE = 13
EXIT_MEMORY = 14
EXIT_NOT_VALID = 15
EXIT_BUG = 70


class EdgeportError(Exception):
    """An error with a message that a user can act on.

    Args:
        what: what was wrong, one sentence.
        where: the file, key, layer or argument it was found in.
        allowed: what would have been accepted.
        next_step: what the user can do now.
    """

    exit_code: ClassVar[int] = EXIT_BUG

    def __init__(
        self,
        what: str,
        *,
        where: object | None = None,
        allowed: str | Iterable[object] | None = None,
        next_step: str | None = None,
    ) -> None:
        super().__init__(what)
        self.what = what
        self.where = None if where is None else str(where)
        if allowed is None or isinstance(allowed, str):
            self.allowed = allowed
        else:
            self.allowed = ", ".join(str(item) for item in allowed)
        self.next_step = next_step

    def __str__(self) -> str:
        parts = [self.what]
        if self.where:
            parts.append(f"where: {self.where}")
        if self.allowed:
            parts.append(f"allowed: {self.allowed}")
        if self.next_step:
            parts.append(f"next: {self.next_step}")
        return "\n  ".join(parts)

    def to_json(self) -> dict[str, object]:
        """The same four facts for machines, with the exit code."""
        return {
            "error": type(self).__name__,
            "what": self.what,
            "where": self.where,
            "allowed": self.allowed,
            "next": self.next_step,
            "exit_code": self.exit_code,
        }


class BadInputError(EdgeportError):
    """The user's file, name, key or value can't be used (exit 2)."""

    exit_code = EXIT_BAD_INPUT


class TargetRefusesError(EdgeportError):
    """The target, or the library that lowers for it, can't take this model or recipe (exit 3)."""

    exit_code = EXIT_TARGET_REFUSES


class MeasurementError(EdgeportError):
    """A measurement could not be made validly (exit 15)."""

    exit_code = EXIT_NOT_VALID


def first_line(error: BaseException) -> str:
    """The first line of an error's innermost cause that says anything, or its type."""
    seen = [error]
    while (cause := seen[-1].__cause__ or seen[-1].__context__) is not None and cause not in seen:
        seen.append(cause)
    for item in reversed(seen):
        lines = [line.strip() for line in str(item).splitlines() if line.strip()]
        if lines:
            return lines[0]
    return type(seen[-1]).__name__
