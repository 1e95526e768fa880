"""The tables of two bundles as differences."""

from __future__ import annotations

from edgeport.explain.document import Bytes, CellChange, Changes, LayerChange, LayerErrors, SuiteFlips
from edgeport.explain.groups import GROUPS
from edgeport.explain.shipped import Shipped, module_of
from edgeport.explain.sizes import PARTS


def make_changes(
    other: str,
    sha256: str,
    sizes: tuple[Bytes, Bytes],
    shipped: tuple[Shipped, Shipped],
    errors: tuple[LayerErrors | None, LayerErrors | None],
    flips: tuple[SuiteFlips, ...],
    notes: tuple[str, ...],
) -> Changes:
    """What changed from the other bundle to this one.

    Args:
        other: its name; sha256: of its manifest.
        sizes, shipped, errors: the other's first.
    """
    cells = [{(cell.group, cell.part): cell.bytes for cell in found.cells} for found in sizes]
    return Changes(
        other=other,
        other_manifest_sha256=sha256,
        other_file=sizes[0].file,
        cells=tuple(
            CellChange(
                group=group, part=part, other=cells[0].get((group, part), 0), this=cells[1].get((group, part), 0)
            )
            for group in GROUPS
            for part in PARTS
            if (group, part) in cells[0] or (group, part) in cells[1]
        ),
        layers=_layers(shipped, errors),
        flips=flips,
        notes=notes,
    )


def _layers(
    shipped: tuple[Shipped, Shipped], errors: tuple[LayerErrors | None, LayerErrors | None]
) -> tuple[LayerChange, ...]:
    """Every layer that either has, in this bundle's order, then what the other has alone."""
    told = [{} if found is None else {row.layer: row for row in found.rows} for found in errors]
    formats = [{module_of(record.name): record.format for record in one.layers} for one in shipped]
    names = dict.fromkeys([*told[1], *formats[1], *told[0], *formats[0]])
    rows = []
    for name in names:
        before, after = told[0].get(name), told[1].get(name)
        rows.append(
            LayerChange(
                layer=name,
                other_format=before.format if before is not None else formats[0].get(name, "absent"),
                format=after.format if after is not None else formats[1].get(name, "absent"),
                other_error=None if before is None else before.relative_error,
                error=None if after is None else after.relative_error,
            )
        )
    return tuple(rows)
