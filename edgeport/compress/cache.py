"""Steps for a cache of keys and values in integers: symmetric, one step a channel of a head, found on real texts.

Keys have few channels that are large in every token (KIVI, Liu et al. 2024, https://arxiv.org/abs/2402.02750), so each
channel gets a step of its own. It holds the largest value seen, or less where clipping costs less than it saves: the
ratio with the least squared error is taken. Keys are seen as they are cached, with positions rotated in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from edgeport.formats import CACHE_BITS, CacheFormat
from edgeport.model.decoder import Call, StepCache, attending, causal_attention
from edgeport.model.types import CacheScales, Decoder, Model

RATIOS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5)
"""Of the largest value: what a grid may hold."""
SMALLEST_STEP = 1e-8
PARTS = ("key", "value")


def round_to(values: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """Values (B, kv_heads, S, head_dim) as the cache gives them back; the step is (kv_heads, head_dim)."""
    step = scale[None, :, None]
    top = 2 ** (bits - 1) - 1
    return (values / step).round().clamp(-top - 1, top) * step


class _Channels:
    """What was seen of one layer's keys, or values: the largest of each channel, then the error of each ratio.

    Attributes:
        largest: (kv_heads, head_dim).
        errors: (ratios, kv_heads, head_dim), sums of squares.
    """

    def __init__(self, heads: int, width: int) -> None:
        self.largest = torch.zeros(heads, width)
        self.errors = torch.zeros(len(RATIOS), heads, width)

    def see(self, values: torch.Tensor) -> None:
        self.largest = torch.maximum(self.largest, values.abs().amax((0, 2)))

    def steps(self, ratio: float, bits: int) -> torch.Tensor:
        return (self.largest * ratio / (2 ** (bits - 1) - 1)).clamp(min=SMALLEST_STEP)

    def judge(self, values: torch.Tensor, bits: int) -> None:
        for at, ratio in enumerate(RATIOS):
            rounded = round_to(values, self.steps(ratio, bits), bits)
            self.errors[at] += (rounded - values).square().sum((0, 2))

    def best(self, bits: int) -> torch.Tensor:
        every = torch.stack([self.steps(ratio, bits) for ratio in RATIOS])
        return every.gather(0, self.errors.argmin(0, keepdim=True))[0]


def cache_scales(
    model: Model,
    texts: Sequence[torch.Tensor],
    form: CacheFormat,
    *,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> tuple[CacheScales, ...]:
    """The steps of every layer, from two passes over texts (1, S) of token ids.

    Args:
        model: a decoder, with the weights that the file has.
    """
    decoder = model.decoder
    assert decoder is not None
    bits = CACHE_BITS[form]
    seen = [[_Channels(layer.kv_heads, layer.head_dim) for _ in range(2)] for layer in decoder.layers]

    def read(ids: torch.Tensor, look: Callable[[_Channels, torch.Tensor], None]) -> None:
        def attend(call: Call) -> torch.Tensor:
            for channels, values in zip(seen[call.index], (call.key, call.value), strict=True):
                look(channels, values)
            return causal_attention(call)

        positions = torch.arange(ids.shape[1])[None]
        with torch.no_grad(), attending(model.module, attend):
            model.module(
                input_ids=ids, position_ids=positions, past_key_values=StepCache(), use_cache=True, logits_to_keep=1
            )

    passes: tuple[Callable[[_Channels, torch.Tensor], None], ...] = (
        _Channels.see,
        lambda channels, values: channels.judge(values, bits),
    )
    for number, look in enumerate(passes):
        for index, ids in enumerate(texts):
            read(ids[:, : decoder.context], look)
            progress(number * len(texts) + index + 1, len(passes) * len(texts))
    return tuple(CacheScales(key.best(bits), value.best(bits)) for key, value in seen)


def save_scales(path: Path, scales: tuple[CacheScales, ...]) -> None:
    """Write the steps of all layers to a safetensors file."""
    tensors = {f"{index}.{part}": getattr(found, part) for index, found in enumerate(scales) for part in PARTS}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def load_scales(path: Path, decoder: Decoder) -> tuple[CacheScales, ...]:
    """Undo `save_scales`."""
    tensors = load_file(path)
    return tuple(CacheScales(*(tensors[f"{index}.{part}"] for part in PARTS)) for index in range(len(decoder.layers)))
