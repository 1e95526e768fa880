"""Reading codes, scales, zero points and palettes out of constexpr constants of both systems' forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edgeport.errors import BadInputError
from edgeport.export.coreml.weights import logical
from edgeport.mlpackage.constants import Constant
from edgeport.mlpackage.constexpr import decode
from edgeport.mlpackage.values import ELEMENT_TYPES, TensorType, unpack_bits
from edgeport.packing import pack_bits
from edgeport.quantized import dequantize

RNG = np.random.default_rng(0)
ELEMENTS = {element.name: element for element in ELEMENT_TYPES.values()}


def constant(operator: str, parameters: dict, elements: dict[str, str]) -> Constant:
    stored = {
        key: TensorType(ELEMENTS[elements[key]], np.shape(value)) if key in elements else None
        for key, value in parameters.items()
    }
    return Constant("w", None, operator, parameters, stored)


def blockwise(codes, scale, element="int8", scale_element="fp16", **more) -> Constant:
    return constant(
        "constexpr_blockwise_shift_scale",
        {"data": codes, "scale": scale, **more},
        {"data": element, "scale": scale_element},
    )


def affine(codes, scale, axis=0, zero=0) -> Constant:
    zeros = np.broadcast_to(np.asarray(zero, codes.dtype), scale.shape)
    return constant(
        "constexpr_affine_dequantize",
        {
            "quantized_data": codes,
            "scale": scale,
            "axis": np.int32(axis),
            "zero_point": zeros,
        },
        {"quantized_data": codes.dtype.name, "scale": "fp32"},
    )


def palettes(indices, lut, element, lut_element="fp16", **more) -> Constant:
    return constant(
        "constexpr_lut_to_dense", {"indices": indices, "lut": lut, **more}, {"indices": element, "lut": lut_element}
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


@pytest.mark.parametrize("zero", [0, 1, 128, 255])
def test_unsigned_codes_of_ios17_move_down_with_their_zero_point(zero):
    codes = RNG.integers(0, 256, (4, 6), dtype=np.uint8)
    scale = RNG.uniform(0.01, 1, 4).astype(np.float32)
    stored = affine(codes, scale, zero=zero)
    found = logical(stored)
    assert found.codes.dtype == torch.int8
    assert torch.equal(found.zero_point, torch.full((4, 1), zero - 128, dtype=torch.int8))
    assert np.array_equal(dequantize(found).numpy(), stored.value())


@pytest.mark.parametrize(("bits", "shape", "groups"), [(4, (6, 64), 4), (8, (6, 64), 1), (4, (4, 6, 3, 3), 2)])
def test_zero_points_of_blocks(bits, shape, groups):
    dtype = np.uint8
    size = (shape[0], groups, *[1] * (len(shape) - 2))
    codes, zero = (RNG.integers(0, 2**bits, s).astype(dtype) for s in (shape, size))
    scale = RNG.uniform(0.01, 1, size).astype(np.float16)
    stored = blockwise(codes, scale, element=f"uint{bits}", offset=zero)
    found = logical(stored)
    assert (found.bits, found.group_size) == (bits, int(np.prod(shape[1:])) // groups)
    half = 2 ** (bits - 1)
    assert np.array_equal(found.codes.numpy(), codes.astype(np.int16) - half)
    assert np.array_equal(found.zero_point.numpy(), zero.reshape(-1, groups).astype(np.int16) - half)
    assert np.array_equal(dequantize(found).numpy(), stored.value())


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize(("shape", "groups"), [((6, 5), 3), ((6, 5), 1), ((4, 3, 3, 3), 2)])
def test_palettes_of_ios18(bits, shape, groups):
    indices = RNG.integers(0, 2**bits, shape).astype(np.uint8)
    lut = RNG.normal(size=(groups, *[1] * (len(shape) - 1), 2**bits, 1)).astype(np.float16)
    stored = palettes(indices, lut, f"uint{bits}")
    found = logical(stored)
    assert (found.bits, found.group_size, found.scale_dtype) == (bits, int(np.prod(shape[1:])), "float16")
    assert np.array_equal(found.codes.numpy(), indices)
    assert np.array_equal(found.palette.numpy(), lut.reshape(groups, -1).astype(np.float32))
    assert np.array_equal(dequantize(found).numpy(), stored.value())


@pytest.mark.parametrize("bits", [1, 2, 4, 6, 8])
def test_the_palette_of_ios17(bits):
    codes = RNG.integers(0, 2**bits, (5, 7)).astype(np.uint8)
    lut = RNG.normal(size=2**bits).astype(np.float32)
    packed = pack_bits(codes.reshape(-1), bits)
    assert packed.size == -(-35 * bits // 8)
    stored = palettes(packed, lut, "uint8", "fp32", shape=np.array([5, 7], np.uint32))
    found = logical(stored)
    assert (found.bits, found.group_size, found.scale_dtype) == (bits, 7, "float32")
    assert np.array_equal(found.codes.numpy(), codes)
    assert np.array_equal(dequantize(found).numpy(), lut[codes])


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [1, 7, 8, 33])
def test_packing_and_unpacking(bits, count):
    codes = RNG.integers(0, 2**bits, count).astype(np.uint8)
    packed = pack_bits(codes, bits)
    # Least significant bit first, as a whole number.
    number = sum(int(code) << (bits * index) for index, code in enumerate(codes))
    assert packed.tobytes() == number.to_bytes(-(-count * bits // 8), "little")
    assert np.array_equal(unpack_bits(packed, bits, count, signed=False), codes)


def matrix(*shape: int) -> np.ndarray:
    return np.ones(shape, np.uint8)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (affine(np.ones((4, 4), np.int8), np.ones(4, np.float32), axis=1), "along axis 1"),
        (blockwise(np.ones((4, 6), np.int8), np.ones((1, 6), np.float16)), "scales of shape"),
        (blockwise(np.ones((4, 6), np.int8), np.ones((2, 1), np.float16)), "scales of shape"),
        (blockwise(np.ones((4, 6), np.int8), np.ones((4, 4), np.float16)), "scales of shape"),
        (blockwise(np.ones((4, 2, 6), np.int8), np.ones((4, 1, 3), np.float16)), "scales of shape"),
        (blockwise(np.full((4, 6), 200, np.uint8), np.ones((4, 1), np.float16), element="uint8"), "beyond int8"),
        (
            blockwise(np.ones((4, 6), np.int8), np.ones((4, 1), np.float16), offset=np.full((4, 1), 0.5, np.float16)),
            "no codes",
        ),
        (palettes(matrix(4, 6), np.ones((4, 6, 2, 1), np.float16), "uint1"), "palettes of shape"),
        (palettes(matrix(4, 6), np.ones((3, 1, 2, 1), np.float16), "uint1"), "palettes of shape"),
        (palettes(matrix(4, 6), np.ones((1, 1, 2, 2), np.float16), "uint1"), "palettes of shape"),
        (palettes(matrix(4, 6), np.ones((1, 1, 2, 1), np.int8), "uint1", "int8"), "lut in int8"),
        (Constant("w", None, "const", {"val": np.ones(3)}, {"val": None}), "stored as const"),
    ],
)
def test_other_forms_are_refused(wrong, message):
    with pytest.raises(BadInputError, match=message):
        logical(wrong)


@pytest.mark.parametrize("lut", [np.ones(6, np.float16), np.ones((2, 2), np.float16), np.ones(1, np.float16)])
def test_a_damaged_palette_is_refused(lut):
    with pytest.raises(BadInputError):
        decode("constexpr_lut_to_dense", {"indices": matrix(3), "lut": lut, "shape": np.array([6], np.uint32)})
