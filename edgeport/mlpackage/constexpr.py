"""Compressed constants: what Core ML's constexpr operators stand for.

Each function follows the operator's definition in coremltools (`mil/ops/defs/iOS16/constexpr_ops.py` and
`iOS18/compression.py`) on numpy arrays. Arithmetic is float32; rounding to the declared float16 is the caller's
choice, so that compression error and float16 error can be told apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import numpy as np

from edgeport.errors import BadInputError
from edgeport.mlpackage.values import unpack_bits

Parameters = Mapping[str, Any]
Decoder = Callable[..., np.ndarray | tuple[np.ndarray, ...]]


def affine_dequantize(
    quantized_data: np.ndarray, zero_point: np.ndarray, scale: np.ndarray, axis: np.ndarray
) -> np.ndarray:
    """`scale * (quantized_data - zero_point)`, with a scale and zero point each scalar or one a channel of `axis`."""
    shape = [1] * quantized_data.ndim
    shape[int(axis)] = -1
    codes = quantized_data.astype(np.float32) - np.asarray(zero_point, np.float32).reshape(
        shape if np.ndim(zero_point) else ()
    )
    values: np.ndarray = codes * np.asarray(scale, np.float32).reshape(shape if np.ndim(scale) else ())
    return values


def blockwise_shift_scale(data: np.ndarray, scale: np.ndarray, offset: np.ndarray | None = None) -> np.ndarray:
    """`scale * (data - offset)`; one scale and offset serve a block of data.shape[i] // scale.shape[i] in each axis i.

    Args:
        data: integers or floats, any shape.
        scale: same rank; each size divides data's.
        offset: scale's shape.

    Raises:
        BadInputError: the shapes don't divide.
    """
    blocks, spread = _blocks(data.shape, scale.shape)
    values: np.ndarray = data.astype(np.float32).reshape(blocks)
    if offset is not None:
        values = values - offset.astype(np.float32).reshape(spread)
    return (values * scale.astype(np.float32).reshape(spread)).reshape(data.shape)


def lut_to_dense(indices: np.ndarray, lut: np.ndarray, vector_axis: np.ndarray | None = None) -> np.ndarray:
    """Each index replaced by its palette entry (iOS 18).

    Args:
        indices: shape (d0, ..., dk).
        lut: shape (g0, ..., gk, palette size, vector size); each g divides its d, one palette serves a block.
        vector_axis: the axis along which the entries of a vector follow each other.
    """
    blocks, spread = _blocks(indices.shape, lut.shape[:-2])
    palettes = int(np.prod(lut.shape[:-2], dtype=np.int64))
    if lut.size == lut.shape[-2]:  # a single palette of single values, without an index of eight bytes a weight
        single: np.ndarray = lut.reshape(-1)[indices]
        return single
    palette = np.broadcast_to(np.arange(palettes).reshape(spread), blocks).reshape(indices.shape)
    vectors: np.ndarray = lut.reshape(palettes, lut.shape[-2], lut.shape[-1])[
        palette, indices
    ]  # (d0, ..., dk, vector size)
    if lut.shape[-1] == 1:
        return vectors.reshape(indices.shape)
    axis = int(cast("np.ndarray", vector_axis)) % indices.ndim
    merged = list(indices.shape)
    merged[axis] *= lut.shape[-1]
    return np.moveaxis(vectors, -1, axis + 1).reshape(merged)


def lut_to_dense_packed(indices: np.ndarray, lut: np.ndarray, shape: np.ndarray) -> np.ndarray:
    """iOS 16's form: one palette for the tensor, indices packed in bytes, least significant bit first."""
    bits = int(lut.size).bit_length() - 1
    if lut.shape != (2**bits,) or not 1 <= bits <= 8:
        raise BadInputError(f"A palette has the shape {lut.shape}.", allowed="(2,), (4,), ... (256,)")
    sizes = tuple(int(size) for size in shape)
    values: np.ndarray = lut[unpack_bits(indices, bits, int(np.prod(sizes, dtype=np.int64)), signed=False)]
    return values.reshape(sizes)


def sparse_to_dense(nonzero_data: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The stored values at the mask's ones, in row-major order, and zero elsewhere."""
    dense = np.zeros(mask.shape, nonzero_data.dtype)
    if int(np.count_nonzero(mask)) != nonzero_data.size:
        raise BadInputError(
            f"A sparse constant holds {nonzero_data.size} values for {int(np.count_nonzero(mask))} set bits."
        )
    dense[mask != 0] = nonzero_data
    return dense


def sparse_to_dense_packed(nonzero_data: np.ndarray, mask: np.ndarray, shape: np.ndarray) -> np.ndarray:
    """iOS 16's form: the mask packed in bytes, least significant bit first."""
    sizes = tuple(int(size) for size in shape)
    bits = unpack_bits(mask, 1, int(np.prod(sizes, dtype=np.int64)), signed=False)
    return sparse_to_dense(nonzero_data, bits.reshape(sizes))


def lut_to_sparse(
    indices_mask: np.ndarray,
    indices_nonzero_data: np.ndarray,
    lut: np.ndarray,
    vector_axis: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Palette entries of the stored indices only: the mask (grown along `vector_axis`) and the values at its ones."""
    dense = lut_to_dense(sparse_to_dense(indices_nonzero_data, indices_mask), lut, vector_axis)
    mask = indices_mask
    if lut.shape[-1] > 1:
        mask = np.repeat(mask, lut.shape[-1], axis=int(cast("np.ndarray", vector_axis)))
    return mask, dense[mask != 0]


def sparse_blockwise_shift_scale(
    data_mask: np.ndarray, nonzero_data: np.ndarray, scale: np.ndarray, offset: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """`blockwise_shift_scale` of the stored values only: the mask and the values at its ones."""
    dense = blockwise_shift_scale(sparse_to_dense(nonzero_data, data_mask), scale, offset)
    return data_mask, dense[data_mask != 0]


def cast_constant(source_val: np.ndarray, output_dtype: object) -> np.ndarray:
    """A float16 constant in float32, the one cast that Core ML knows here."""
    if str(np.asarray(output_dtype).item()) != "fp32":
        raise BadInputError(f"constexpr_cast to {output_dtype} is not defined.", allowed="fp32")
    return source_val.astype(np.float32)


DECODERS: Mapping[str, Decoder] = {
    "constexpr_affine_dequantize": affine_dequantize,
    "constexpr_blockwise_shift_scale": blockwise_shift_scale,
    "constexpr_cast": cast_constant,
    "constexpr_lut_to_dense": lut_to_dense,
    "constexpr_lut_to_sparse": lut_to_sparse,
    "constexpr_sparse_blockwise_shift_scale": sparse_blockwise_shift_scale,
    "constexpr_sparse_to_dense": sparse_to_dense,
}
PACKED: Mapping[str, Decoder] = {
    "constexpr_lut_to_dense": lut_to_dense_packed,
    "constexpr_sparse_to_dense": sparse_to_dense_packed,
}


def decode(operator: str, parameters: Parameters) -> tuple[np.ndarray, ...]:
    """The values of a constexpr operator's outputs.

    Args:
        operator: "constexpr_blockwise_shift_scale", ...
        parameters: its parameters, unpacked, by name.

    Raises:
        BadInputError: the operator is unknown, or its parameters do not fit each other.
    """
    table = PACKED if "shape" in parameters else DECODERS
    if operator not in table:
        raise BadInputError(f"The compressed constant '{operator}' is unknown.", allowed=sorted(DECODERS))
    try:
        values = table[operator](**parameters)
    except (TypeError, ValueError, IndexError) as error:
        raise BadInputError(f"The parameters of a {operator} don't fit each other: {error}.") from error
    return values if isinstance(values, tuple) else (values,)


def _blocks(shape: tuple[int, ...], groups: tuple[int, ...]) -> tuple[list[int], list[int]]:
    """Shapes that line blocks up: data as (g0, d0/g0, g1, d1/g1, ...), a value a block as (g0, 1, g1, 1, ...)."""
    if len(shape) != len(groups) or any(size % group for size, group in zip(shape, groups, strict=True)):
        raise BadInputError(f"Blocks of a constant don't divide it: shape {shape}, blocks {groups}.")
    data = [part for size, group in zip(shape, groups, strict=True) for part in (group, size // group)]
    return data, [part for group in groups for part in (group, 1)]
