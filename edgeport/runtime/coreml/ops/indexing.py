"""Slices, gathers and scatters (coremltools `tensor_transformation.py`, `scatter_gather.py`).

From iOS 17 on, indices outside an axis (negative ones too) have no defined result; here they are an error, so
that no evidence rests on them. Older programs count negative indices from the end. The parameter
`validate_indices` tells the two apart: only the iOS 17 operators have it.
"""

from __future__ import annotations

from typing import Any

import torch

from edgeport.runtime.coreml.ops.arguments import Operators, Tensor, integer, integers

REDUCTIONS = {"mul": "prod", "div": "prod", "max": "amax", "min": "amin"}


def slice_by_index(
    x: Tensor,
    begin: Tensor,
    end: Tensor,
    stride: Tensor | None = None,
    begin_mask: Tensor | None = None,
    end_mask: Tensor | None = None,
    squeeze_mask: Tensor | None = None,
) -> Tensor:
    """x[begin:end:stride, ...] as numpy has it; masked bounds are open, squeezed axes take the element at begin."""
    index = _slices(x, begin, end, stride, begin_mask, end_mask, squeeze_mask)
    picked = _take(x, index)
    squeezed = [axis for axis, flagged in enumerate(integers(squeeze_mask)) if flagged]
    return picked.squeeze(tuple(squeezed)) if squeezed else picked


def slice_by_size(x: Tensor, begin: Tensor, size: Tensor) -> Tensor:
    """`size` elements of each axis from `begin` on; -1 takes all that remain."""
    index = []
    for axis, (first, count) in enumerate(zip(integers(begin), integers(size), strict=True)):
        start = first % x.shape[axis] if first < 0 else first
        index.append(slice(start, None if count == -1 else start + count))
    return x[tuple(index)]


def slice_update(
    x: Tensor,
    update: Tensor,
    begin: Tensor,
    end: Tensor,
    stride: Tensor | None = None,
    begin_mask: Tensor | None = None,
    end_mask: Tensor | None = None,
    squeeze_mask: Tensor | None = None,
    *,
    in_place: bool = False,
) -> Tensor:
    """x with its slice (as slice_by_index takes it) replaced by `update`; a copy, unless `in_place`."""
    index = _slices(x, begin, end, stride, begin_mask, end_mask, squeeze_mask)
    for axis, flagged in enumerate(integers(squeeze_mask)):
        if flagged:
            update = update.unsqueeze(axis)
    out = x if in_place else x.clone()
    out[_mesh(x, index)] = update
    return out


def _slices(
    x: Tensor,
    begin: Tensor,
    end: Tensor,
    stride: Tensor | None,
    begin_mask: Tensor | None,
    end_mask: Tensor | None,
    squeeze_mask: Tensor | None,
) -> list[range]:
    """The indices that a slice takes of each axis; a squeezed axis takes the one at `begin`, whatever `end` says."""
    single = integers(squeeze_mask) or [0] * x.ndim
    steps = integers(stride) or [1] * x.ndim
    open_begin = integers(begin_mask) or [0] * x.ndim
    open_end = integers(end_mask) or [0] * x.ndim
    index = []
    for axis, (first, last, step) in enumerate(zip(integers(begin), integers(end), steps, strict=True)):
        if single[axis]:
            first = first % x.shape[axis] if first < 0 else first
            index.append(range(first, first + 1))
            continue
        bounds = slice(None if open_begin[axis] else first, None if open_end[axis] else last, step)
        index.append(range(*bounds.indices(x.shape[axis])))
    return index


def _take(x: Tensor, index: list[range]) -> Tensor:
    for axis, places in enumerate(index):
        if places.step > 0:
            x = x[(slice(None),) * axis + (slice(places.start, max(places.stop, places.start), places.step),)]
        else:
            x = torch.index_select(x, axis, torch.tensor(list(places), dtype=torch.int64))
    return x


def _mesh(x: Tensor, index: list[range]) -> tuple[Any, ...]:
    """An index that torch can assign through: slices, or a grid of indices when a step is negative."""
    if all(places.step > 0 for places in index):
        return tuple(slice(places.start, max(places.stop, places.start), places.step) for places in index)
    grids = torch.meshgrid(*(torch.tensor(list(places), dtype=torch.int64) for places in index), indexing="ij")
    return tuple(grids)


def checked(indices: Tensor, sizes: Tensor | int, validate_indices: Tensor | bool | None) -> Tensor:
    """int64 indices from the front of axes of the given sizes.

    Raises:
        IndexError: an index for which Core ML defines no result.
    """
    places = indices.to(torch.int64)
    if validate_indices is None:
        places = torch.where(places < 0, places + sizes, places)
    if bool(((places < 0) | (places >= sizes)).any()):
        raise IndexError("an index lies outside its axis: Core ML defines no result for it")
    return places


def gather(
    x: Tensor,
    indices: Tensor,
    axis: Tensor | int = 0,
    batch_dims: Tensor | int = 0,
    validate_indices: Tensor | bool | None = None,
) -> Tensor:
    """Slices of x along an axis: shape x.shape[:axis] + indices.shape[batch_dims:] + x.shape[axis + 1:]."""
    dim, batch = integer(axis) % x.ndim, integer(batch_dims)
    places = checked(indices, x.shape[dim], validate_indices)
    if batch == 0:
        picked = torch.index_select(x, dim, places.reshape(-1))
        return picked.reshape((*x.shape[:dim], *places.shape, *x.shape[dim + 1 :]))
    lead = x.shape[:batch]
    rows = zip(x.reshape(-1, *x.shape[batch:]), places.reshape(-1, *places.shape[batch:]), strict=True)
    out = torch.stack(
        [
            torch.index_select(row, dim - batch, index.reshape(-1)).reshape(
                *row.shape[: dim - batch], *index.shape, *row.shape[dim - batch + 1 :]
            )
            for row, index in rows
        ]
    )
    return out.reshape(*lead, *out.shape[1:])


def gather_along_axis(
    x: Tensor, indices: Tensor, axis: Tensor | int = 0, validate_indices: Tensor | bool | None = None
) -> Tensor:
    """out[..., i, ...] = x[..., indices[..., i, ...], ...]; other axes broadcast."""
    dim = integer(axis) % x.ndim
    places = checked(indices, x.shape[dim], validate_indices)
    return torch.take_along_dim(x, places, dim)


def gather_nd(
    x: Tensor, indices: Tensor, batch_dims: Tensor | int = 0, validate_indices: Tensor | bool | None = None
) -> Tensor:
    """x at the coordinates that the last axis of `indices` spells, after `batch_dims` shared axes."""
    batch, depth = integer(batch_dims), indices.shape[-1]
    places = checked(indices, torch.tensor(x.shape[batch : batch + depth]), validate_indices)
    lead = [
        torch.arange(size).reshape([-1 if axis == position else 1 for axis in range(places.ndim - 1)])
        for position, size in enumerate(x.shape[:batch])
    ]
    return x[(*lead, *places.unbind(-1))]


def scatter_nd(
    data: Tensor,
    indices: Tensor,
    updates: Tensor,
    mode: str = "add",
    validate_indices: Tensor | bool | None = None,
) -> Tensor:
    """data changed by `updates` at the coordinates that the last axis of `indices` spells."""
    depth = indices.shape[-1]
    places = checked(indices, torch.tensor(data.shape[:depth]), validate_indices)
    rows = torch.zeros(places.shape[:-1], dtype=torch.int64)
    for axis in range(depth):
        rows = rows * data.shape[axis] + places[..., axis]
    table = data.reshape(-1, *data.shape[depth:])
    flat = updates.reshape(-1, *data.shape[depth:])
    index = rows.reshape(-1, *[1] * (flat.ndim - 1)).expand(flat.shape)
    return _scatter(table, 0, index, flat, mode).reshape(data.shape)


def scatter(
    data: Tensor,
    indices: Tensor,
    updates: Tensor,
    axis: Tensor | int = 0,
    mode: str = "add",
    validate_indices: Tensor | bool | None = None,
) -> Tensor:
    """data changed by the slices of `updates` at places of an axis; indices is a vector."""
    dim = integer(axis) % data.ndim
    places = checked(indices, data.shape[dim], validate_indices)
    shape = [1] * data.ndim
    shape[dim] = -1
    return _scatter(data, dim, places.reshape(shape).expand(updates.shape), updates, mode)


def scatter_along_axis(
    data: Tensor,
    indices: Tensor,
    updates: Tensor,
    axis: Tensor | int = 0,
    mode: str = "add",
    validate_indices: Tensor | bool | None = None,
) -> Tensor:
    """data changed by each element of `updates` at the place of an axis that `indices` holds for it."""
    dim = integer(axis) % data.ndim
    return _scatter(data, dim, checked(indices, data.shape[dim], validate_indices), updates, mode)


def _scatter(data: Tensor, dim: int, index: Tensor, updates: Tensor, mode: str) -> Tensor:
    if mode == "update":
        return torch.scatter(data, dim, index, updates)
    if mode in ("add", "sub"):
        return torch.scatter_add(data, dim, index, updates if mode == "add" else -updates)
    if mode not in REDUCTIONS:
        raise NotImplementedError(f"scatter mode '{mode}'")
    values = torch.reciprocal(updates) if mode == "div" else updates
    return torch.scatter_reduce(data, dim, index, values, REDUCTIONS[mode])


OPERATORS: Operators = {
    "gather": gather,
    "gather_along_axis": gather_along_axis,
    "gather_nd": gather_nd,
    "non_zero": lambda x: torch.nonzero(x),
    "scatter": scatter,
    "scatter_along_axis": scatter_along_axis,
    "scatter_nd": scatter_nd,
    "slice_by_index": slice_by_index,
    "slice_by_size": slice_by_size,
    "slice_update": slice_update,
}
