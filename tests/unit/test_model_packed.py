"""A compressed weight as it is stored: exact both ways in every form, and refused when damaged."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from edgeport.errors import BadInputError
from edgeport.model.packed import Form, form_of, pack_weight, unpack_weight
from edgeport.quantized import QuantizedTensor, code_range, dequantize, digest


def integers(bits: int, *, groups: int, zero_points: bool, shape: tuple[int, ...] = (5, 24)) -> QuantizedTensor:
    """Random codes over the whole range, float16 scales of both signs."""
    generator = torch.Generator().manual_seed(bits * 10 + groups)
    lowest, highest = code_range(bits, symmetric=not zero_points)
    columns = torch.Size(shape[1:]).numel()

    def codes(*size: int) -> torch.Tensor:
        return torch.randint(lowest, highest + 1, size, dtype=torch.int8, generator=generator)

    return QuantizedTensor(
        codes=codes(*shape),
        scale=torch.randn(shape[0], groups, generator=generator).to(torch.float16).to(torch.float32),
        zero_point=codes(shape[0], groups) if zero_points else None,
        bits=bits,
        group_size=columns // groups,
        scale_dtype="float16",
    )


def palette(bits: int, palettes: int) -> QuantizedTensor:
    generator = torch.Generator().manual_seed(bits)
    return QuantizedTensor(
        codes=torch.randint(0, 2**bits, (6, 7), dtype=torch.uint8, generator=generator),
        scale=torch.ones(6, 1),
        zero_point=None,
        bits=bits,
        group_size=7,
        scale_dtype="bfloat16",
        palette=torch.randn(palettes, 2**bits, generator=generator).to(torch.bfloat16).to(torch.float32),
    )


CASES = [
    *(integers(bits, groups=groups, zero_points=zero) for bits in range(2, 9) for groups in (1, 3) for zero in (0, 1)),
    integers(4, groups=1, zero_points=False, shape=(3, 5, 3, 3)),
    *(palette(bits, palettes) for bits in range(2, 9) for palettes in (1, 3)),
]


@pytest.mark.parametrize("tensor", CASES, ids=lambda t: f"{t.bits}-{t.group_size}-{t.symmetric}-{t.palette is None}")
def test_round_trip_is_bit_for_bit(tensor: QuantizedTensor) -> None:
    form = form_of(tensor, "any")
    parts = pack_weight(tensor)
    assert {name: (part.dtype, tuple(part.shape)) for name, part in parts.items()} == form.layout()
    assert parts["codes"].numel() == -(-tensor.codes.numel() * tensor.bits // 8)
    found = unpack_weight("w", Form.model_validate_json(form.model_dump_json()), parts)
    assert digest(found) == digest(tensor)
    assert found.scale_dtype == tensor.scale_dtype
    assert torch.equal(dequantize(found), dequantize(tensor))


def test_stored_parts_take_the_bytes_that_the_form_claims() -> None:
    tensor = integers(3, groups=3, zero_points=True)
    assert sum(part.numel() * part.element_size() for part in pack_weight(tensor).values()) == tensor.storage_bytes()


def _with(part: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
    return {**pack_weight(integers(8, groups=1, zero_points=False)), part: value}


@pytest.mark.parametrize(
    ("parts", "what"),
    [
        (_with("codes", torch.full((120,), 128, dtype=torch.uint8)), "out of range"),
        (_with("codes", torch.zeros(119, dtype=torch.uint8)), "codes is torch.uint8 \\(119,\\)"),
        (_with("scale", torch.ones(5, 1)), "scale is torch.float32"),
        (_with("scale", torch.full((5, 1), torch.inf, dtype=torch.float16)), "not finite"),
        (_with("scale", torch.zeros(5, 1, dtype=torch.float16)), "a scale is 0"),
    ],
)
def test_damaged_parts_are_refused(parts: dict[str, torch.Tensor], what: str) -> None:
    form = form_of(integers(8, groups=1, zero_points=False), "int8")
    with pytest.raises(BadInputError, match=what) as caught:
        unpack_weight("layer.weight", form, parts)
    assert caught.value.where == "layer.weight"


@pytest.mark.parametrize(
    "change",
    [{"group_size": 7}, {"axis": 2}, {"codes": "unsigned"}, {"palettes": 2}, {"shape": (0, 24)}],
)
def test_impossible_forms_are_refused(change: dict[str, object]) -> None:
    tensor = integers(4, groups=3, zero_points=False)
    form = form_of(tensor, "int4_g8").model_copy(update=change)
    with pytest.raises(BadInputError, match="damaged"):
        unpack_weight("w", form, pack_weight(tensor))


def test_minus_128_is_allowed_where_there_are_zero_points() -> None:
    tensor = integers(8, groups=1, zero_points=True)
    lowest = replace(tensor, codes=torch.full_like(tensor.codes, -128))
    assert digest(unpack_weight("w", form_of(lowest, "uint8"), pack_weight(lowest))) == digest(lowest)
