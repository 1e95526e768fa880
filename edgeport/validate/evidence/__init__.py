"""Evidence: what was measured on the shipped file, by whom, when, and how far it can be trusted.

These schemas are `evidence.json`. A number that was not measured is absent, never zero; the field
beside it says why.

`edgeport.validate.run.measure` makes `Measurements`; `edgeport.gate.judge` reads them against a recipe's
budgets and gives the `Verdict`; `edgeport.gate.conclude` puts the two together as `Evidence`.
"""

from __future__ import annotations

from typing import Literal

from edgeport.schema import Strict
from edgeport.validate.evidence.origin import DataRecord, Machine, States
from edgeport.validate.evidence.quality import FreeText, Interval, OutputParity, TaskScore, TokenizerParity, WeightCheck
from edgeport.validate.evidence.resources import CompressionCost, Memory, MemoryPlan, Products, Size, Work
from edgeport.validate.evidence.speed import CallTimes, Delegation, Generation, GenerationRate, Latency, Noise
from edgeport.validate.evidence.verdict import Check, Verdict

__all__ = [
    "CallTimes",
    "Check",
    "CompressionCost",
    "DataRecord",
    "Delegation",
    "Evidence",
    "FreeText",
    "Generation",
    "GenerationRate",
    "Interval",
    "Latency",
    "Machine",
    "Measurements",
    "Memory",
    "MemoryPlan",
    "Noise",
    "OutputParity",
    "Products",
    "Size",
    "States",
    "TaskScore",
    "TokenizerParity",
    "Verdict",
    "WeightCheck",
    "Work",
]


class Measurements(Strict):
    """Everything measured about one artifact, before the gate has judged it."""

    schema_version: Literal[1] = 1
    measured_at: str
    machine: Machine
    manifest_sha256: str | None = None
    states: States
    data: DataRecord
    parity: tuple[OutputParity, ...]
    weights: WeightCheck | None
    delegation: Delegation | None = None
    size: Size
    latency: Latency | None
    latency_absent: str | None = None
    memory: Memory | None
    memory_absent: str | None = None
    memory_plan: MemoryPlan | None = None
    work: Work | None = None
    products: Products | None = None
    compression: CompressionCost | None = None
    tokenizers: tuple[TokenizerParity, ...] = ()
    generation: Generation | None = None
    tasks: tuple[TaskScore, ...] = ()


class Evidence(Measurements):
    """Everything measured about one artifact, and what the gate says of it."""

    verdict: Verdict
