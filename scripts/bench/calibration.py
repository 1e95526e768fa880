#!/usr/bin/env python
"""How the cost of sequential calibration grows: GPTQ to 4 bits on small random Llamas.

    OMP_NUM_THREADS=1 python scripts/bench/calibration.py --docs docs/benchmarks.md

One series of models with 2 to 16 blocks on the same inputs, one of inputs in number 8 to 64 on the same model, 128
tokens each. Every run is a fork of a process that has only imported the libraries; runs take turns, and the least
processor time of the repeats counts, which other processes disturb less than wall time. A line is fitted to each
series; how far the points are from it says whether the cost is linear. Memory is the most resident while compressing,
less what was resident before: the model being quantized, its codes, and what calibration needs beside them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import re
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

if TYPE_CHECKING:
    from edgeport.model.types import Model

COMMAND = "OMP_NUM_THREADS=1 python scripts/bench/calibration.py --docs docs/benchmarks.md"
HEADING = "## Calibration, by layers and by tokens"
TARGET = "linux-x86_64-ort"
HIDDEN, TOKENS = 256, 128
LAYERS, SAMPLES = (2, 4, 8, 16), (8, 16, 32, 64)
USUAL_LAYERS, USUAL_SAMPLES = 4, 16
"""What the other series keeps."""


@dataclass(frozen=True)
class Row:
    """One setting's cost; MB are 1e6 bytes.

    Attributes:
        parameters: of the blocks and the table together.
        added_mb: peak less what was resident before.
        block_s: processor time of each block but the first, whose time holds the start.
    """

    layers: int
    samples: int
    parameters: int
    cpu_s: float
    added_mb: float
    block_s: tuple[float, ...]

    @property
    def late_to_early(self) -> float:
        """Median time of the later half of the blocks to that of the earlier half, in one run."""
        half = len(self.block_s) // 2
        return statistics.median(self.block_s[-half:]) / statistics.median(self.block_s[:half])

    @property
    def beside_mb(self) -> float:
        """Added memory without the quantized copy (4 bytes a parameter) and its codes (1 byte)."""
        return self.added_mb - 5 * self.parameters / 1e6


@dataclass(frozen=True)
class Line:
    """y = base + slope x, by least squares; `off` is the largest distance of a point relative to its own y."""

    base: float
    slope: float
    off: float


def fit(x: Sequence[float], y: Sequence[float]) -> Line:
    """The line through the points (x, y)."""
    import numpy as np

    slope, base = np.polyfit(x, y, 1)
    values = base + slope * np.asarray(x)
    return Line(float(base), float(slope), float(np.max(np.abs(values / np.asarray(y) - 1))))


def llama(layers: int) -> Model:
    """A random Llama."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from edgeport.model.build import build_huggingface

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=layers,
        num_attention_heads=4,
        tie_word_embeddings=True,
    )
    module = AutoModelForCausalLM.from_config(config).eval()
    return build_huggingface(
        module,
        name=f"llama-{layers}",
        reference="random",
        kind="factory",
        task="text-generation",
        files={},
        assets={},
        licence=None,
        note=None,
    )


def run(layers: int, samples: int, answer: Connection) -> None:
    """Compress one model in this process, and send what it took."""
    import torch

    from edgeport.compress import apply_recipe
    from edgeport.data.samples import SampleRecord, Samples
    from edgeport.recipe import Recipe
    from edgeport.schema import parse_mapping
    from edgeport.target import load_target
    from edgeport.usage import Meter

    model = llama(layers)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 512, (samples, 1, TOKENS), generator=generator)
    inputs = [{"input_ids": row.numpy(), "attention_mask": torch.ones_like(row).numpy()} for row in ids]
    calibration = Samples(inputs, SampleRecord("random", False, {}, "all", None, samples))
    step = {"method": "gptq", "linear": "int4_g32", "embedding": "int4_g32"}
    recipe = parse_mapping(Recipe, {"name": "gptq", "summary": "gptq", "compress": [step], "gate": {}}, "bench")
    with torch.no_grad():
        model.module(**{name: torch.from_numpy(value) for name, value in inputs[0].items()})  # libraries set up
    marks: list[float] = []
    meter = Meter()
    apply_recipe(
        model,
        recipe,
        load_target(TARGET),
        calibration=calibration,
        log=lambda _block: marks.append(time.process_time()),
    )
    usage = meter.read()
    assert usage.peak_rss_mb is not None, "the kernel can't tell this peak from one before"
    assert usage.start_rss_mb is not None, "needs Linux's /proc"
    parameters = sum(value.numel() for value in model.module.parameters())
    blocks = tuple(after - before for before, after in itertools.pairwise(marks))
    answer.send(Row(layers, samples, parameters, usage.cpu_seconds, usage.peak_rss_mb - usage.start_rss_mb, blocks))


def measure(layers: int, samples: int) -> Row:
    """One setting in a fork of this process."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=run, args=(layers, samples, theirs))
    child.start()
    theirs.close()
    row: Row = ours.recv()
    child.join()
    return row


def bench(layers: Sequence[int], samples: Sequence[int], repeats: int) -> tuple[list[Row], list[Row]]:
    """The rows by layers and by samples: of each setting the least time and the least memory."""
    settings = list(dict.fromkeys([(n, USUAL_SAMPLES) for n in layers] + [(USUAL_LAYERS, n) for n in samples]))
    runs = [{setting: measure(*setting) for setting in settings} for _ in range(repeats)]

    def best(setting: tuple[int, int]) -> Row:
        rows = [found[setting] for found in runs]
        quickest = min(rows, key=lambda row: row.cpu_s)
        return replace(quickest, added_mb=min(row.added_mb for row in rows))

    return [best((n, USUAL_SAMPLES)) for n in layers], [best((USUAL_LAYERS, n)) for n in samples]


def document(by_layers: Sequence[Row], by_samples: Sequence[Row]) -> str:
    """The section of docs/benchmarks.md; every number in it comes from the rows."""
    header = "| blocks | inputs | tokens | CPU s | line | MB added | of it beside weights and codes |"
    time_by_layer = fit([row.layers for row in by_layers], [row.cpu_s for row in by_layers])
    time_by_sample = fit([row.samples for row in by_samples], [row.cpu_s for row in by_samples])

    def table(rows: Sequence[Row], line: Line, along: str) -> str:
        lines = [header, "|---|---|---|---|---|---|---|"]
        for row in rows:
            fitted = line.base + line.slope * getattr(row, along)
            lines.append(
                f"| {row.layers} | {row.samples} | {row.samples * TOKENS} | {row.cpu_s:.2f} | {fitted:.2f} "
                f"| {row.added_mb:.0f} | {row.beside_mb:.0f} |"
            )
        return "\n".join(lines)

    first, last = by_layers[0], by_layers[-1]
    few, many = by_samples[0], by_samples[-1]
    per_sample_mb = fit([row.samples for row in by_samples], [row.added_mb for row in by_samples]).slope
    return f"""{HEADING}

    {COMMAND}

`gptq` to `int4_g32`, random Llamas of width {HIDDEN}, {TOKENS} tokens an input. "line" is the least-squares line of the
series: {time_by_layer.slope:.2f} s of processor time a block, {1000 * time_by_sample.slope:.0f} ms an input. The points
are at most {100 * time_by_layer.off:.0f}% (blocks) and {100 * time_by_sample.off:.0f}% (inputs) off their lines; other
work on the machine is in that.

{table(by_layers, time_by_layer, "layers")}

{last.layers // first.layers} times the blocks take {last.cpu_s / first.cpu_s:.1f} times the time. Within the run of
{last.layers} blocks, which other processes disturb alike, the later half takes {last.late_to_early:.2f} times as long a
block as the earlier half (medians). Memory beside the quantized copy of the model and its codes goes from
{first.beside_mb:.0f} to {last.beside_mb:.0f} MB.

{table(by_samples, time_by_sample, "samples")}

{many.samples // few.samples} times the inputs take {many.cpu_s / few.cpu_s:.1f} times the time: a part of the work (the
inverse, the columns, the scale search) does not depend on them. An input takes {per_sample_mb:.2f} MB; one hidden state
of it has {TOKENS * HIDDEN * 4 / 1e6:.2f} MB.
"""


def put(path: Path, section: str) -> None:
    """Replace the section in a file of Markdown, or add it."""
    text = path.read_text()
    pattern = re.compile(rf"{re.escape(HEADING)}\n.*?(?=^## |\Z)", re.DOTALL | re.MULTILINE)
    if pattern.search(text):
        path.write_text(pattern.sub(lambda _: section + "\n", text).rstrip() + "\n")
    else:
        path.write_text(text.rstrip() + "\n\n" + section)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--layers", type=int, nargs="+", default=LAYERS)
    parser.add_argument("--samples", type=int, nargs="+", default=SAMPLES)
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output")
    parser.add_argument("--docs", type=Path, help="a file of Markdown to put the section into")
    options = parser.parse_args()
    import transformers  # noqa: F401  # the forks share what is imported here

    import edgeport.compress  # noqa: F401

    by_layers, by_samples = bench(options.layers, options.samples, options.repeats)
    if options.docs is not None:
        put(options.docs, document(by_layers, by_samples))
    if options.json:
        rows = {"layers": [asdict(row) for row in by_layers], "samples": [asdict(row) for row in by_samples]}
        print(json.dumps(rows, indent=2))
    else:
        print(document(by_layers, by_samples))


if __name__ == "__main__":
    main()
