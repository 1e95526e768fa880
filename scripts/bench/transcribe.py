#!/usr/bin/env python
"""Whisper's bundles on recordings: the text beside PyTorch's, and what a token costs with a cache and without one.

    OMP_NUM_THREADS=1 python scripts/bench/transcribe.py out/w-int8 out/w-int4 --audio *.wav \
        [--whole out/w-whole-int8 ...] [--docs docs/llm.md]

The arguments are bundles of `edgeport export zoo:whisper-tiny.en`; those of `--whole` were exported with
`--task automatic-speech-recognition`, and read the recording and all tokens again for every new token. PyTorch writes
greedily, in float32, with a cache of its own. One thread; times are medians of processor time over the recordings,
because other work on the machine does not count in it. Recordings: 16 kHz, mono, 16 bits, 30 s at most (for example
those of the Debian package pocketsphinx-testdata).
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from transformers import GenerationMixin

from edgeport.bundle.read import read_bundle
from edgeport.cli.run import open_transcriber
from edgeport.model.load import load_model
from edgeport.runtime.session import Session, open_session
from edgeport.runtime.transcript import Transcriber, speech_features
from edgeport.storage import write_text
from edgeport.validate.size import model_bytes

MOST = 200
LENGTHS = (4, 32)
"""Tokens in the text when one more is timed."""
MARK = "<!-- transcribe -->"


@dataclass
class Row:
    """A bundle and what was measured of it; milliseconds of processor time."""

    name: str
    megabytes: float
    encoder: list[float] = field(default_factory=list)
    tokens: dict[int, list[float]] = field(default_factory=lambda: {length: [] for length in LENGTHS})
    texts: list[str] = field(default_factory=list)

    def cells(self, wanted: list[str]) -> list[str]:
        """A line of the table."""
        same = sum(text == other for text, other in zip(self.texts, wanted, strict=False))
        equal = f"{same} of {len(wanted)}" if self.texts else "–"
        encoder = f"{statistics.median(self.encoder):.0f}" if self.encoder else "in each token"
        times = [f"{statistics.median(self.tokens[length]):.1f}" for length in LENGTHS]
        return [self.name, f"{self.megabytes:.1f}", equal, encoder, *times]


def milliseconds(call: object, *arguments: object) -> float:
    """Processor time of a call."""
    start = time.process_time()
    call(*arguments)  # type: ignore[operator]
    return (time.process_time() - start) * 1e3


def originals(recordings: list[Path], model: Transcriber) -> list[str]:
    """What PyTorch writes."""
    module = load_model("zoo:whisper-tiny.en").module
    start = torch.tensor([model.speech_start()])
    texts = []
    for path in recordings:
        features = torch.from_numpy(speech_features(path, model.spec))
        with torch.no_grad():
            ids = GenerationMixin.generate(
                module, features, decoder_input_ids=start, max_new_tokens=MOST, do_sample=False, num_beams=1,
                use_cache=True, eos_token_id=sorted(model.texts.stop), pad_token_id=0,
            )  # fmt: skip
        texts.append("".join(model.texts.stream(int(token) for token in ids[0, start.shape[1] :])))
    return texts


def with_cache(row: Row, model: Transcriber, recordings: list[Path]) -> None:
    """Write every recording down, then time the encoder and single tokens."""
    for path in recordings:
        pieces: list[str] = []
        model.answer(MOST, pieces.append, audio=path)
        row.texts.append("".join(pieces))
        features = speech_features(path, model.spec)
        row.encoder.append(milliseconds(model.tokens.encode, features))
        ids = np.arange(max(LENGTHS) + 1)
        for length in LENGTHS:
            model.tokens.rewind()
            model.tokens.feed(ids[:length])
            for _ in range(5):
                model.tokens.rewind(length)
                row.tokens[length].append(milliseconds(model.tokens.feed, ids[length : length + 1]))


def without_cache(row: Row, session: Session, model: Transcriber, recordings: list[Path]) -> None:
    """Time a token of a bundle that has no cache."""
    for path in recordings[:3]:
        features = speech_features(path, model.spec)
        for length in LENGTHS:
            inputs = {"input_features": features, "decoder_input_ids": np.arange(length + 1)[None]}
            row.tokens[length].append(milliseconds(session.run, inputs))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", type=Path, nargs="+")
    parser.add_argument("--audio", type=Path, nargs="+", required=True)
    parser.add_argument("--whole", type=Path, nargs="*", default=[])
    parser.add_argument("--docs", type=Path)
    asked = parser.parse_args()
    wanted: list[str] = []
    rows = []
    for path in asked.bundles:
        found = read_bundle(path)
        model = open_transcriber(path, temperature=0.0, top_k=None, top_p=None, seed=0, threads=1)
        wanted = wanted or originals(asked.audio, model)
        row = Row(f"{found.manifest.runtime}, {found.manifest.recipe.name}", model_bytes(found.artifact) / 1e6)
        with_cache(row, model, asked.audio)
        rows.append(row)
    for path in asked.whole:
        found = read_bundle(path)
        row = Row(
            f"{found.manifest.runtime}, {found.manifest.recipe.name}, no cache", model_bytes(found.artifact) / 1e6
        )
        without_cache(row, open_session(found.artifact), model, asked.audio)
        rows.append(row)
    head = ["file", "MB", "texts equal to PyTorch's", "encoder ms", *(f"ms a token after {n}" for n in LENGTHS)]
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *(r.cells(wanted) for r in rows))]
    print("\n".join(lines))
    for path, text, *others in zip(asked.audio, wanted, *(row.texts for row in rows if row.texts), strict=True):
        print(f"\n{path.name}\n  {text!r}")
        for other in others:
            print(f"  {other!r}" if other != text else "  the same")
    if asked.docs is not None:
        before, _, after = asked.docs.read_text().split(MARK)
        write_text(asked.docs, MARK.join([before, "\n\n" + "\n".join(lines) + "\n\n", after]))


if __name__ == "__main__":
    main()
