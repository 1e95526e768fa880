"""Schemas of what was measured on which data, by which machine, and how far the claims reach."""

from __future__ import annotations

from typing import Literal

from edgeport.schema import Strict

State = Literal["yes", "no", "failed"]


class States(Strict):
    """Three claims kept apart.

    Attributes:
        lowered: the file was written and loads.
        executed_here: "runtime" (the very runtime), "reference" (edgeport's evaluator), or "none".
        numerics_verified: outputs of the file were compared with the uncompressed torch model; "failed"
            when the comparison was made and went outside the gate's parity budgets, "no" when not made.
            It is the gate's to say: before the gate has judged (`Measurements`) it is "no".
        statement: the same in words, as the report prints it.
    """

    lowered: State
    executed_here: Literal["runtime", "reference", "none"]
    numerics_verified: State
    statement: str


class DataRecord(Strict):
    """The inputs that a measurement used.

    Attributes:
        name: data card, or "synthetic".
        real: real data; False for random tensors.
        sha256: of the data file, by name.
        slice: which samples, in words.
        licence: SPDX id.
        samples: how many.
    """

    name: str
    real: bool
    sha256: dict[str, str]
    slice: str
    licence: str | None
    samples: int


class Machine(Strict):
    """Where and with what the measurement was made."""

    platform: str
    cpu: str
    cores: int
    memory_gb: float
    python: str
    versions: dict[str, str]
