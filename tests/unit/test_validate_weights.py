"""The bit-for-bit check sees every way in which a stored weight can differ."""

from dataclasses import replace

import pytest
import torch

from edgeport.quantized import QuantizedTensor, dequantize, digest, quantize_with_scale
from edgeport.validate.weights import check_weights


@pytest.fixture
def tensor():
    weight = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))
    scale = weight.reshape(6, 2, 4).abs().amax(-1) / 7
    return quantize_with_scale(weight, scale, bits=4, group_size=4)


def clone(tensor: QuantizedTensor) -> QuantizedTensor:
    return replace(tensor, codes=tensor.codes.clone(), scale=tensor.scale.clone())


def test_equal_in_every_bit(tensor):
    found = check_weights({"a": tensor, "b": tensor}, {"a": clone(tensor), "b": clone(tensor)})
    assert (found.checked, found.equal, found.different) == (2, 2, ())


def test_nothing_compressed():
    found = check_weights({}, {})
    assert (found.checked, found.equal, found.different) == (0, 0, ())


def test_one_code(tensor):
    stored = clone(tensor)
    stored.codes[3, 5] += 1
    found = check_weights({"w": tensor}, {"w": stored})
    assert found.equal == 0
    expected = f"{stored.codes[3, 5].item()} in the file, {tensor.codes[3, 5].item()} logically"
    assert found.different == (f"w: 1 of 48 codes differ, first at (3, 5): {expected}",)


def test_one_bit_of_a_scale(tensor):
    stored = clone(tensor)
    stored.scale.view(torch.int32)[2, 1] ^= 1
    assert (dequantize(stored) - dequantize(tensor)).abs().max() < 1e-6
    found = check_weights({"w": tensor}, {"w": stored})
    assert found.equal == 0
    assert "1 of 12 scales differ, first at (2, 1)" in found.different[0]


def test_permuted_scales(tensor):
    stored = replace(tensor, scale=tensor.scale.flip(0))
    assert "12 of 12 scales differ" in check_weights({"w": tensor}, {"w": stored}).different[0]


def test_a_scale_that_is_not_a_number(tensor):
    logical, stored = clone(tensor), clone(tensor)
    stored.scale[0, 0] = float("nan")
    assert "1 of 12 scales differ" in check_weights({"w": logical}, {"w": stored}).different[0]


def test_zero_points(tensor):
    stored = replace(tensor, zero_point=torch.zeros_like(tensor.scale, dtype=torch.int8))
    stored.zero_point[1, 1] = 2
    found = check_weights({"w": tensor}, {"w": stored})
    assert "dequantised values differ, first at (1, 4)" in found.different[0]


def test_missing_extra_shape_and_bits(tensor):
    wide = replace(tensor, bits=8)
    flat = replace(tensor, codes=tensor.codes.reshape(8, 6))
    coarse = replace(tensor, scale=tensor.scale[:, :1], group_size=8)
    logical = dict.fromkeys(("missing", "wide", "flat", "coarse", "same"), tensor)
    stored = {"wide": wide, "flat": flat, "coarse": coarse, "same": tensor, "other": tensor}
    found = check_weights(logical, stored)
    assert (found.checked, found.equal) == (5, 1)
    assert found.different == (
        "coarse: scales of shape (6, 1) in the file, (6, 2) logically",
        "flat: shape (8, 6) in the file, (6, 8) logically",
        "missing: not in the file",
        "wide: 8 bits in the file, 4 logically",
        "other: compressed in the file only",
    )


def test_a_weight_that_no_output_needs_may_be_left_out(tensor):
    other = replace(tensor, scale=tensor.scale * 2)
    found = check_weights({"head": tensor, "w": tensor}, {"w": tensor}, unused=["head"])
    assert (found.checked, found.equal, found.different, found.unused) == (1, 1, (), ("head",))
    # It is in the file after all, and wrong: that counts.
    assert check_weights({"head": tensor}, {"head": other}, unused=["head"]).equal == 0


def test_a_digest_stands_for_the_tensor(tensor):
    stored = clone(tensor)
    assert check_weights({"w": digest(tensor)}, {"w": stored}).equal == 1
    stored.codes[0, 0] -= 1
    found = check_weights({"w": digest(tensor)}, {"w": stored})
    assert found.equal == 0
    assert "sha256" in found.different[0]
