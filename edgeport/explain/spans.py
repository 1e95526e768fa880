"""Runs of bytes in a file, each with what it says; together they cover the file exactly."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from edgeport.errors import BadInputError
from edgeport.explain.document import Part


@dataclass(frozen=True)
class Span:
    """Bytes `start` to `stop` (one past the last) of a file.

    Attributes:
        name: of the tensor in the file; empty for what is no tensor.
        parameter: of the model, where the file tells.
    """

    start: int
    stop: int
    part: Part
    name: str = ""
    parameter: str | None = None

    @property
    def size(self) -> int:
        """Bytes."""
        return self.stop - self.start

    def moved(self, by: int) -> Span:
        """The same bytes in a file in which they stand `by` bytes further back."""
        return replace(self, start=self.start + by, stop=self.stop + by)


def cover(spans: Iterable[Span], start: int, stop: int, rest: Part) -> list[Span]:
    """The spans in order, with everything between them as `rest`; bytes that two tensors share are the first one's.

    Raises:
        BadInputError: a span lies outside, or two overlap without being the same.
    """
    found: list[Span] = []
    at = start
    for span in _distinct(spans):
        if span.start < at or span.stop > stop:
            raise BadInputError(
                f"The file stores {span.name or span.part!r} at bytes {span.start} to {span.stop}, which are taken.",
                next_step="The file is damaged or was changed after export: export it again.",
            )
        if span.start > at:
            found.append(Span(at, span.start, rest))
        found.append(span)
        at = span.stop
    if at < stop:
        found.append(Span(at, stop, rest))
    return found


def _distinct(spans: Iterable[Span]) -> Iterator[Span]:
    """By place, empty ones left out, of equal places the first that was given."""
    last: tuple[int, int] | None = None
    for span in sorted((span for span in spans if span.size), key=lambda span: (span.start, span.stop)):
        if (span.start, span.stop) != last:
            yield span
        last = (span.start, span.stop)
