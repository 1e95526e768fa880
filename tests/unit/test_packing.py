"""Dense packing: exact at every width and size, and the bits lie where the format says."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from edgeport.packing import CHUNK, pack_bits, packed_size, unpack_bits


@st.composite
def codes_of_some_width(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    bits = draw(st.integers(1, 8))
    count = draw(st.integers(0, 200))
    return draw(arrays(np.uint8, count, elements=st.integers(0, 2**bits - 1))), bits


@given(codes_of_some_width())
def test_round_trip_is_exact_and_dense(drawn: tuple[np.ndarray, int]) -> None:
    codes, bits = drawn
    packed = pack_bits(codes, bits)
    assert packed.dtype == np.uint8
    assert packed.shape == (packed_size(codes.size, bits),) == (-(-codes.size * bits // 8),)
    np.testing.assert_array_equal(unpack_bits(packed, bits, codes.size), codes)


@given(codes_of_some_width())
def test_the_bits_are_those_of_one_large_number(drawn: tuple[np.ndarray, int]) -> None:
    codes, bits = drawn
    number = sum(int(code) << (index * bits) for index, code in enumerate(codes))
    assert pack_bits(codes, bits).tobytes() == number.to_bytes(packed_size(codes.size, bits), "little")


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [CHUNK - 1, CHUNK, CHUNK + 3])
def test_chunks_meet_without_a_gap(bits: int, count: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 2**bits, count, dtype=np.uint8)
    np.testing.assert_array_equal(unpack_bits(pack_bits(codes, bits), bits, count), codes)


@pytest.mark.parametrize("bits", range(2, 9))
def test_twos_complement_loses_only_its_upper_bits(bits: int) -> None:
    signed = np.arange(-(2 ** (bits - 1)), 2 ** (bits - 1), dtype=np.int8)
    unpacked = unpack_bits(pack_bits(signed.view(np.uint8), bits), bits, signed.size)
    np.testing.assert_array_equal(unpacked, signed.astype(np.int16) % 2**bits)
