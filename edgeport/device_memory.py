"""What a file will take of a device's memory, before it is made: weights, cache, activations. Too much is refused.

Weights and cache are counted exactly. The rest is an estimate until the file is there, held against what was seen of a
fresh process on x86-64: SmolLM2 with ONNX Runtime 1.31 and a prompt of 2048 tokens 386, 456 and 923 MB in int4, int8
and float32, planned 371, 445 and 930; with ExecuTorch 1.4 the plan was 0.85 to 1 of what was seen (MiniLM, SmolLM2,
EfficientNet). The program's own code is not in it: 46 MB for ONNX Runtime under Python.
"""

from __future__ import annotations

import bisect
from dataclasses import replace
from typing import TYPE_CHECKING

from edgeport.errors import MeasurementError, TargetRefusesError
from edgeport.target import RuntimeName, Target
from edgeport.validate.evidence import MemoryPlan

if TYPE_CHECKING:
    from collections.abc import Callable

    from edgeport.export.artifact import Artifact
    from edgeport.model.types import Decoder, Model

SESSION_BYTES: dict[RuntimeName, int] = {"onnxruntime": 12_000_000, "executorch": 20_000_000, "coreml": 20_000_000}
"""What a loaded small model takes beside its weights and activations. Core ML's is a guess."""

ACTIVATION_COPIES: dict[RuntimeName, float] = {"onnxruntime": 3.0, "executorch": 1.5, "coreml": 1.0}
"""Memory for activations as a multiple of what is alive at once: arenas grow in powers of two, and layers with
activations in 8 bits hold both forms."""

SMALLEST_CONTEXT = 2


def activation_bytes(model: Model, runtime: RuntimeName) -> Callable[[int | None], int] | None:
    """What the largest call takes for a context (None for models without a cache); None where it can't be counted."""
    from edgeport.model.live import live_bytes

    copies = ACTIVATION_COPIES[runtime]
    try:
        live = live_bytes(model)
    except MeasurementError:
        return None

    def at(context: int | None) -> int:
        if context is None:
            return int(copies * live.at_example)
        tokens = context if runtime != "executorch" else min(context, _most_tokens())
        return int(copies * live.at(tokens))

    return at


def _most_tokens() -> int:
    from edgeport.export.executorch.cache import MOST_TOKENS

    return MOST_TOKENS


def plan_memory(model: Model, target: Target, *, weights: int, repacked: int) -> MemoryPlan:
    """Plan an artifact's memory.

    Args:
        weights: bytes of the file.
        repacked: bytes of weights that the runtime holds in two forms at once while it loads the file.
    """
    activations = activation_bytes(model, target.runtime)
    grows = target.onnxruntime is not None and target.onnxruntime.attention == "standard"
    loading = repacked + SESSION_BYTES[target.runtime]
    ram = None if target.device.ram_gb is None else int(target.device.ram_gb * 1e9)

    def total(decoder: Decoder | None) -> tuple[int, int]:
        from edgeport.export.dispatch import cache_bytes

        cache = 0 if decoder is None else cache_bytes(decoder, target)
        live = 0 if activations is None else activations(None if decoder is None else decoder.context)
        # A cache that grows comes out of a call beside the one that went in.
        return cache, live + cache if grows else live

    cache, live = total(model.decoder)
    longest = None
    if model.decoder is not None and ram is not None:
        decoder = model.decoder
        room = ram - weights - loading
        fits = bisect.bisect_right(
            range(SMALLEST_CONTEXT, decoder.context + 1), room, key=lambda n: sum(total(replace(decoder, context=n)))
        )
        longest = SMALLEST_CONTEXT + fits - 1 if fits else 0
    return MemoryPlan(
        context=None if model.decoder is None else model.decoder.context,
        weights_bytes=weights,
        cache_bytes=cache,
        activations_bytes=None if activations is None else live,
        activations_from="estimate",
        loading_bytes=loading,
        total_bytes=weights + cache + live + loading,
        ram_bytes=ram,
        longest_context=longest,
    )


def planned_by(plan: MemoryPlan, artifact: Artifact) -> MemoryPlan:
    """The plan with what the file itself says: its bytes, and ExecuTorch's arena, which holds the cache as well."""
    from edgeport.validate.size import model_bytes

    weights, arena = model_bytes(artifact), artifact.facts.get("planned_memory_bytes")
    total = plan.total_bytes + weights - plan.weights_bytes
    if arena is None:
        return plan.model_copy(update={"weights_bytes": weights, "total_bytes": total})
    live = int(arena) - plan.cache_bytes
    found = {"activations_bytes": live, "activations_from": "planned arena", "weights_bytes": weights}
    return plan.model_copy(update={**found, "total_bytes": total + live - (plan.activations_bytes or 0)})


def check_fits(plan: MemoryPlan, target: Target) -> None:
    """Refuse what the device can't hold.

    Raises:
        TargetRefusesError: naming the parts, and the largest context that fits.
    """
    if plan.ram_bytes is None or plan.total_bytes <= plan.ram_bytes:
        return
    parts = [("weights", plan.weights_bytes), ("keys and values", plan.cache_bytes)]
    parts += [("activations", plan.activations_bytes or 0), ("loading", plan.loading_bytes)]
    words = ", ".join(f"{name} {size / 1e9:.3g} GB" for name, size in parts if size)
    at = "" if plan.context is None else f" with a context of {plan.context} tokens"
    raise TargetRefusesError(
        f"The model needs {plan.total_bytes / 1e9:.3g} GB{at} ({words}); "
        f"the device of {target.name!r} has {plan.ram_bytes / 1e9:.3g} GB.",
        where="--context" if plan.longest_context else "[device] ram_gb",
        allowed=f"a context of at most {plan.longest_context} tokens" if plan.longest_context else None,
        next_step=(
            f"Give --context {plan.longest_context}, or keep keys and values in fewer bits (`kv_cache` in the recipe)."
            if plan.longest_context
            else "Choose a recipe with fewer bits a weight, or a device with more memory."
        ),
    )
