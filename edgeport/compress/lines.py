"""What a run says of the weight and of the block that it finished: one line each, the error before the name."""

from __future__ import annotations

from collections.abc import Mapping

from edgeport.compress.journal import Note


def _layer(weight: str) -> str:
    return weight.removesuffix(".weight")


def weight_line(name: str, note: Note) -> str:
    """The layer, with the relative error of its output where calibration measured one (`LayerRecord.output_error`).

    The error stands first: what does not fit on a narrow terminal is cut off at the end.
    """
    return _layer(name) if note.output_error is None else f"error {note.output_error:.4f} {_layer(name)}"


def block_line(block: str, notes: Mapping[str, Note]) -> str:
    """A finished block: how many weights it has, the mean of their outputs' relative errors, and the worst of them.

    Args:
        notes: of every weight that was quantized in the block, by its full name.
    """
    errors = {name: note.output_error for name, note in notes.items() if note.output_error is not None}
    count = f"{block}: {len(notes)} weight{'' if len(notes) == 1 else 's'}"
    if not errors:
        return count
    worst = max(errors, key=lambda name: errors[name])
    inside = _layer(worst).removeprefix(f"{block}.")
    return f"{count}, output error {sum(errors.values()) / len(errors):.4f}, worst {errors[worst]:.4f} in {inside}"
