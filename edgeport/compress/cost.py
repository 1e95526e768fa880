"""What compressing a model took: of one run on one machine, and so no part of what is compared by bytes."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path

from edgeport.data.samples import Samples
from edgeport.model.types import Model
from edgeport.storage import canonical_json, read_json
from edgeport.usage import Usage

COST = "cost.json"


@dataclass(frozen=True)
class Cost:
    """The fields of `edgeport.validate.evidence.CompressionCost`.

    Attributes:
        cpu_seconds: processor time of all threads.
        start_rss_mb: resident when it began, with the libraries and the float model, MB (1e6 bytes).
        peak_rss_mb: most memory resident meanwhile; None where it can't be told from a higher peak before.
        weights: how many were quantized.
        weights_before: how many of them an interrupted run had finished; their cost is not in here.
        samples: calibration inputs; 0 for a method that needs none.
        tokens: of these inputs together, padding included; None for other inputs than text.
    """

    cpu_seconds: float
    start_rss_mb: float | None
    peak_rss_mb: float | None
    weights: int
    weights_before: int
    samples: int
    tokens: int | None


def cost_of(usage: Usage, model: Model, calibration: Samples | None, *, weights_before: int = 0) -> Cost:
    """The record of a compression.

    Args:
        model: as it came out.
        calibration: what it was tuned on.
    """
    inputs = [] if calibration is None else calibration.inputs
    text = model.inputs[0].name == "input_ids"
    return Cost(
        cpu_seconds=usage.cpu_seconds,
        start_rss_mb=usage.start_rss_mb,
        peak_rss_mb=usage.peak_rss_mb,
        weights=len(model.quantized),
        weights_before=weights_before,
        samples=len(inputs),
        tokens=sum(int(sample["input_ids"].size) for sample in inputs) if text else None,
    )


def with_steps_before(cost: Cost, before: Cost) -> Cost:
    """The cost of both: `before` is that of pruning, distilling and the like, from whichever run did it."""
    peaks = [peak for peak in (before.peak_rss_mb, cost.peak_rss_mb) if peak is not None]
    return replace(
        cost,
        cpu_seconds=before.cpu_seconds + cost.cpu_seconds,
        start_rss_mb=before.start_rss_mb,
        peak_rss_mb=max(peaks, default=None),
    )


def save_cost(folder: Path, cost: Cost) -> None:
    """Write `cost.json` into an existing folder."""
    (folder / COST).write_text(canonical_json(asdict(cost)))


def load_cost(folder: Path) -> Cost:
    """What `save_cost` wrote."""
    return Cost(**read_json(folder / COST))
