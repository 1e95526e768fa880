"""The compressed weights in the shipped file against the logical ones, bit for bit.

`edgeport.export.dispatch.read_weights` parses the file; nothing here knows what the exporter meant to write.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from edgeport.quantized import QuantizedTensor, dequantize, digest
from edgeport.validate.evidence import WeightCheck

if TYPE_CHECKING:
    import torch


def check_weights(
    logical: Mapping[str, QuantizedTensor | str],
    stored: Mapping[str, QuantizedTensor],
    *,
    unused: Collection[str] = (),
) -> WeightCheck:
    """Compare all compressed weights.

    Args:
        logical: what compression made, by parameter name: the tensor, or its `edgeport.quantized.digest`
            (all that a bundle carries).
        stored: what the file holds, by parameter name.
        unused: weights that the exporter left out, as no output depends on them: they need not be in the file.

    Returns:
        `different` names each weight that is missing from the file, is only in the file, or differs, and how.
    """
    absent = sorted(name for name in unused if name in logical and name not in stored)
    found = {name: first_difference(logical[name], stored.get(name)) for name in sorted(set(logical) - set(absent))}
    different = [f"{name}: {problem}" for name, problem in found.items() if problem is not None]
    extra = [f"{name}: compressed in the file only" for name in sorted(set(stored) - set(logical))]
    return WeightCheck(
        checked=len(found),
        equal=len(found) - len(different),
        different=(*different, *extra),
        unused=tuple(absent),
    )


def first_difference(logical: QuantizedTensor | str, stored: QuantizedTensor | None) -> str | None:
    """What differs, in words, or None where codes, scales and dequantised values are equal in every bit."""
    if stored is None:
        return "not in the file"
    if isinstance(logical, str):
        return (
            None if digest(stored) == logical else f"sha256 {digest(stored)[:12]} in the file, {logical[:12]} logically"
        )
    if logical.codes.shape != stored.codes.shape:
        return f"shape {tuple(stored.codes.shape)} in the file, {tuple(logical.codes.shape)} logically"
    if logical.scale.shape != stored.scale.shape:
        return f"scales of shape {tuple(stored.scale.shape)} in the file, {tuple(logical.scale.shape)} logically"
    if logical.bits != stored.bits:
        return f"{stored.bits} bits in the file, {logical.bits} logically"
    differing = (
        _differing("codes", logical.codes, stored.codes)
        or _differing("scales", logical.scale, stored.scale)
        or _differing("dequantised values", dequantize(logical), dequantize(stored))
    )
    if differing is None and digest(stored) != digest(logical):
        return "the same values in another form (axis or zero points)"
    return differing


def _differing(what: str, logical: torch.Tensor, stored: torch.Tensor) -> str | None:
    """How many values differ and the first of them; floats are compared by their bits."""
    import torch

    if logical.dtype != stored.dtype:
        return f"{what} are {stored.dtype} in the file, {logical.dtype} logically"
    floats = logical.dtype == torch.float32
    left, right = (t.contiguous().view(torch.int32) if floats else t for t in (logical, stored))
    unequal = left != right
    count = int(unequal.sum())
    if count == 0:
        return None
    place = tuple(int(index) for index in unequal.nonzero()[0])
    return (
        f"{count} of {unequal.numel()} {what} differ, first at {place}: "
        f"{stored[place].item()!r} in the file, {logical[place].item()!r} logically"
    )
