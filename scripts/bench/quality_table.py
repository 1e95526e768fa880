"""The quality bench's table: what a row is, and which of ours stands against which peer. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

OURS = "edgeport"
HALF = 0.5
SLACK = 0.1
GRAPH = 1.01
"""A simulated row has weights only; a file also has the graph."""
"""The aim: at most this share of a peer's error at no more bytes of file and (give or take SLACK) bits a weight."""


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
        mean, worst: mean and least cosine of the first compared output.
        hidden: mean cosine of the raw output behind it, where it is derived (sentence embedding).
        top1: share of equal most likely classes; None without classes.
        perplexity: of the file on its inputs; None for anything but language models.
        cpu_ratio: processor time relative to the float file, one thread; None where not timed.
        seconds: to make it.
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
    mean: float
    worst: float
    hidden: float | None
    top1: float | None
    perplexity: float | None
    cpu_ratio: float | None
    seconds: float

    @property
    def ours(self) -> bool:
        return self.tool.startswith(OURS)


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
        return self.ratio is not None and self.ratio <= HALF


def duels(rows: Sequence[Result]) -> list[Duel]:
    """Every peer, least error first, with the best of ours at no more bytes of file and bits a weight."""
    found = []
    for peer in sorted((row for row in rows if not row.ours), key=lambda row: row.error):
        size = peer.bytes * (GRAPH if peer.simulated else 1)
        able = [row for row in rows if row.ours and row.bytes <= size and row.bits <= peer.bits + SLACK]
        found.append(Duel(peer, min(able, key=lambda row: row.error, default=None)))
    return found


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _optional(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def result_table(rows: Sequence[Result]) -> str:
    """Every row, fewest bits first, least error first among equals."""
    classes = any(row.top1 is not None for row in rows)
    language = any(row.perplexity is not None for row in rows)
    timed = any(row.cpu_ratio is not None for row in rows)
    hidden = any(row.hidden is not None for row in rows)
    header = ["tool", "method", "weights", "activations", "calibration", "bits/weight", "MB", "cosine mean", "worst"]
    header += ["cosine of hidden states"] * hidden + ["KL", "top-1"] * classes + ["perplexity"] * language
    header += ["CPU time / float"] * timed
    lines = []
    for row in sorted(rows, key=lambda row: (-round(row.bits), row.error)):
        line = [row.tool, row.name, row.weights, row.activations, row.calibration, f"{row.bits:.2f}"]
        line += [f"{row.bytes / 1e6:.2f}" + (" (simulated)" if row.simulated else "")]
        line += [f"{row.mean:.5f}", f"{row.worst:.5f}"]
        line += [_optional(row.hidden, ".5f")] * hidden
        line += [f"{row.error:.5f}", _optional(row.top1, ".3f")] * classes
        line += [_optional(row.perplexity, ".2f")] * language + [_optional(row.cpu_ratio, ".2f")] * timed
        lines.append([f"**{cell}**" if row.ours and index == 1 else cell for index, cell in enumerate(line)])
    return markdown(header, lines)


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
