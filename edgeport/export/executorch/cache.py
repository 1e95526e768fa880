"""The buffers in which an ExecuTorch program keeps keys and values: what memory plans count and `decoder.py` makes."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from edgeport.model.types import AttentionLayer, Decoder

MOST_TOKENS = 128
"""Tokens a call at most: the program's memory is planned for so many, whatever the context."""
SLACK = MOST_TOKENS
"""Places that a layer has beyond its window: as many as a call may write."""
BYTES = {"float32": 4, "int8": 1}


@dataclass(frozen=True)
class Buffer:
    """A buffer of the program; dtype as torch names it."""

    name: str
    shape: tuple[int, ...]
    dtype: str


def most_tokens(decoder: Decoder) -> int:
    """Tokens that one call takes at most."""
    return min(MOST_TOKENS, decoder.context)


def ring(layer: AttentionLayer, decoder: Decoder) -> int | None:
    """The places of a layer that keeps no more than its window: token p lies in place p modulo their number. None where
    it keeps the whole context. A call may write over what its first token does not see any more."""
    if layer.window is None or layer.window + SLACK >= decoder.context:
        return None
    return layer.window + SLACK


def buffers(decoder: Decoder) -> list[Buffer]:
    """Every buffer of the cache: (1, places, kv_heads, head_dim), and beside integers (1, places, kv_heads, 1) of
    scales and of zero points."""
    found = []
    for index, layer in enumerate(decoder.layers):
        rows = (1, ring(layer, decoder) or decoder.context, layer.kv_heads)
        for part in ("keys", "values"):
            name = f"{part}_{index}"
            if decoder.cache == "float":
                found.append(Buffer(name, (*rows, layer.head_dim), "float32"))
            else:
                found.append(Buffer(name, (*rows, layer.head_dim), "int8"))
                found.append(Buffer(f"{name}_scale", (*rows, 1), "float32"))
                found.append(Buffer(f"{name}_zero", (*rows, 1), "int8"))
    return found


def buffer_bytes(found: list[Buffer]) -> int:
    """Bytes of several buffers."""
    return sum(prod(buffer.shape) * BYTES[buffer.dtype] for buffer in found)
