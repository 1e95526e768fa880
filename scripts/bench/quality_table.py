"""The quality bench's table: what a row is, and which of ours stands against which peer. Pure functions."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

OURS = "edgeport"
ORT, EVALUATOR = "ONNX Runtime", "Core ML reference evaluator"
SPEECH = "conversation"
"""What speech recognition is measured on, as its corpus."""
HALF = 0.5
SLACK = 0.2
"""The aim: at most this share of a peer's error at no more bytes of file and (give or take SLACK) bits a weight: what
float32 scales of every channel take in small convolutions."""
GRAPH = 1.01
"""What PyTorch ran (simulated, llama.cpp's tensors) is counted without the graph that a file also has."""


@dataclass(frozen=True)
class Corpus:
    """What predicts tokens, on one corpus.

    Attributes:
        kl: mean over positions of KL(float || file), nats.
        top1: share of positions with the same most likely token.
        perplexity, float_perplexity: of the file and of the float model.
    """

    kl: float
    top1: float
    perplexity: float
    float_perplexity: float


@dataclass(frozen=True)
class Result:
    """One measured row; also the schema of its JSON file.

    Attributes:
        tool: with its version; ours begins with "edgeport".
        name: method and format, unique in a tool.
        weights: format, group size, symmetry, in words.
        activations: "float", or how they are quantized.
        calibration: "none", or how many samples of which slice.
        bits: a quantized weight takes on average, scales and zero points included.
        bytes: of the file that ships; of densely packed weights where `simulated`.
        samples: inputs that the error was measured on.
        simulated: run in PyTorch with dequantised weights: there is no file.
        error: what is compared: 1 - mean cosine (encoders), mean KL in nats (class scores).
        metric: what `error` is.
        mean, worst: mean and least cosine of the first compared output; None for language models.
        hidden: mean cosine of the raw output behind it, where it is derived (sentence embedding).
        top1: share of equal most likely classes; None without classes.
        accuracy, float_accuracy: share of labelled pictures put into their class, by the file and by the float model.
        corpora: a language model on each corpus, speech recognition on the words that were spoken.
        cpu_ratio: processor time relative to the float file, one thread; None where not timed.
        load: the machine's load average when that was timed; it counts the bench itself as 1.
        seconds: to make it.
        runtime: what ran it.
        commit, versions: of edgeport, and of the libraries, when the row was made.
    """

    model: str
    tool: str
    name: str
    weights: str
    activations: str
    calibration: str
    bits: float
    bytes: int
    samples: int
    simulated: bool
    error: float
    metric: str
    seconds: float
    mean: float | None = None
    worst: float | None = None
    hidden: float | None = None
    top1: float | None = None
    accuracy: float | None = None
    float_accuracy: float | None = None
    corpora: dict[str, Corpus] = field(default_factory=dict)
    cpu_ratio: float | None = None
    load: float | None = None
    runtime: str = ORT
    commit: str = ""
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def ours(self) -> bool:
        return self.tool.startswith(OURS)

    @property
    def coreml(self) -> bool:
        """Made for Core ML; rows of ours that PyTorch ran say it in their name."""
        return self.runtime == EVALUATOR or (self.ours and self.name.endswith(" coreml"))

    @property
    def anywhere(self) -> bool:
        """Numbers of a tool that PyTorch ran: for no runtime in particular."""
        return not self.ours and self.runtime.startswith("PyTorch")


@dataclass(frozen=True)
class Duel:
    """A peer and the best of ours that takes no more bytes and no more bits; None when there is none."""

    peer: Result
    ours: Result | None

    @property
    def ratio(self) -> float | None:
        """Our error relative to the peer's."""
        return None if self.ours is None or self.peer.error <= 0 else self.ours.error / self.peer.error

    @property
    def met(self) -> bool:
        """Half the peer's error."""
        return self.ratio is not None and self.ratio <= HALF


def duels(rows: Sequence[Result]) -> list[Duel]:
    """Every peer, least error first, with the best of ours at no more bytes of file and bits a weight.

    Core ML files are compared with Core ML files, what PyTorch ran with any of ours, all others with our ONNX files.
    """
    found = []
    for peer in sorted((row for row in rows if not row.ours), key=lambda row: row.error):
        size = peer.bytes * (GRAPH if peer.simulated or peer.anywhere else 1)
        able = [
            row
            for row in rows
            if row.ours
            and row.bytes <= size
            and row.bits <= peer.bits + SLACK
            and (peer.anywhere or row.coreml == peer.coreml)
        ]
        found.append(Duel(peer, min(able, key=lambda row: row.error, default=None)))
    return found


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _optional(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def result_table(rows: Sequence[Result]) -> str:
    """Every row, most bits first, least error first among equals."""
    columns: list[tuple[str, Callable[[Result], str]]] = [
        ("tool", lambda row: row.tool),
        ("method", lambda row: f"**{row.name}**" if row.ours else row.name),
        ("run by", lambda row: "PyTorch (simulated)" if row.simulated else row.runtime),
        ("weights", lambda row: row.weights),
        ("activations", lambda row: row.activations),
        ("calibration", lambda row: row.calibration),
        ("bits/weight", lambda row: f"{row.bits:.2f}"),
        ("MB", lambda row: f"{row.bytes / 1e6:.2f}"),
        ("cosine mean", lambda row: _optional(row.mean, ".5f")),
        ("worst", lambda row: _optional(row.worst, ".5f")),
        ("cosine of hidden states", lambda row: _optional(row.hidden, ".5f")),
    ]
    if any(row.top1 is not None for row in rows):
        columns += [("KL", lambda row: f"{row.error:.5f}"), ("same top-1", lambda row: _optional(row.top1, ".3f"))]
    columns.append(("accuracy", lambda row: _optional(row.accuracy, ".3f")))
    for name in sorted({name for row in rows for name in row.corpora}):
        columns.append((f"KL {name}", partial(_of_corpus, name=name, key="kl", form=".5f")))
        columns.append((f"perplexity {name}", partial(_of_corpus, name=name, key="perplexity", form=".2f")))
    columns.append(("CPU time / float", lambda row: _optional(row.cpu_ratio, ".2f")))
    ordered = sorted(rows, key=lambda row: (-round(row.bits), row.error))
    cells = {header: [write(row) for row in ordered] for header, write in columns}
    kept = [header for header, found in cells.items() if any(found)]
    return markdown(kept, [[cells[header][index] for header in kept] for index in range(len(ordered))])


def _of_corpus(row: Result, *, name: str, key: str, form: str) -> str:
    return format(getattr(row.corpora[name], key), form) if name in row.corpora else ""


def read_row(path: Path) -> Result:
    """A stored row."""
    value: dict[str, Any] = json.loads(path.read_text())
    known = {key: value[key] for key in value if key in {item.name for item in fields(Result)}}
    return Result(**{**known, "corpora": {name: Corpus(**found) for name, found in known.get("corpora", {}).items()}})


def duel_table(rows: Sequence[Result]) -> str:
    """The aim, peer by peer."""
    lines = []
    for duel in duels(rows):
        line = [f"{duel.peer.tool} {duel.peer.name}", f"{duel.peer.bytes / 1e6:.2f}", f"{duel.peer.error:.5f}"]
        if duel.ours is None or duel.ratio is None:
            line += ["none is as small", "", "", "", "missed"]
        else:
            line += [duel.ours.name, f"{duel.ours.bytes / 1e6:.2f}", f"{duel.ours.error:.5f}", f"{duel.ratio:.2f}"]
            line += ["met" if duel.met else "missed"]
        lines.append(line)
    header = ["peer", "MB", "error", "best of ours at no more bytes and bits", "MB", "error", "ratio", "aim 0.50"]
    return markdown(header, lines)
