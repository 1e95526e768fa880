"""What one inference has to do: operations, and bytes that it can't help moving. With the machine's own two limits they
make the roofline (Williams, Waterman & Patterson 2009): no file runs faster than the slower of the two.

Operations are counted in the torch model at the shapes that latency was timed with (2 for a multiply-add, of matrix
products, convolutions and attention). Bytes are the least that must move: every stored weight once, of an embedding the
rows that are looked up, what each layer with weights reads and gives, and a decoder's cache.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgeport.validate.evidence import Latency, Work

if TYPE_CHECKING:
    import numpy as np
    import torch

    from edgeport.model.types import Decoder, Model

    Arrays = Mapping[str, np.ndarray]

GEMM_SIZE = 384
COPY_BYTES = 32_000_000
"""Larger than what one core may use of the last cache on most processors."""
TRIES = 40
"""Each is a few milliseconds, so that on a busy machine one at least is not interrupted."""
FLOAT_BYTES = 4


@dataclass(frozen=True)
class Roofline:
    """Where a file stands under the roof.

    Attributes:
        intensity: operations a byte.
        achieved_gflops: operations over the median latency, 1e9 a second.
        attainable_gflops: the roof at this intensity.
        mfu: achieved over the float32 peak of the same threads; integer kernels may get above 1.
        bound: what the roof is made of here.
    """

    intensity: float
    achieved_gflops: float
    attainable_gflops: float
    mfu: float
    bound: str


def roofline(work: Work, latency: Latency) -> Roofline | None:
    """The roofline of a run; None where the machine's limits were not measured, or at other shapes."""
    if work.peak_gflops is None or work.bandwidth_gb_s is None or work.input_shapes != latency.input_shapes:
        return None
    intensity = work.flops / work.moved_bytes
    memory = intensity * work.bandwidth_gb_s
    achieved = work.flops / latency.p50_ms / 1e6
    return Roofline(
        intensity=intensity,
        achieved_gflops=achieved,
        attainable_gflops=min(memory, work.peak_gflops),
        mfu=achieved / work.peak_gflops,
        bound="memory" if memory < work.peak_gflops else "arithmetic",
    )


def count_work(model: Model, inputs: Arrays, *, file_bytes: int, stored: Mapping[str, int]) -> Work:
    """Operations and bytes of one inference; of a decoder with a cache, of one more token behind the text.

    Args:
        inputs: one call's, as latency is timed with.
        file_bytes: of the model file: what is no embedding is read once, graph and names included.
        stored: bytes in the file of each embedding's table that nothing else uses, by parameter name.
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from edgeport.runtime.torch import as_tensor

    specs = {spec.name: spec for spec in model.inputs}
    tensors = {name: as_tensor(specs[name], value) for name, value in inputs.items()}
    options: dict[str, Any] = {}
    if model.decoder is not None:
        tensors = {name: value[:, -1:] for name, value in tensors.items()}
        options = {"use_cache": False, "logits_to_keep": 1}
    traffic = _Traffic(model.module, stored)
    counter = FlopCounterMode(display=False)
    # Fused attention kernels of the processor are unknown to the counter: their plain form is counted.
    with traffic, torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        model.module(**tensors, **options)
    flops, cache_bytes = int(counter.get_total_flops()), 0
    if model.decoder is not None:
        length = int(next(iter(inputs.values())).shape[-1])
        flops += attention_flops(model.decoder, length - 1)
        cache_bytes = model.decoder.cached_values * length * FLOAT_BYTES
    return Work(
        input_shapes={name: tuple(value.shape) for name, value in inputs.items()},
        flops=flops,
        weight_bytes=file_bytes - traffic.unread,
        activation_bytes=traffic.bytes,
        cache_bytes=cache_bytes,
    )


def attention_flops(decoder: Decoder, past: int) -> int:
    """Operations of one token's attention over `past` tokens of a cache: two products, 2 a multiply-add."""
    seen = [min(past, past if layer.window is None else layer.window - 1) for layer in decoder.layers]
    return sum(4 * layer.heads * layer.head_dim * n for layer, n in zip(decoder.layers, seen, strict=True))


class _Traffic:
    """Counts, while a module runs, the bytes that its layers with weights read and give, and embedding rows unread."""

    def __init__(self, module: torch.nn.Module, stored: Mapping[str, int]) -> None:
        self.module, self.stored = module, stored
        self.bytes = 0
        self.unread = 0
        self._hooks: list[Any] = []

    def __enter__(self) -> _Traffic:
        for name, layer in self.module.named_modules():
            if next(layer.parameters(recurse=False), None) is not None and next(layer.children(), None) is None:
                hook = self._hook(f"{name}.weight")
                self._hooks.append(layer.register_forward_hook(hook, with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _hook(self, name: str) -> Any:
        import torch

        def count(layer: Any, given: tuple[Any, ...], named: dict[str, Any], result: Any) -> None:
            tensors = [value for value in (*given, *named.values(), result) if isinstance(value, torch.Tensor)]
            self.bytes += sum(value.numel() * value.element_size() for value in tensors)
            if name in self.stored:
                rows = int(torch.unique(tensors[0]).numel())
                self.unread += round(self.stored[name] * (1 - rows / layer.weight.shape[0]))

        return count


def machine_limits(threads: int) -> tuple[float, float]:
    """This machine's float32 peak (1e9 operations a second, of a matrix product) and bandwidth (1e9 bytes a second, of
    a copy, reads and writes counted), with so many threads: the best of TRIES.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        left, right = torch.ones(GEMM_SIZE, GEMM_SIZE), torch.ones(GEMM_SIZE, GEMM_SIZE)
        product = torch.empty(GEMM_SIZE, GEMM_SIZE)
        source = torch.ones(COPY_BYTES // FLOAT_BYTES)
        target = torch.empty_like(source)

        def best(call: Any) -> float:
            times = []
            for _ in range(TRIES + 1):
                start = time.perf_counter()
                call()
                times.append(time.perf_counter() - start)
            return min(times[1:])

        arithmetic = 2 * GEMM_SIZE**3 / best(lambda: torch.mm(left, right, out=product))
        bandwidth = 2 * COPY_BYTES / best(lambda: target.copy_(source))
    finally:
        torch.set_num_threads(before)
    return arithmetic / 1e9, bandwidth / 1e9
