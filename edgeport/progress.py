"""Who watches a run."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Who watches a run: the command line draws it, tests ignore it."""

    def stage(self, name: str, detail: str = "") -> None:
        """A new stage begins."""

    def update(self, done: int, total: int, detail: str = "") -> None:
        """The stage got this far."""

    def message(self, text: str) -> None:
        """One line worth keeping."""


class Silent:
    """A Progress that shows nothing."""

    def stage(self, name: str, detail: str = "") -> None:
        """Ignored."""

    def update(self, done: int, total: int, detail: str = "") -> None:
        """Ignored."""

    def message(self, text: str) -> None:
        """Ignored."""
