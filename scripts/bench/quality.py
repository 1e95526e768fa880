#!/usr/bin/env python
"""Compression quality: edgeport's methods against other tools', measured on the file that each of them ships.

    OMP_NUM_THREADS=1 python scripts/bench/quality.py --out build/quality --docs docs/quality.md

Every row is a file made from the same float model and run by ONNX Runtime on the same real inputs (64 of the parity
slice), which no method was calibrated on; the reference is the float model in PyTorch. Methods that calibrate, ours and
the others', see the same inputs of the calibration slice. Rows are kept in --out and made once: a stopped run goes on
where it was. `--models minilm --rows 'edgeport*int8*'` takes some of them, `--fresh` makes them again, and `--latency`
times the files against the float file, which needs a quiet machine. `--nncf-python` is an interpreter with NNCF in it
(`python -m venv V && V/bin/pip install nncf onnx==... onnxruntime==...`, with the versions here).
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
from quality_docs import write_docs
from quality_peers import Peer, export_plain, peers
from quality_table import OURS, Result, duel_table, result_table
from rich.console import Console

from edgeport.compress import apply_recipe
from edgeport.data.samples import samples
from edgeport.export.artifact import Artifact, LoweringSettings
from edgeport.export.onnx.lower import lower
from edgeport.model.load import load_model
from edgeport.recipe import Recipe
from edgeport.runtime.session import open_session
from edgeport.runtime.torch import TorchSession
from edgeport.schema import parse_mapping
from edgeport.storage import write_text
from edgeport.target import load_target
from edgeport.validate.outputs import SENTENCE_EMBEDDING
from edgeport.validate.parity import compare

if TYPE_CHECKING:
    from edgeport.model.types import Model

ROOT = Path(__file__).resolve().parents[2]
SAMPLES = 64
FILE = "model.onnx"
FLOAT = "float"
Arrays = Mapping[str, np.ndarray]

METHODS: dict[str, list[dict[str, Any]]] = {
    "rtn": [{"method": "rtn"}],
    "hqq": [{"method": "hqq"}],
    "gptq": [{"method": "gptq"}],
    "awq+gptq": [{"method": "awq"}, {"method": "gptq"}],
}
MIXED = ["int8", "int8_g32", "uint4_g16", "uint4_g32", "uint4_g64", "int4_g32", "int4_g64", "int4_g128", "uint2_g32"]
CONVOLUTIONS = {"conv": ["int8"], "depthwise_conv": ["int8", "float"]}


@dataclass(frozen=True)
class Ours:
    """One of our rows: its name, and the step that quantizes without its method."""

    name: str
    method: str
    weights: str
    settings: dict[str, Any]

    @property
    def recipe(self) -> Recipe:
        steps = [dict(step) for step in METHODS[self.method]]
        steps[-1].update(CONVOLUTIONS, **self.settings)
        value = {"name": "bench", "summary": self.name, "compress": steps, "gate": {}}
        return parse_mapping(Recipe, {**value, "calibration": {"samples": SAMPLES}}, self.name)


def our_rows(model: Model) -> Iterator[Ours]:
    words = {
        "int8": "int8 per channel symmetric",
        "int8_g32": "int8 g32 symmetric",
        "int4_g32": "int4 g32 symmetric",
        "uint4_g32": "int4 g32 asymmetric",
    }
    dynamic = ["dynamic_int8", "float"]
    for method in METHODS:
        for form, text in words.items():
            if form != "int8" and model.modality == "image":
                continue
            settings = {"linear": [form, "int8"], "embedding": [form, "int8"]}
            yield Ours(f"{method} {form}", method, text, {**settings, "activations": "float"})
            yield Ours(f"{method} {form} a8", method, text, {**settings, "activations": dynamic})
        if model.modality == "image":
            continue
        for bits in (4.5, 5.0, 6.0):
            settings = {"linear": MIXED, "embedding": MIXED, "activations": "float", "bits_per_weight": bits}
            yield Ours(f"{method} mixed {bits:g}", method, "mixed 2-8 bits", settings)


@dataclass(frozen=True)
class Bench:
    """What all rows of a model share."""

    model: Model
    folder: Path
    inputs: list[dict[str, np.ndarray]]
    calibration: list[dict[str, np.ndarray]]
    reference: list[dict[str, np.ndarray]]

    @property
    def plain(self) -> Path:
        return self.folder / FLOAT / FILE


def prepare(name: str, out: Path) -> Bench:
    model = load_model(name if "/" in name else f"zoo:{name}")
    folder = out / model.name
    inputs = samples(model, count=SAMPLES, split="parity").inputs
    session = TorchSession(model)
    calibration = samples(model, count=SAMPLES, split="calibration").inputs
    bench = Bench(model, folder, inputs, calibration, [session.run(row) for row in inputs])
    if not bench.plain.is_file():
        bench.plain.parent.mkdir(parents=True, exist_ok=True)
        export_plain(model, bench.plain)
    return bench


def artifact(model: Model, path: Path) -> Artifact:
    """A file of whatever tool, to be opened like ours."""
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    names = {value.name for value in graph.input}
    inputs = tuple(spec for spec in model.inputs if spec.name in names)
    return Artifact("onnxruntime", "cpu", path.parent, path.name, inputs, model.outputs)


def perplexity(logits: list[np.ndarray], inputs: list[dict[str, np.ndarray]]) -> float:
    """exp of the mean negative log-likelihood of each token but the first; logits (1, S, V)."""
    from scipy.special import log_softmax

    losses = []
    for scores, row in zip(logits, inputs, strict=True):
        chances, tokens = log_softmax(scores[0, :-1].astype(np.float64), axis=-1), row["input_ids"][0, 1:]
        losses.append(-chances[np.arange(len(tokens)), tokens])
    return float(np.exp(np.concatenate(losses).mean()))


def measure(bench: Bench, session: Any) -> dict[str, Any]:
    """The metrics of a Result that come from its outputs."""
    task = bench.model.task
    logits: list[np.ndarray] = []

    def run() -> Iterator[Arrays]:
        for row in bench.inputs:
            outputs = session.run(row)
            if task == "text-generation":
                logits.append(outputs["logits"])
            yield outputs

    found = {parity.output: parity for parity in compare(bench.reference, run(), task=task, inputs=bench.inputs)}
    first = next(iter(found.values()))
    main = found.get(SENTENCE_EMBEDDING, first)
    if main.cosine is None:
        raise SystemExit(f"{main.output} is not finite")
    return {
        "samples": len(bench.inputs),
        "metric": "1 - mean cosine" if main.kl is None else "mean KL, nats",
        "error": 1 - main.cosine.mean if main.kl is None else main.kl.mean,
        "mean": main.cosine.mean,
        "worst": main.cosine_worst,
        "hidden": None if main is first or first.cosine is None else first.cosine.mean,
        "top1": None if main.top1_agreement is None else main.top1_agreement.mean,
        "perplexity": perplexity(logits, bench.inputs) if logits else None,
    }


def make_ours(bench: Bench, row: Ours, folder: Path) -> Result:
    start = time.perf_counter()
    target = load_target("linux-x86_64-ort")
    compressed, records = apply_recipe(bench.model, row.recipe, target)
    made = lower(compressed, target, LoweringSettings("fp32", "dynamic"), folder)
    seconds = time.perf_counter() - start
    codes = [record for record in records if record.sha256 is not None]
    bits = 8 * sum(record.bytes_after for record in codes) / (sum(record.bytes_before for record in codes) / 4)
    activations = sorted({record.activation for record in codes if record.kinds != ("embedding",)})
    return Result(
        model=bench.model.name,
        tool=OURS,
        name=row.name,
        weights=row.weights,
        activations="dynamic int8" if "dynamic_int8" in activations else "float",
        calibration=f"{len(bench.calibration)} samples" if row.recipe.calibrates else "none",
        bits=bits,
        bytes=made.path.stat().st_size,
        simulated=False,
        cpu_ratio=None,
        seconds=seconds,
        **measure(bench, open_session(made)),
    )


def make_peer(bench: Bench, peer: Peer, folder: Path) -> Result:
    start = time.perf_counter()
    if peer.make is not None:
        path = folder / FILE
        peer.make(bench.plain, bench.calibration, path)
        size, session = path.stat().st_size, open_session(artifact(bench.model, path))
    else:
        assert peer.simulate is not None
        changed, size = peer.simulate(bench.model)
        session = TorchSession(changed)
    seconds = time.perf_counter() - start
    return Result(
        model=bench.model.name,
        tool=peer.tool,
        name=peer.name,
        weights=peer.weights,
        activations=peer.activations,
        calibration=f"{len(bench.calibration)} samples" if peer.calibrated else "none",
        bits=peer.bits,
        bytes=size,
        simulated=peer.simulate is not None,
        cpu_ratio=None,
        seconds=seconds,
        **measure(bench, session),
    )


def cpu_ratio(bench: Bench, path: Path, rounds: int) -> float:
    """Median over rounds of the processor time of one run, relative to the float file's; they take turns."""
    sessions = [open_session(artifact(bench.model, file)) for file in (bench.plain, path)]
    row = max(bench.inputs, key=lambda row: sum(value.size for value in row.values()))
    times: list[list[float]] = [[], []]
    for turn in range(rounds + 3):
        for index in (0, 1) if turn % 2 else (1, 0):
            start = time.process_time()
            sessions[index].run(row)
            times[index].append(time.process_time() - start)
    return float(np.median(times[1][3:]) / np.median(times[0][3:]))


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.+]+", "-", text.lower()).strip("-")


def run_row(bench: Bench, label: str, row: Ours | Peer, arguments: argparse.Namespace) -> Result:
    """The row from its folder, or made anew."""
    folder = bench.folder / slug(label)
    record = folder / "row.json"
    if record.is_file() and not arguments.fresh:
        result = Result(**json.loads(record.read_text()))
    else:
        folder.mkdir(parents=True, exist_ok=True)
        for file in folder.iterdir():
            file.unlink()
        make = make_ours if isinstance(row, Ours) else make_peer
        result = make(bench, row, folder)  # type: ignore[arg-type,operator]
    if arguments.latency and result.cpu_ratio is None and (folder / FILE).is_file():
        result = Result(**{**asdict(result), "cpu_ratio": cpu_ratio(bench, folder / FILE, arguments.rounds)})
    write_text(record, json.dumps(asdict(result), indent=2) + "\n")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="minilm,efficientnet-lite0", help="zoo names or folders, with commas")
    parser.add_argument("--rows", default="*", help="pattern of 'tool name', several with commas, in this order")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "quality")
    parser.add_argument("--docs", type=Path, help="write the tables of all rows in --out here")
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--latency", action="store_true")
    parser.add_argument("--rounds", type=int, default=30, help="timed runs of each file")
    parser.add_argument("--nncf-python", type=Path)
    arguments = parser.parse_args()
    console = Console(stderr=True, width=200)
    for name in filter(None, arguments.models.split(",")):
        bench = prepare(name, arguments.out)
        rows: dict[str, Ours | Peer] = {f"{OURS} {row.name}": row for row in our_rows(bench.model)}
        rows |= {f"{peer.tool} {peer.name}": peer for peer in peers(bench.model, arguments.nncf_python)}
        results = []
        wanted = [label for pattern in arguments.rows.split(",") for label in fnmatch.filter(rows, pattern)]
        for label in dict.fromkeys(wanted):
            result = run_row(bench, label, rows[label], arguments)
            results.append(result)
            console.print(
                f"{bench.model.name}  {label}: {result.bits:.2f} bits, {result.bytes / 1e6:.2f} MB, "
                f"{result.metric} {result.error:.5f}, cosine worst {result.worst:.5f}, {result.seconds:.0f} s"
            )
        print(f"## {bench.model.name}\n\n{result_table(results)}\n\n{duel_table(results)}\n")
    if arguments.docs:
        found = [Result(**json.loads(path.read_text())) for path in sorted(arguments.out.glob("*/*/row.json"))]
        write_docs(found, arguments.docs)


if __name__ == "__main__":
    main()
