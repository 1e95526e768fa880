"""Reading codes and scales out of constexpr constants of both forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edgeport.errors import BadInputError
from edgeport.export.coreml.weights import logical
from edgeport.mlpackage.constants import Constant
from edgeport.mlpackage.values import TensorType
from edgeport.quantized import dequantize

RNG = np.random.default_rng(0)


def constant(operator: str, parameters: dict, elements: dict[str, str]) -> Constant:
    data = parameters.get("data", parameters.get("quantized_data"))
    stored = {
        key: TensorType(elements[key], np.shape(value)) if key in elements else None
        for key, value in parameters.items()
    }
    return Constant("w", TensorType("fp16", data.shape), operator, parameters, stored)


def blockwise(codes, scale, element="int8", scale_element="fp16", **more) -> Constant:
    return constant(
        "constexpr_blockwise_shift_scale",
        {"data": codes, "scale": scale, **more},
        {"data": element, "scale": scale_element},
    )


def affine(codes, scale, axis=0, zero=0) -> Constant:
    return constant(
        "constexpr_affine_dequantize",
        {
            "quantized_data": codes,
            "scale": scale,
            "axis": np.int32(axis),
            "zero_point": np.full(scale.shape, zero, np.int8),
        },
        {"quantized_data": "int8", "scale": "fp32"},
    )


def test_channels_of_a_convolution():
    codes = RNG.integers(-127, 128, (6, 3, 5, 5), dtype=np.int8)
    scale = RNG.uniform(0.01, 1, (6, 1, 1, 1)).astype(np.float16)
    found = logical(blockwise(codes, scale))
    assert (found.bits, found.group_size, found.scale_dtype, found.zero_point) == (8, 75, "float16", None)
    assert np.array_equal(found.codes.numpy(), codes)
    assert np.array_equal(dequantize(found).numpy(), scale.astype(np.float32) * codes.astype(np.float32))


def test_groups_of_a_row():
    codes = RNG.integers(-7, 8, (4, 64), dtype=np.int8)
    scale = RNG.uniform(0.01, 1, (4, 2)).astype(np.float16)
    found = logical(blockwise(codes, scale, element="int4"))
    assert (found.bits, found.group_size) == (4, 32)
    expected = codes.astype(np.float32) * np.repeat(scale.astype(np.float32), 32, axis=1)
    assert np.array_equal(dequantize(found).numpy(), expected)


def test_codes_that_are_never_negative_are_stored_unsigned():
    codes = RNG.integers(0, 8, (4, 32), dtype=np.uint8)
    found = logical(blockwise(codes, np.ones((4, 1), np.float16), element="uint4"))
    assert found.bits == 4
    assert found.codes.dtype == torch.int8
    assert np.array_equal(found.codes.numpy(), codes)


def test_ios17_form():
    codes = RNG.integers(-127, 128, (4, 6), dtype=np.int8)
    scale = RNG.uniform(0.01, 1, 4).astype(np.float32)
    found = logical(affine(codes, scale))
    assert (found.scale_dtype, found.zero_point) == ("float32", None)
    assert np.array_equal(found.scale.numpy(), scale[:, None])


def test_a_zero_point_that_is_not_zero_is_reported():
    found = logical(affine(np.ones((4, 6), np.int8), np.ones(4, np.float32), zero=3))
    assert found.zero_point is not None
    assert found.zero_point.shape == (4, 1)
    assert torch.equal(dequantize(found), torch.full((4, 6), -2.0))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (affine(np.ones((4, 4), np.int8), np.ones(4, np.float32), axis=1), "along axis 1"),
        (blockwise(np.ones((4, 6), np.int8), np.ones((1, 6), np.float16)), "scales of shape"),
        (blockwise(np.full((4, 6), 200, np.uint8), np.ones((4, 1), np.float16), element="uint8"), "beyond int8"),
        (Constant("w", None, "const", {"val": np.ones(3)}, {"val": None}), "stored as const"),
    ],
)
def test_other_forms_are_refused(wrong, message):
    with pytest.raises(BadInputError, match=message):
        logical(wrong)
