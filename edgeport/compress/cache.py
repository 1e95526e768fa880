"""Steps for a cache of keys and values in integers: symmetric, one step a channel of a head, found on real texts.

Keys have few channels that are large in every token (KIVI, Liu et al. 2024, https://arxiv.org/abs/2402.02750), so each
channel gets a step of its own. In 4 bits it holds the largest value seen, or less where clipping costs less than it
saves: the ratio with the least squared error is taken. In 8 bits rounding costs next to nothing and clipping what was
never seen would cost more, so it holds a quarter more than the largest value.

Keys are seen as they are cached, with positions rotated in: what a channel holds at the end of a long text is not what
it holds at the beginning. So the texts are read at places spread over the whole context.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from edgeport.formats import CACHE_BITS, CacheFormat
from edgeport.model.decoder import Call, StepCache, attending, causal_attention
from edgeport.model.types import CacheScales, Decoder, Model

RATIOS = {8: (1.25,), 4: (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5)}
"""By width: shares of the largest value that a grid may hold."""
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

    def __init__(self, heads: int, width: int, bits: int) -> None:
        self.bits, self.ratios = bits, RATIOS[bits]
        self.largest = torch.zeros(heads, width)
        self.errors = torch.zeros(len(self.ratios), heads, width)

    def see(self, values: torch.Tensor) -> None:
        self.largest = torch.maximum(self.largest, values.abs().amax((0, 2)))

    def steps(self) -> list[torch.Tensor]:
        top = 2 ** (self.bits - 1) - 1
        return [(self.largest * ratio / top).clamp(min=SMALLEST_STEP) for ratio in self.ratios]

    def judge(self, values: torch.Tensor) -> None:
        for at, step in enumerate(self.steps()):
            self.errors[at] += (round_to(values, step, self.bits) - values).square().sum((0, 2))

    def best(self) -> torch.Tensor:
        return torch.stack(self.steps()).gather(0, self.errors.argmin(0, keepdim=True))[0]


def cache_scales(
    model: Model,
    texts: Sequence[torch.Tensor],
    form: CacheFormat,
    *,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> tuple[CacheScales, ...]:
    """The steps of every layer, from one or two passes over texts (1, S) of token ids.

    Args:
        model: a decoder, with the weights that the file has.
    """
    decoder = model.decoder
    assert decoder is not None
    bits = CACHE_BITS[form]
    seen = [[_Channels(layer.kv_heads, layer.head_dim, bits) for _ in range(2)] for layer in decoder.layers]

    def read(ids: torch.Tensor, start: int, look: Callable[[_Channels, torch.Tensor], None]) -> None:
        def attend(call: Call) -> torch.Tensor:
            for channels, values in zip(seen[call.index], (call.key, call.value), strict=True):
                look(channels, values)
            return causal_attention(call)

        positions = torch.arange(start, start + ids.shape[1])[None]
        with torch.no_grad(), attending(model.module, attend):
            model.module(
                input_ids=ids, position_ids=positions, past_key_values=StepCache(), use_cache=True, logits_to_keep=1
            )

    passes = (_Channels.see, _Channels.judge) if len(RATIOS[bits]) > 1 else (_Channels.see,)
    for number, look in enumerate(passes):
        for index, ids in enumerate(texts):
            short = ids[:, : decoder.context]
            room = decoder.context - short.shape[1]
            read(short, room * index // max(len(texts) - 1, 1), look)
            progress(number * len(texts) + index + 1, len(passes) * len(texts))
    return tuple(CacheScales(key.best(), value.best()) for key, value in seen)


def save_scales(path: Path, scales: tuple[CacheScales, ...]) -> None:
    """Write the steps of all layers to a safetensors file."""
    tensors = {f"{index}.{part}": getattr(found, part) for index, found in enumerate(scales) for part in PARTS}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def load_scales(path: Path, decoder: Decoder) -> tuple[CacheScales, ...]:
    """Undo `save_scales`."""
    tensors = load_file(path)
    return tuple(CacheScales(*(tensors[f"{index}.{part}"] for part in PARTS)) for index in range(len(decoder.layers)))
