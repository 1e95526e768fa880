"""Schemas of what the file takes: bytes, memory, operations, and what it cost to make it."""

from __future__ import annotations

from typing import Literal

from edgeport.schema import Strict


class Size(Strict):
    """Bytes on disk of the model file(s) alone, and of the fp32 artifact of the same runtime.

    `baseline_bytes` and `ratio` are absent where there is no such artifact to compare with.
    """

    bytes: int
    baseline_bytes: int | None
    ratio: float | None
    predicted_bytes: int | None = None


class Memory(Strict):
    """Measured in a fresh process that only loads the file and runs it once.

    Attributes:
        peak_rss_mb: most memory ever resident in that process (VmHWM on Linux), MB (1e6 bytes).
        runtime_rss_mb: resident after importing the runtime, before loading the file.
        baseline_peak_rss_mb: the same for the fp32 artifact.
        load_ms: time to load the file, which the system had in memory.
        cold_load_ms: the same after the system was made to forget the file; None where it can't be.
        first_run_ms: time of the first inference.
        tokens: that a decoder read meanwhile: as many as its cache holds.
    """

    peak_rss_mb: float
    runtime_rss_mb: float
    baseline_peak_rss_mb: float | None
    load_ms: float
    cold_load_ms: float | None = None
    first_run_ms: float
    tokens: int | None = None


class MemoryPlan(Strict):
    """What the file was planned to take of a device's memory (`edgeport.device_memory`), bytes. What it took of this
    machine's, beside the runtime's own code, is `Memory.peak_rss_mb - Memory.runtime_rss_mb`.

    Attributes:
        context: tokens that the cache holds; None without a cache.
        weights_bytes: of the file.
        cache_bytes: of keys and values, when the cache is full.
        activations_bytes: of the largest call; None where it can't be counted.
        activations_from: "planned arena" where the file itself says so.
        loading_bytes: estimate of what loading takes beside.
        ram_bytes: of the target's device; None where the target's file does not say.
        longest_context: the largest context, up to the one asked for, that fits into it; 0 where none does.
    """

    context: int | None
    weights_bytes: int
    cache_bytes: int
    activations_bytes: int | None
    activations_from: Literal["estimate", "planned arena"]
    loading_bytes: int
    total_bytes: int
    ram_bytes: int | None
    longest_context: int | None


class Work(Strict):
    """What one inference has to do (`edgeport.validate.work`), and what the machine that measured can do.

    Attributes:
        input_shapes: counted at; of a decoder with a cache the text before the one token that is counted.
        flops: operations, 2 for a multiply-add.
        weight_bytes: of the file that one inference reads; activation_bytes: that layers with weights read and give, in
            float32; cache_bytes: a decoder's keys and values.
        peak_gflops, bandwidth_gb_s: of the machine, with the threads of the latency run; None where it runs no such
            file.
    """

    input_shapes: dict[str, tuple[int, ...]]
    flops: int
    weight_bytes: int
    activation_bytes: int
    cache_bytes: int = 0
    peak_gflops: float | None = None
    bandwidth_gb_s: float | None = None

    @property
    def moved_bytes(self) -> int:
        """All of them."""
        return self.weight_bytes + self.activation_bytes + self.cache_bytes


class Products(Strict):
    """Operations of the products with weights in one call, 2 for a multiply-add (`edgeport.validate.products`).

    Attributes:
        input_shapes: counted at.
        file: as the shipped file makes them; model: as the compressed torch model does.
    """

    input_shapes: dict[str, tuple[int, ...]]
    file: int
    model: int


class CompressionCost(Strict):
    """What compressing the model took, where it was compressed; the stage cache keeps it with the weights.

    Attributes:
        cpu_seconds: processor time of all threads.
        start_rss_mb: resident when it began, with the libraries and the float model, MB (1e6 bytes).
        peak_rss_mb: most memory resident meanwhile; absent where the system can't tell it from a higher peak before.
        weights: how many were quantized.
        weights_before: how many of them an interrupted run had finished; their cost is not in here.
        samples: calibration inputs; 0 for a method that needs none.
        tokens: of these inputs together; absent for other inputs than text.
    """

    cpu_seconds: float
    start_rss_mb: float | None
    peak_rss_mb: float | None
    weights: int
    weights_before: int
    samples: int
    tokens: int | None
