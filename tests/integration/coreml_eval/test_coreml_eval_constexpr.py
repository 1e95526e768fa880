"""Compressed constants: what the saved file holds, decoded here and by coremltools."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeport.mlpackage.constants import Constant, constants
from edgeport.mlpackage.package import load_package
from edgeport.mlpackage.program import parse_function

RANDOM = np.random.default_rng(5)


def integers(low: int, high: int, *shape: int) -> np.ndarray:
    return RANDOM.integers(low, high, size=shape)


def floats(dtype: type, *shape: int) -> np.ndarray:
    return RANDOM.uniform(0.01, 0.2, size=shape).astype(dtype)


MASK = integers(0, 2, 6, 8)
ONES = int(MASK.sum())


def iOS16(mb: Any) -> dict[str, Any]:
    return {
        "affine_vector": mb.constexpr_affine_dequantize(
            quantized_data=integers(-128, 128, 4, 6).astype(np.int8),
            scale=floats(np.float16, 4),
            zero_point=np.array([0, 1, -2, 3], np.int8),
            axis=0,
        ),
        "affine_last_axis": mb.constexpr_affine_dequantize(
            quantized_data=integers(0, 256, 4, 6).astype(np.uint8),
            scale=floats(np.float32, 6),
            zero_point=np.uint8(128),
            axis=-1,
        ),
        "affine_unsigned": mb.constexpr_affine_dequantize(
            quantized_data=integers(0, 256, 4, 3, 2, 2).astype(np.uint8),
            scale=floats(np.float16, 4),
            zero_point=np.array([0, 1, 128, 255], np.uint8),
            axis=0,
        ),
        **{
            f"lut_{bits}bit_packed": mb.constexpr_lut_to_dense(
                indices=integers(0, 256, -(-35 * bits // 8)).astype(np.uint8),
                lut=floats(np.float16, 2**bits),
                shape=np.array([5, 7], np.uint32),
            )
            for bits in (1, 4, 8)
        },
        "lut_2bit": mb.constexpr_lut_to_dense(
            indices=integers(0, 256, 9).astype(np.uint8), lut=floats(np.float16, 4), shape=np.array([5, 7], np.uint32)
        ),
        "lut_6bit": mb.constexpr_lut_to_dense(
            indices=integers(0, 256, 15).astype(np.uint8), lut=floats(np.float32, 64), shape=np.array([4, 5], np.uint32)
        ),
        "sparse": mb.constexpr_sparse_to_dense(
            nonzero_data=floats(np.float16, ONES),
            mask=np.packbits(MASK.astype(np.uint8).reshape(-1), bitorder="little"),
            shape=np.array([6, 8], np.uint32),
        ),
        "cast": mb.constexpr_cast(source_val=floats(np.float16, 3, 7), output_dtype="fp32"),
    }


def iOS18(mb: Any) -> dict[str, Any]:
    from coremltools.converters.mil.mil import types

    def typed(kind: Any, values: np.ndarray) -> np.ndarray:
        return values.astype(types.nptype_from_builtin(kind))

    sparse_codes = mb.constexpr_sparse_blockwise_shift_scale(
        data_mask=typed(types.uint1, MASK),
        nonzero_data=typed(types.int4, integers(-8, 8, ONES)),
        scale=floats(np.float16, 1, 8),
        offset=typed(types.int4, integers(-8, 8, 1, 8)),
    )
    sparse_palette = mb.constexpr_lut_to_sparse(
        indices_mask=typed(types.uint1, MASK),
        indices_nonzero_data=typed(types.uint2, integers(0, 4, ONES)),
        lut=floats(np.float16, 1, 1, 4, 1),
    )
    sparse_vectors = mb.constexpr_lut_to_sparse(
        indices_mask=typed(types.uint1, MASK),
        indices_nonzero_data=typed(types.uint1, integers(0, 2, ONES)),
        lut=floats(np.float16, 1, 1, 2, 3),
        vector_axis=np.int32(0),
    )
    return {
        "int4_blocks": mb.constexpr_blockwise_shift_scale(
            data=typed(types.int4, integers(-8, 8, 4, 64)), scale=floats(np.float16, 4, 2)
        ),
        "int4_odd": mb.constexpr_blockwise_shift_scale(
            data=typed(types.int4, integers(-8, 8, 3, 5)), scale=floats(np.float16, 3, 1)
        ),
        "int4_offset": mb.constexpr_blockwise_shift_scale(
            data=typed(types.int4, integers(-8, 8, 4, 64)),
            scale=floats(np.float32, 4, 2),
            offset=typed(types.int4, integers(-8, 8, 4, 2)),
        ),
        "uint4_offset": mb.constexpr_blockwise_shift_scale(
            data=typed(types.uint4, integers(0, 16, 4, 64)),
            scale=floats(np.float32, 2, 2),
            offset=typed(types.uint4, integers(0, 16, 2, 2)),
        ),
        "int8_conv": mb.constexpr_blockwise_shift_scale(
            data=integers(-128, 128, 4, 2, 3, 3).astype(np.int8), scale=floats(np.float16, 4, 1, 1, 1)
        ),
        "uint8_float_offset": mb.constexpr_blockwise_shift_scale(
            data=integers(0, 256, 4, 6).astype(np.uint8),
            scale=floats(np.float32, 4, 3),
            offset=floats(np.float32, 4, 3),
        ),
        **{
            f"lut_uint{bits}": mb.constexpr_lut_to_dense(
                indices=typed(getattr(types, f"uint{bits}"), integers(0, 2**bits, 6, 8)),
                lut=floats(np.float16, 2, 1, 2**bits, 1),
            )
            for bits in (1, 2, 3, 4, 6, 8)
        },
        "lut_one_palette": mb.constexpr_lut_to_dense(
            indices=typed(types.uint3, integers(0, 8, 4, 2, 3, 3)), lut=floats(np.float16, 1, 1, 1, 1, 8, 1)
        ),
        "lut_vectors": mb.constexpr_lut_to_dense(
            indices=typed(types.uint2, integers(0, 4, 2, 3, 4)),
            lut=floats(np.float32, 1, 1, 2, 4, 3),
            vector_axis=np.int32(1),
        ),
        "lut_int8_scaled": mb.constexpr_blockwise_shift_scale(
            data=mb.constexpr_lut_to_dense(
                indices=typed(types.uint4, integers(0, 16, 6, 8)), lut=integers(-128, 128, 1, 1, 16, 1).astype(np.int8)
            ),
            scale=floats(np.float16, 6, 1),
        ),
        "sparse": mb.constexpr_sparse_to_dense(nonzero_data=floats(np.float16, ONES), mask=typed(types.uint1, MASK)),
        "sparse_int4_scaled": mb.constexpr_sparse_to_dense(nonzero_data=sparse_codes[1], mask=sparse_codes[0]),
        "sparse_palette": mb.constexpr_sparse_to_dense(nonzero_data=sparse_palette[1], mask=sparse_palette[0]),
        "sparse_vectors": mb.constexpr_sparse_to_dense(nonzero_data=sparse_vectors[1], mask=sparse_vectors[0]),
    }


@pytest.fixture(scope="module", params=[iOS16, iOS18], ids=["iOS16", "iOS18"])
def decoded(request: pytest.FixtureRequest, save_package: Any) -> dict[str, tuple[Constant, np.ndarray]]:
    """The constants of a saved program with coremltools' own decoding of each."""
    import coremltools as ct
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.mil import Function, Program, types

    table: Callable[[Any], dict[str, Any]] = request.param
    opset = table.__name__
    specs = {"x": mb.placeholder(shape=(1,), dtype=types.fp32)}
    program = Program()
    with Function(specs, opset_version=getattr(ct.target, opset)) as function:
        built = table(mb)
        outputs = [mb.add(x=mb.cast(x=variable, dtype="fp32"), y=function.inputs["x"]) for variable in built.values()]
        function.set_outputs(outputs)
    program.add_function("main", function)
    expected = {name: variable.op.materialized_val_inference() for name, variable in built.items()}
    names = {name: variable.name for name, variable in built.items()}
    path: Path = save_package(program, opset)
    found = constants(parse_function(load_package(path)).body)
    return {name: (found[names[name]], np.asarray(expected[name])) for name in built}


def test_values_are_those_of_coremltools(decoded: dict[str, tuple[Constant, np.ndarray]]) -> None:
    """Exactly, once rounded to the declared type."""
    for name, (constant, expected) in decoded.items():
        assert constant.operator.startswith("constexpr_"), name
        assert constant.type is not None
        value = constant.value()
        assert value.shape == expected.shape == constant.type.shape, name
        np.testing.assert_array_equal(value.astype(constant.type.element.array), expected, err_msg=name)


def test_stored_types_are_told(decoded: dict[str, tuple[Constant, np.ndarray]]) -> None:
    wanted = {
        "int4_blocks": ("data", "int4"),
        "uint4_offset": ("offset", "uint4"),
        "lut_uint3": ("indices", "uint3"),
        "affine_vector": ("quantized_data", "int8"),
    }
    for name, (parameter, element) in wanted.items():
        if name in decoded:
            stored = decoded[name][0].stored[parameter]
            assert stored is not None
            assert stored.element.name == element


def test_every_decoder_is_used(decoded: dict[str, tuple[Constant, np.ndarray]]) -> None:
    from edgeport.mlpackage.constexpr import DECODERS, PACKED

    used = {constant.operator for constant, _ in decoded.values()}
    if "cast" in decoded:
        assert {"constexpr_affine_dequantize", "constexpr_cast", *PACKED} == used
    else:
        # Two more stand behind the sparse ones, decoded on the way.
        inner = {"constexpr_lut_to_sparse", "constexpr_sparse_blockwise_shift_scale"}
        assert set(DECODERS) - {"constexpr_affine_dequantize", "constexpr_cast"} - inner == used


def test_a_palette_that_is_itself_quantized(save_package: Any) -> None:
    """The joint forms of `joint_compression=True`, dense and sparse: coremltools makes them and can't decode them."""
    import coremltools as ct
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.mil import Function, Program, types

    def typed(kind: Any, values: np.ndarray) -> np.ndarray:
        return values.astype(types.nptype_from_builtin(kind))

    codes, scale = integers(-128, 128, 16).astype(np.int8), floats(np.float16, 1)
    indices, nonzero = integers(0, 16, 6, 8), integers(0, 16, ONES)
    program = Program()
    specs = {"x": mb.placeholder(shape=(1,), dtype=types.fp32)}
    with Function(specs, opset_version=ct.target.iOS18) as function:
        palette = mb.constexpr_blockwise_shift_scale(data=codes.reshape(1, 1, 16, 1), scale=scale.reshape(1, 1, 1, 1))
        dense = mb.constexpr_lut_to_dense(indices=typed(types.uint4, indices), lut=palette)
        mask, values = mb.constexpr_lut_to_sparse(
            indices_mask=typed(types.uint1, MASK), indices_nonzero_data=typed(types.uint4, nonzero), lut=palette
        )
        sparse = mb.constexpr_sparse_to_dense(nonzero_data=values, mask=mask)
        outputs = [mb.add(x=mb.cast(x=weight, dtype="fp32"), y=function.inputs["x"]) for weight in (dense, sparse)]
        function.set_outputs(outputs)
    program.add_function("main", function)
    found = constants(parse_function(load_package(save_package(program, "iOS18"))).body)

    entries = codes.astype(np.float32) * scale.astype(np.float32)
    np.testing.assert_array_equal(found[dense.name].value(), entries[indices])
    expected = np.zeros(MASK.shape, np.float32)
    expected[MASK == 1] = entries[nonzero]
    np.testing.assert_array_equal(found[sparse.name].value(), expected)
