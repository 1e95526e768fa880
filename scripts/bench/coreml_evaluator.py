#!/usr/bin/env python
"""How fast edgeport's Core ML evaluator is: its calls and torch's in turn, on the same inputs, one thread.

    OMP_NUM_THREADS=1 python scripts/bench/coreml_evaluator.py
    OMP_NUM_THREADS=1 python scripts/bench/coreml_evaluator.py --model zoo:smollm2 --calls 12 --profile

Each model is exported once for iOS 18 (in fp32 and fp16) and for ONNX Runtime (fp32). A round calls each of: torch
eager, ONNX Runtime, the evaluator on the fp32 file, on the fp16 file without rounding between operators, and with it.
Medians of processor time, and of their ratios to torch's call in the same round. For a decoder a call is one token
behind a text of --prompt tokens; torch has its own cache then. The evaluator's time is no statement about Apple's
hardware.

--profile also prints which operators the time of the last variant goes to.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

if TYPE_CHECKING:
    from edgeport.export.artifact import Artifact
    from edgeport.model.types import Model
    from edgeport.runtime.decoder import Tokens

TORCH = "torch eager"
SEQUENCE = 128


@dataclass(frozen=True)
class Variant:
    """Something to call: `prepare` is not timed."""

    name: str
    call: Callable[[], object]
    prepare: Callable[[], object] = lambda: None


def lowered(model: Model, target_name: str, precision: Any, out: Path) -> Artifact:
    """The model's file for a target."""
    from edgeport.export.artifact import LoweringSettings
    from edgeport.export.dispatch import lower
    from edgeport.target import load_target

    out.mkdir()
    return lower(model, load_target(target_name), LoweringSettings(precision, "dynamic"), out)


def loaded(reference: str) -> Model:
    """The model, with a cache where it is a decoder, at a sequence of 128."""
    from edgeport.model.decoder import for_generation, is_causal_lm
    from edgeport.model.load import load_model
    from edgeport.model.shapes import axes, with_axis

    model = load_model(reference)
    if is_causal_lm(model):
        return for_generation(model, 512)
    return with_axis(model, "sequence", SEQUENCE) if "sequence" in axes(model.inputs) else model


def variants(model: Model, folder: Path, prompt: int) -> list[Variant]:
    """What is compared, torch first."""
    ort = lowered(model, "linux-x86_64-ort", "fp32", folder / "ort")
    full = lowered(model, "ios18-coreml", "fp32", folder / "fp32")
    half = lowered(model, "ios18-coreml", "fp16", folder / "fp16")
    return token_variants(model, ort, full, half, prompt) if model.decoder else call_variants(model, ort, full, half)


def call_variants(model: Model, ort: Artifact, full: Artifact, half: Artifact) -> list[Variant]:
    """One inference of a model without a cache."""
    from edgeport.runtime.coreml.session import CoreMLReferenceSession
    from edgeport.runtime.session import open_session
    from edgeport.runtime.torch import TorchSession

    inputs = {name: value.numpy() for name, value in model.example.items()}

    def variant(name: str, session: Any) -> Variant:
        return Variant(name, lambda: session.run(inputs))

    return [
        variant(TORCH, TorchSession(model)),
        variant("ONNX Runtime, fp32", open_session(ort)),
        variant("evaluator, fp32 file", CoreMLReferenceSession(full)),
        variant("evaluator, fp16 file, not rounded", CoreMLReferenceSession(half, "fp32")),
        variant("evaluator, fp16 file", CoreMLReferenceSession(half)),
    ]


def token_variants(model: Model, ort: Artifact, full: Artifact, half: Artifact, prompt: int) -> list[Variant]:
    """One token of a decoder, behind a text."""
    import torch

    from edgeport.runtime.coreml.decoder import CoreMLReferenceTokens
    from edgeport.runtime.session import open_tokens

    ids = np.random.default_rng(0).integers(0, 1000, prompt)
    cached: Any = None

    def read() -> None:
        nonlocal cached
        with torch.inference_mode():
            cached = model.module(input_ids=torch.from_numpy(ids)[None], use_cache=True).past_key_values

    def step() -> None:
        with torch.inference_mode():
            model.module(input_ids=torch.from_numpy(ids[:1])[None], past_key_values=cached, use_cache=True)

    def back() -> None:
        if more := cached.get_seq_length() - prompt:
            cached.crop(-more)

    def variant(name: str, tokens: Tokens) -> Variant:
        tokens.feed(ids)
        return Variant(name, lambda: tokens.feed(ids[:1]), lambda: tokens.rewind(prompt))

    read()
    return [
        Variant(TORCH, step, back),
        variant("ONNX Runtime, fp32", open_tokens(ort)),
        variant("evaluator, fp32 file", CoreMLReferenceTokens(full)),
        variant("evaluator, fp16 file, not rounded", CoreMLReferenceTokens(half, "fp32")),
        variant("evaluator, fp16 file", CoreMLReferenceTokens(half)),
    ]


def timed(found: list[Variant], calls: int) -> Mapping[str, list[float]]:
    """Processor milliseconds of each variant, round by round; two rounds before them are not counted."""
    times: dict[str, list[float]] = {variant.name: [] for variant in found}
    for index in range(calls + 2):
        for variant in found:
            variant.prepare()
            start = time.process_time_ns()
            variant.call()
            if index >= 2:
                times[variant.name].append((time.process_time_ns() - start) / 1e6)
    return times


def table(model: str, times: Mapping[str, list[float]]) -> str:
    """Rows of medians."""
    lines = []
    for name, values in times.items():
        ratio = statistics.median(a / b for a, b in zip(values, times[TORCH], strict=True))
        lines.append(f"| {model} | {name} | {statistics.median(values):.1f} | {ratio:.2f} |")
    return "\n".join(lines)


def profile(variant: Variant, calls: int) -> str:
    """Milliseconds a call by operator."""
    from edgeport.runtime.coreml.evaluate import Evaluator

    spent: Counter[str] = Counter()
    plain = Evaluator._run_step

    def watched(self: Any, step: Any, *rest: Any) -> Any:
        start = time.perf_counter_ns()
        try:
            return plain(self, step, *rest)
        finally:
            spent[step.operation.type] += time.perf_counter_ns() - start

    start = time.perf_counter_ns()
    Evaluator._run_step = watched  # type: ignore[method-assign]
    try:
        for _ in range(calls):
            variant.prepare()
            variant.call()
    finally:
        Evaluator._run_step = plain  # type: ignore[method-assign]
    whole = time.perf_counter_ns() - start
    rows = [f"{name:30} {value / calls / 1e6:8.2f}" for name, value in spent.most_common(14)]
    rest = f"{'rounding and the loop itself':30} {(whole - sum(spent.values())) / calls / 1e6:8.2f}"
    return "\n".join([*rows, rest])


def main() -> int:
    import torch

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", action="append", help="zoo:minilm and zoo:efficientnet-lite0 when left out")
    parser.add_argument("--calls", type=int, default=30)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--profile", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    print("| model | what runs | CPU ms | of torch |\n|---|---|---|---|")
    for reference in given.model or ["zoo:minilm", "zoo:efficientnet-lite0"]:
        model = loaded(reference)
        with tempfile.TemporaryDirectory() as folder:
            found = variants(model, Path(folder), given.prompt)
            print(table(reference, timed(found, given.calls)), flush=True)
            if given.profile:
                print(profile(found[-1], given.calls), file=sys.stderr, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
