"""Operators that arrange elements without computing: shapes, joins, splits, padding, constants.

Definitions in coremltools `tensor_transformation.py` and `tensor_operation.py`.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from edgeport.runtime.coreml.ops.arguments import Operators, Tensor, flag, integer, integers


def reshape(x: Tensor, shape: Tensor) -> Tensor:
    """x in another shape; -1 is inferred, a 0 keeps the size of x's axis that is as far from the end (1 beyond)."""
    sizes = integers(shape)
    for index, size in enumerate(sizes):
        if size == 0:
            axis = x.ndim - (len(sizes) - index)
            sizes[index] = x.shape[axis] if axis >= 0 else 1
    return x.reshape(sizes)


def reshape_like(
    x: Tensor,
    ref_tensors: tuple[Tensor, ...],
    begins: tuple[Tensor, ...],
    ends: tuple[Tensor, ...],
    end_masks: tuple[Tensor, ...],
) -> Tensor:
    """x in the shape that slices of other tensors' shapes make together."""
    shape: list[int] = []
    for reference, begin, end, open_end in zip(ref_tensors, begins, ends, end_masks, strict=True):
        shape += list(reference.shape)[integer(begin) : None if flag(open_end) else integer(end)]
    return x.reshape(shape)


def expand_dims(x: Tensor, axes: Tensor) -> Tensor:
    """Insert axes of size 1 at the given places of the result."""
    rank = x.ndim + axes.numel()
    for axis in sorted(axis % rank for axis in integers(axes)):
        x = x.unsqueeze(axis)
    return x


def squeeze(x: Tensor, axes: Tensor | None = None) -> Tensor:
    """Drop axes of size 1: all of them, or those of `axes` that are."""
    return x.squeeze() if axes is None else x.squeeze(tuple(integers(axes)))


def transpose(x: Tensor, perm: Tensor) -> Tensor:
    """Permute the axes."""
    return x.permute(integers(perm))


def flatten2d(x: Tensor, axis: Tensor | int = 1) -> Tensor:
    """Axes before `axis` as rows, the others as columns."""
    rows = 1
    for size in x.shape[: integer(axis)]:
        rows *= size
    return x.reshape(rows, -1)


def shape_of(x: Tensor) -> Tensor:
    """The shape, int32."""
    return torch.tensor(x.shape, dtype=torch.int32)


def concat(values: tuple[Tensor, ...], axis: Tensor | int, interleave: Tensor | bool = False) -> Tensor:
    """Join along an axis; `interleave` takes elements in turn."""
    dim = integer(axis)
    if flag(interleave):
        dim %= values[0].ndim
        return torch.stack(values, dim + 1).flatten(dim, dim + 1)
    # Scalars join into a vector: programs make shapes of them.
    return torch.cat([value.reshape(1) if value.ndim == 0 else value for value in values], dim)


def stack(values: tuple[Tensor, ...], axis: Tensor | int) -> Tensor:
    """Join along a new axis."""
    return torch.stack(values, integer(axis))


def split(
    x: Tensor, axis: Tensor | int, num_splits: Tensor | None = None, split_sizes: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Cut along an axis into `split_sizes`, or into `num_splits` equal parts."""
    dim = integer(axis)
    if split_sizes is not None:
        return tuple(torch.split(x, integers(split_sizes), dim))
    if num_splits is None:
        raise ValueError("split needs num_splits or split_sizes")
    return tuple(torch.split(x, x.shape[dim] // integer(num_splits), dim))


def tile(x: Tensor, reps: Tensor) -> Tensor:
    """Repeat each axis."""
    return x.repeat(integers(reps))


def pad(x: Tensor, pad: Tensor, mode: str = "constant", constant_val: Tensor | float = 0.0) -> Tensor:
    """Pad the last len(pad) / 2 axes: before and after each, in the order of the axes."""
    flat = integers(pad)
    pairs = list(zip(flat[::2], flat[1::2], strict=True))
    while len(pairs) > 1 and pairs[0] == (0, 0):  # torch reflects at most the last three axes
        pairs = pairs[1:]
    amounts = [edge for pair in reversed(pairs) for edge in pair]
    if mode == "constant":
        return functional.pad(x, amounts, value=torch.as_tensor(constant_val).item())
    lead = x.ndim - len(pairs)
    flat_x = x.reshape(1, -1, *x.shape[lead:])
    padded = functional.pad(flat_x, amounts, mode=mode)
    return padded.reshape(*x.shape[:lead], *padded.shape[2:])


def reverse(x: Tensor, axes: Tensor | None = None) -> Tensor:
    """Reverse the order along the given axes, or all."""
    return torch.flip(x, integers(axes) if axes is not None else list(range(x.ndim)))


def reverse_sequence(x: Tensor, lengths: Tensor, seq_axis: Tensor | int = 0, batch_axis: Tensor | int = 0) -> Tensor:
    """Reverse the first lengths[b] elements of `seq_axis` for each b of `batch_axis`."""
    moved = x.movedim((integer(batch_axis), integer(seq_axis)), (0, 1)).clone()
    for row, length in enumerate(integers(lengths)):
        moved[row, :length] = torch.flip(moved[row, :length], [0])
    return moved.movedim((0, 1), (integer(batch_axis), integer(seq_axis)))


def sliding_windows(x: Tensor, axis: Tensor, size: Tensor, stride: Tensor | int = 1) -> Tensor:
    """Every window of an axis: (..., d, ...) -> (..., (d - size) // stride + 1, size, ...)."""
    dim = integer(axis) % x.ndim
    return x.unfold(dim, integer(size), integer(stride)).movedim(-1, dim + 1)


def depth_to_space(x: Tensor, block_size: Tensor) -> Tensor:
    """(n, C, H, W) -> (n, C / b^2, H b, W b); the block's place is the major part of the channel."""
    n, c, h, w = x.shape
    b = integer(block_size)
    return x.reshape(n, b, b, c // b**2, h, w).permute(0, 3, 4, 1, 5, 2).reshape(n, c // b**2, h * b, w * b)


def space_to_depth(x: Tensor, block_size: Tensor) -> Tensor:
    """Undo depth_to_space."""
    n, c, h, w = x.shape
    b = integer(block_size)
    return x.reshape(n, c, h // b, b, w // b, b).permute(0, 3, 5, 1, 2, 4).reshape(n, c * b**2, h // b, w // b)


def pixel_shuffle(x: Tensor, upscale_factor: Tensor) -> Tensor:
    """(n, C f^2, H, W) -> (n, C, H f, W f); the channel is the major part."""
    return functional.pixel_shuffle(x, integer(upscale_factor))


def pixel_unshuffle(x: Tensor, downscale_factor: Tensor) -> Tensor:
    """Undo pixel_shuffle."""
    return functional.pixel_unshuffle(x, integer(downscale_factor))


def band_part(x: Tensor, lower: Tensor | int = -1, upper: Tensor | int = -1) -> Tensor:
    """Zero outside a band of the last two axes; a negative width keeps the whole triangle."""
    below, above = integer(lower), integer(upper)
    if below >= 0:
        x = torch.triu(x, -below)
    return torch.tril(x, above) if above >= 0 else x


def fill(shape: Tensor, value: Tensor | float = 0.0) -> Tensor:
    """A tensor full of one value."""
    return torch.as_tensor(value).expand(integers(shape)).clone()


def fill_like(ref_tensor: Tensor, value: Tensor | float = 0.0) -> Tensor:
    """A tensor full of one value in another's shape."""
    return torch.as_tensor(value).expand(ref_tensor.shape).clone()


def range_1d(start: Tensor, end: Tensor, step: Tensor) -> Tensor:
    """start, start + step, ... below end."""
    return torch.arange(start.item(), end.item(), step.item(), dtype=start.dtype)


def one_hot(
    indices: Tensor,
    one_hot_vector_size: Tensor,
    axis: Tensor | int = -1,
    on_value: Tensor | int = 1,
    off_value: Tensor | int = 0,
) -> Tensor:
    """`on_value` where the new axis equals the index, `off_value` elsewhere."""
    places = torch.arange(integer(one_hot_vector_size))
    hot = indices.unsqueeze(-1) == places
    on, off = torch.as_tensor(on_value), torch.as_tensor(off_value)
    return torch.where(hot, on, off).movedim(-1, integer(axis))


OPERATORS: Operators = {
    "band_part": band_part,
    "concat": concat,
    "depth_to_space": depth_to_space,
    "expand_dims": expand_dims,
    "fill": fill,
    "fill_like": fill_like,
    "flatten2d": flatten2d,
    "identity": lambda x: x,
    "one_hot": one_hot,
    "pad": pad,
    "pixel_shuffle": pixel_shuffle,
    "pixel_unshuffle": pixel_unshuffle,
    "range_1d": range_1d,
    "reshape": reshape,
    "reshape_like": reshape_like,
    "reverse": reverse,
    "reverse_sequence": reverse_sequence,
    "shape": shape_of,
    "sliding_windows": sliding_windows,
    "space_to_depth": space_to_depth,
    "split": split,
    "squeeze": squeeze,
    "stack": stack,
    "tile": tile,
    "transpose": transpose,
}
