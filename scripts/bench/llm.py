#!/usr/bin/env python
"""Language models, ours beside the peers' of the same checkpoint and beside their own matrix products alone.

    python scripts/bench/llm.py out/lm-int4 out/lm-int4-et --genai FOLDER --genai-python build/peers/genai/bin/python \\
        --llama FOLDER [--threads 1 2] [--large-pages] [--quick] [--docs docs/llm.md]

The first arguments are bundles of `edgeport export`, or `lower` stages of its cache in folders that say what they are.
The peers:

- `--genai`: what onnxruntime-genai's builder made (`python -m onnxruntime_genai.models.builder -i HF_FOLDER -o FOLDER
  -p int4 -e cpu`, version 0.18), run by ONNX Runtime alone, and with `--genai-python` (`peer_env.py`) by its own
  runtime, which then runs our first file too;
- `--llama`: ExecuTorch's own export (`peer_executorch.py`).

Each model is in a process of its own (`llm_worker.py`); they are asked in turn, one at a time. All of it is done in
several processes one after the other, because the pages of memory that a process gets change its speed by up to 8%.
Times are medians of processor time where there is one thread, because other work on the machine does not count in it,
and the fastest tenth of wall time where there are more. A step of decoding takes the best token and computes the scores
of the next.

"Products alone" are a file's own MatMulNBits, called as one graph; "of bandwidth" is the bytes of those weights a
second of decoding, over what this core reads (the sum of an array far larger than its caches). Perplexity, top-1 and
KL (against the float model in torch) are those of the last 32 tokens of the texts of the parity slice, read through the
file's cache.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

CONTEXTS = (32, 512, 2032)
ROUNDS, STEPS, WARM = 5, 6, 2
WORKER = Path(__file__).with_name("llm_worker.py")
MARK = "<!-- bench -->"
PRODUCT = "com.microsoft.MatMulNBits"

Time = tuple[float, float]
"""Seconds of processor time and of wall time."""


@dataclass
class Row:
    """A model in a runtime, and what was measured of it; times in seconds."""

    name: str
    kind: str
    path: Path
    python: str = sys.executable
    bytes: int = 0
    process: subprocess.Popen[bytes] | None = None
    connection: Connection | None = None
    load: list[Time] = field(default_factory=list)
    grown_mb: float = 0.0
    """By how much the process grew, from before the model was loaded to its peak."""
    weight_bytes: float = 0.0
    prompt: dict[int, list[Time]] = field(default_factory=dict)
    steps: dict[int, list[Time]] = field(default_factory=dict)
    quality: tuple[float, float, float] | None = None
    """Perplexity, KL in nats, top-1 agreement."""

    def ask(self, *question: Any) -> Any:
        assert self.connection is not None
        self.connection.send(question)
        return self.connection.recv()

    def stop(self) -> None:
        assert self.process is not None
        self.ask()  # an empty question ends the process
        self.process.wait()


def start(row: Row, threads: int, large: bool) -> float:
    """Begin a row's process and load its model; the memory that the process had before, MB."""
    with tempfile.TemporaryDirectory() as scratch, tempfile.TemporaryFile() as errors:
        socket = str(Path(scratch) / "socket")
        with Listener(socket) as listener:
            command = [row.python, str(WORKER), socket, row.kind, str(row.path), str(threads), *["large"] * large]
            row.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
            listener._listener._socket.settimeout(120)  # type: ignore[attr-defined]
            try:
                row.connection = listener.accept()
                load, before, large_mb = row.connection.recv()
            except (TimeoutError, EOFError, OSError):
                row.process.kill()
                errors.seek(0)
                raise SystemExit(f"{row.name} did not start:\n{errors.read().decode()[-2000:]}") from None
    if large:
        print(f"{row.name}: {large_mb:.0f} MB on large pages", file=sys.stderr)
    row.load.append(load)
    return float(before)


def measure(rows: Sequence[Row], rounds: int, contexts: Sequence[int]) -> None:
    """Ask every model in turn: prompts of each length, then steps behind them, in `rounds` rounds."""
    ids = np.random.default_rng(0).integers(0, 40_000, max(contexts))
    for context in contexts:
        for _ in range(2 if context <= 512 else 1):
            for row in rows:
                row.prompt.setdefault(context, []).append(row.ask("prompt", ids[:context]))
        for _ in range(rounds):
            for row in rows:
                row.steps.setdefault(context, []).extend(row.ask("steps", context, STEPS, WARM))
        print(f"{time.strftime('%X')} context {context}: done", file=sys.stderr)


def score(rows: Sequence[Row], model: str, count: int) -> None:
    """Perplexity, KL and top-1 of each file against the float model."""
    import torch
    from scipy.special import log_softmax

    from edgeport.data.samples import samples
    from edgeport.model.load import load_model
    from edgeport.model.types import SCORED

    loaded = load_model(model)
    texts = [text["input_ids"][0] for text in samples(loaded, count=count, split="parity").inputs]
    with torch.no_grad():
        float_rows = [loaded.module(torch.from_numpy(ids)[None]).logits[0, -SCORED:].numpy() for ids in texts]
    del loaded

    def judge(read: Any) -> tuple[float, float, float]:
        loss, kl, same = [], [], []
        for ids, expected in zip(texts, float_rows, strict=True):
            ours = log_softmax(read(ids).astype(np.float64), axis=-1)
            theirs = log_softmax(expected.astype(np.float64), axis=-1)
            wanted = ids[-len(ours) + 1 :]
            loss += list(-ours[np.arange(len(wanted)), wanted])
            kl += list((np.exp(theirs) * (theirs - ours)).sum(-1))
            same += list(ours.argmax(-1) == theirs.argmax(-1))
        return float(np.exp(np.mean(loss))), float(np.mean(kl)), float(np.mean(same))

    expected = iter(float_rows)
    print(f"float model: perplexity {judge(lambda _ids: next(expected))[0]:.2f}", file=sys.stderr)
    for row in rows:
        if row.kind not in ("genai", "products"):
            row.quality = judge(lambda ids, row=row: row.ask("read", ids, SCORED))
            print(f"{row.name}: perplexity {row.quality[0]:.2f}, KL {row.quality[1]:.4f}", file=sys.stderr)


def bandwidth() -> float:
    """Bytes a second that this core reads."""
    array = np.ones(100_000_000, np.float32)
    times = []
    for _ in range(5):
        begin = time.process_time()
        array.sum()
        times.append(time.process_time() - begin)
    return float(array.nbytes / min(times))


def typical(times: Sequence[Time], threads: int) -> float:
    """Median processor time; the fastest tenth of wall time where several threads run."""
    columns = np.array(times)
    return float(np.median(columns[:, 0]) if threads == 1 else np.percentile(columns[:, 1], 10))


def model_bytes(path: Path) -> int:
    files = [path, *path.glob("model/*"), *path.iterdir()]
    return sum(file.stat().st_size for file in files if file.name.startswith("model.") and file.is_file())


def rows_of(arguments: argparse.Namespace) -> list[Row]:
    """What is measured, in the table's order."""
    from llm_worker import bundle_artifact

    from edgeport.bundle.read import MANIFEST, read_bundle

    rows, products = [], []
    for path in arguments.bundles:
        artifact = bundle_artifact(path)
        runtime = "ONNX Runtime" if artifact.runtime == "onnxruntime" else "ExecuTorch"
        recipe = read_bundle(path).manifest.recipe.name if (path / MANIFEST).exists() else path.name
        name = f"edgeport {recipe}"
        rows.append(Row(f"{name}, {runtime}", "edgeport", path, bytes=artifact.path.stat().st_size))
        if artifact.runtime == "onnxruntime":
            if PRODUCT in artifact.facts["operators"]:
                products.append(Row(f"its products alone: {name}", "products", path))
            if arguments.genai_python is not None and not any(row.kind == "genai" for row in rows):
                rows.append(Row(f"{name}, onnxruntime-genai", "genai", path, arguments.genai_python))
    if arguments.genai is not None:
        size, name = model_bytes(arguments.genai), "builder's int4"
        rows.append(Row(f"{name}, ONNX Runtime", "onnx", arguments.genai, bytes=size))
        products.append(Row(f"its products alone: {name}", "products", arguments.genai))
        if arguments.genai_python is not None:
            rows.append(Row(f"{name}, onnxruntime-genai", "genai", arguments.genai, arguments.genai_python))
    if arguments.llama is not None:
        rows.append(Row("ExecuTorch's llama 8da4w", "llama", arguments.llama, bytes=model_bytes(arguments.llama)))
    return rows + products


def table(rows: Sequence[Row], title: str, threads: int, read: float) -> str:
    """The rows in Markdown."""
    contexts = list(rows[0].steps)
    last = contexts[-1]
    heads = [f"decode at {context}, tok/s" for context in contexts]
    heads += [f"prefill {context}, tok/s" for context in contexts]
    heads += [f"first token after {contexts[min(1, len(contexts) - 1)]}, ms", "load, s", "memory, MB", "MB"]
    heads += ["perplexity", "KL", "top-1"]
    lines = [f"| {title} | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for row in rows:
        if row.kind == "products":
            continue
        cells = [f"{1 / typical(row.steps[context], threads):.0f}" for context in contexts]
        prompts = {context: min(time[min(threads - 1, 1)] for time in row.prompt[context]) for context in contexts}
        cells += [f"{context / prompts[context]:.0f}" for context in contexts]
        cells += [f"{prompts[contexts[min(1, len(contexts) - 1)]] * 1e3:.0f}", f"{min(row.load)[0]:.1f}"]
        cells += [f"{row.grown_mb:.0f}", f"{row.bytes / 1e6:.1f}" if row.bytes else "same file"]
        found = row.quality
        cells += ["", "", ""] if found is None else [f"{found[0]:.2f}", f"{found[1]:.3f}", f"{found[2]:.1%}"]
        lines.append(f"| {row.name} | " + " | ".join(cells) + " |")
    lines += ["", "| file | products alone, ms | its decoding's share | decoding, of bandwidth |", "|---|---|---|---|"]
    for row in rows:
        if row.kind == "products":
            whole = next(one for one in rows if one.path == row.path and one.kind in ("edgeport", "onnx"))
            alone, decoding = (typical(one.steps[contexts[0]], threads) for one in (row, whole))
            used = row.weight_bytes / decoding / read
            name = row.name.partition(": ")[2]
            lines.append(f"| {name} | {alone * 1e3:.2f} | {alone / decoding:.0%} | {used:.0%} |")
    return "\n".join(lines) + f"\n\nOne core reads {read / 1e9:.1f} GB/s here. Memory: until {last} tokens were read.\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", type=Path, nargs="+")
    parser.add_argument("--genai", type=Path, help="a folder of onnxruntime-genai's model builder")
    parser.add_argument("--genai-python", help="an interpreter that has onnxruntime-genai")
    parser.add_argument("--llama", type=Path, help="a folder of peer_executorch.py")
    parser.add_argument("--model", default="zoo:smollm2", help="whose tokenizer makes the texts' ids")
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--large-pages", action="store_true", help="all processes on large pages, once they are loaded")
    parser.add_argument("--texts", type=int, default=32)
    parser.add_argument("--starts", type=int, default=4)
    parser.add_argument("--quick", action="store_true", help="no context of 2032, one start, few texts")
    parser.add_argument("--docs", type=Path, help=f"a page with the mark {MARK} around the tables' place")
    arguments = parser.parse_args()
    contexts = CONTEXTS[:2] if arguments.quick else CONTEXTS
    starts, texts = (1, min(4, arguments.texts)) if arguments.quick else (arguments.starts, arguments.texts)
    tables, read = [], bandwidth()
    for threads in arguments.threads:
        rows = rows_of(arguments)
        for number in range(starts):
            before = [start(row, threads, arguments.large_pages) for row in rows]
            measure(rows, ROUNDS, contexts)
            for row, had in zip(rows, before, strict=True):
                row.grown_mb = max(row.grown_mb, row.ask("peak") - had)
                row.weight_bytes = row.ask("bytes") if row.kind == "products" else 0.0
            if not tables and number == 0 and texts:
                score(rows, arguments.model, texts)
            for row in rows:
                row.stop()
        tables.append(
            table(
                rows, f"{threads} thread{'s' * (threads > 1)}{', large pages' * arguments.large_pages}", threads, read
            )
        )
    text = "\n".join(tables)
    print(text)
    if arguments.docs is not None:
        from edgeport.storage import write_text

        before, _, after = arguments.docs.read_text().split(MARK)
        write_text(arguments.docs, f"{before}{MARK}\n\n{text}\n{MARK}{after}")


if __name__ == "__main__":
    main()
