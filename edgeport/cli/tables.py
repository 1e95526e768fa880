"""The two kinds of table that verbs draw, without lines and with nothing cut off."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table


def listing(*headers: str) -> Table:
    """A table with one column a header; rows are rich markup."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for header in headers:
        table.add_column(header, overflow="fold")
    return table


def facts(rows: Iterable[tuple[str, str]]) -> Table:
    """Labels and plain texts, one pair a line."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for label, text in rows:
        table.add_row(escape(label), escape(text))
    return table
