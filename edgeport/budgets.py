"""Budgets: what the gate demands. They stand in a recipe's `[gate]`, or in a file of their own (`--budget`).

Each number has a unit (`edgeport.units`), by its kind or in its text, so that a budget can't be off by a factor of 100
without a word.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from edgeport.schema import Strict, read_toml
from edgeport.units import Bytes, Duration, MarginText, Nats, Ratio, Share

CONFIDENCE = 0.95
EVERY_SUITE = "*"
"""Stands for all suites that have no budget of their own."""


class AccuracyBudget(Strict):
    """What a suite's score must hold, as a statement at `confidence` rather than of the samples drawn.

    Attributes:
        drop_max: how much worse than the original on the same samples, at most: "1 point" (0.01 of a metric from 0
            to 1), "1% relative", "0.05 nats", or a number in the metric's own unit.
        score_min: least score of the artifact itself, in the metric's own unit (of an error rate: the largest).
        confidence: of the statement, one-sided.
    """

    drop_max: MarginText | None = None
    score_min: float | None = None
    confidence: float = Field(default=CONFIDENCE, ge=0.5, lt=1)


class Regression(Strict):
    """How much worse than an older bundle (`edgeport gate NEW --against OLD`).

    Attributes:
        accuracy_drop_max: of each suite that both have, paired where both answered the same samples.
        cosine_drop_max, top1_agreement_drop_max: of the outputs' agreement with the original, absolute.
        kl_rise_max: nats.
        size_growth_max, latency_growth_max, memory_growth_max: relative; "5%" allows 1.05 times the old.
    """

    accuracy_drop_max: MarginText = "1 point"
    cosine_drop_max: Share = 0.005
    top1_agreement_drop_max: Share = 0.02
    kl_rise_max: Nats = 0.02
    size_growth_max: Ratio = 0.01
    latency_growth_max: Ratio = 0.10
    memory_growth_max: Ratio = 0.10


class Budgets(Strict):
    """What the gate demands. A budget left out is not checked; the metric is still measured.

    Attributes:
        cosine_min: least mean cosine similarity between the artifact's and the original's outputs, 0 to 1.
        relative_l2_max: largest ||artifact - original|| / ||original|| over all samples.
        top1_agreement_min: least share of samples with the same most likely class or token, 0 to 1.
        kl_max: largest mean KL(original || artifact), nats, for classifiers and language models.
        size_ratio_max: largest file size relative to the fp32 artifact of the same runtime.
        latency_ratio_max: largest p50 relative to the fp32 artifact of the same runtime.
        cpu_ratio_max: the same of processor time, which other programs on the machine disturb less.
        peak_memory_ratio_max: largest peak resident memory relative to the fp32 artifact.
        size_max: largest model file, "25 MB".
        latency_p90_max: largest measured p90 on the machine that measured, "20 ms".
        cold_load_max: longest time to load the file from disk, "500 ms".
        first_run_max: longest first inference, "100 ms".
        peak_memory_max: largest peak resident memory of a process that runs the model, "200 MB".
        accuracy: by suite; "*" for all others.
        regression: against an older bundle, where one is given.
    """

    cosine_min: Share | None = None
    relative_l2_max: Ratio | None = None
    top1_agreement_min: Share | None = None
    kl_max: Nats | None = None
    size_ratio_max: Ratio | None = Field(default=None, le=2)
    latency_ratio_max: Ratio | None = None
    cpu_ratio_max: Ratio | None = None
    peak_memory_ratio_max: Ratio | None = None
    size_max: Bytes | None = None
    latency_p90_max: Duration | None = None
    cold_load_max: Duration | None = None
    first_run_max: Duration | None = None
    peak_memory_max: Bytes | None = None
    accuracy: dict[str, AccuracyBudget] = Field(default_factory=dict)
    regression: Regression = Regression()

    def bounds(self) -> dict[str, str]:
        """The budgets that are set, apart from those against an older bundle, as they are written."""
        found = {
            name: value if isinstance(value, str) else f"{value:g}"
            for name, value in self.model_dump(exclude_none=True, exclude={"accuracy", "regression"}).items()
        }
        for suite, budget in self.accuracy.items():
            for name, value in budget.model_dump(exclude_none=True, exclude={"confidence"}).items():
                found[f"accuracy.{suite}.{name}"] = f"{value} at confidence {budget.confidence:g}"
        return found

    @property
    def times(self) -> bool:
        """A budget asks for a valid latency run."""
        return self.latency_ratio_max is not None or self.latency_p90_max is not None


def load_budgets(path: Path) -> Budgets:
    """Read a file of budgets: the keys of a recipe's `[gate]`, at the top.

    Raises:
        BadInputError: the file can't be read, or a budget is unknown or wrong.
    """
    return read_toml(Budgets, path)
