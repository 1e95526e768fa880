"""A cache as a Core ML state: the two operators that a traced program has for it, and what coremltools makes of them.

Traced as plain slice assignments, a cache would be read once, changed as a whole by each layer, and written once at
the program's end. What Core ML updates in place is one slice_update between a read and a write of the state; so a
layer's write is an operator of its own here, and becomes exactly that. Casts stand on the rows alone: states are
float16, whatever the arithmetic.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import numpy as np
import torch


@torch.library.custom_op("edgeport_coreml::write", mutates_args=())
def write(cache: torch.Tensor, rows: torch.Tensor, layer: int, start: int) -> torch.Tensor:
    """The cache (layers, 1, heads, context, width) with rows (1, heads, S, width) of one layer from `start` on."""
    written = cache.clone()
    written[layer, :, :, start : start + rows.shape[2]] = rows
    return written


@write.register_fake
def _(cache: torch.Tensor, rows: torch.Tensor, layer: int, start: int) -> torch.Tensor:
    return torch.empty_like(cache)


@torch.library.custom_op("edgeport_coreml::read", mutates_args=())
def read(cache: torch.Tensor, layer: int, length: int) -> torch.Tensor:
    """The first `length` rows of one layer, (1, heads, length, width)."""
    return cache[layer, :, :, :length].clone()


@read.register_fake
def _(cache: torch.Tensor, layer: int, length: int) -> torch.Tensor:
    _, batch, heads, _, width = cache.shape
    return cache.new_empty(batch, heads, length, width)


ROWS = (False, True, True, False, True)
"""Which bounds of a slice of a cache are open: all heads and widths, of some layers and rows."""


def _builder() -> Any:
    return import_module("coremltools.converters.mil").Builder


def _stored(context: Any, name: str) -> Any:
    """The cache as the state holds it, in float16: coremltools puts a cast to float32 behind each reading."""
    value = context[name]
    return value.op.x if value.op is not None and value.op.op_type == "cast" else value


def _bound(context: Any, layer: int, row: Any) -> Any:
    """A corner of a slice: a layer, and a row that is a number, or the name of one that a call's shapes decide."""
    builder = _builder()
    value = context[row] if isinstance(row, str) else row
    if isinstance(value, int):
        return np.array([layer, 0, 0, value, 0], np.int32)
    vector = builder.expand_dims(x=value, axes=[0]) if value.rank == 0 else value
    return builder.concat(values=[np.array([layer, 0, 0], np.int32), vector, np.array([0], np.int32)], axis=0)


def _convert_write(context: Any, node: Any) -> None:
    builder = _builder()
    cache_name, rows_name, layer, start = node.inputs
    rows = builder.cast(x=context[rows_name], dtype="fp16")
    begin = _bound(context, layer, start)
    count = builder.slice_by_index(x=builder.shape(x=rows), begin=[2], end=[3])
    size = builder.concat(values=[np.array([1, 0, 0], np.int32), count, np.array([0], np.int32)], axis=0)
    updated = builder.slice_update(
        x=_stored(context, cache_name),
        update=builder.expand_dims(x=rows, axes=[0]),
        begin=begin,
        end=builder.add(x=begin, y=size),
        begin_mask=ROWS,
        end_mask=ROWS,
    )
    state = context.name_to_source_state[cache_name]
    context.name_to_source_state[node.name] = state
    # The state has these rows from here on, so nothing is left of the write with which torch ends the program.
    context.torch_graph.output_name_to_target_buffer_name.clear()
    now = builder.coreml_update_state(state=state, value=updated)
    context.add(builder.cast(x=now, dtype="fp32", name=node.name))


def _convert_read(context: Any, node: Any) -> None:
    builder = _builder()
    cache_name, layer, length = node.inputs
    rows = builder.slice_by_index(
        x=_stored(context, cache_name),
        begin=np.array([layer, 0, 0, 0, 0], np.int32),
        end=_bound(context, layer + 1, length),
        begin_mask=ROWS,
        end_mask=ROWS,
        squeeze_mask=(True, False, False, False, False),
    )
    context.add(builder.cast(x=rows, dtype="fp32", name=node.name))


@contextlib.contextmanager
def conversions() -> Iterator[None]:
    """Let coremltools know the two operators."""
    registry: Any = import_module("coremltools.converters.mil.frontend.torch.torch_op_registry")._TORCH_OPS_REGISTRY
    known = registry.name_to_func_mapping
    known.update({"edgeport_coreml::write": _convert_write, "edgeport_coreml::read": _convert_read})
    try:
        yield
    finally:
        known.pop("edgeport_coreml::write", None)
        known.pop("edgeport_coreml::read", None)
