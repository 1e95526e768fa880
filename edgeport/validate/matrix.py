"""The parity matrix: one checkpoint in several runtimes and precisions, each held against the same golden outputs.

These schemas are `parity.json`. A cell that has no numbers says why; what was not executed claims nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

from edgeport.errors import EXIT_NOT_VALID, EXIT_OK, EXIT_PARITY, EXIT_TARGET_REFUSES
from edgeport.schema import Strict
from edgeport.target import Execution, RuntimeName
from edgeport.validate.evidence import Check, DataRecord, Machine, OutputParity

Precision = Literal["fp32", "fp16"]
Outcome = Literal["passed", "failed", "not executed", "not offered", "refused", "error"]


class Cell(Strict):
    """One target at one precision.

    Attributes:
        outcome: "passed" and "failed" are the parity gate's answer; "not executed" is a file that nothing here runs;
            "not offered" is a precision that the target's file does not list, which is no failure; "refused" says that
            the target, or the library that lowers for it, can't take the model; "error" that something went wrong.
        executed_by: who ran the file, in words.
        file_bytes: of the model file(s); None where none was made.
        outputs: against the torch model, one entry an output.
        unrounded: the same of a Core ML file in float16 whose values are not rounded between operators: what is left
            is the conversion and the weights in float16.
        checks: the parity budgets of the recipe of that precision.
        reason, next_step: why there are no numbers, and what can be done about it.
        exit_code: of this cell alone.
    """

    target: str
    title: str
    runtime: RuntimeName
    precision: Precision
    outcome: Outcome
    executed_by: str
    file_bytes: int | None = None
    outputs: tuple[OutputParity, ...] = ()
    unrounded: tuple[OutputParity, ...] = ()
    checks: tuple[Check, ...] = ()
    reason: str | None = None
    next_step: str | None = None
    exit_code: int = EXIT_OK


class ParityMatrix(Strict):
    """All cells, and what they have in common.

    Attributes:
        model, task, parameters: of the checkpoint; source_files: sha256 of each file that it was read from.
        data: the golden inputs; golden: sha256 of the files that hold them and the torch model's outputs.
        exit_code: the lowest gate code of all cells; without one, the lowest other code.
    """

    schema_version: Literal[1] = 1
    model: str
    task: str
    parameters: int
    source_files: dict[str, str]
    data: DataRecord
    golden: dict[str, str]
    cells: tuple[Cell, ...]
    machine: Machine
    exit_code: int


def executed_by(execution: Execution, runtime: RuntimeName, versions: Mapping[str, str]) -> str:
    """Who runs a target's files here, in words.

    Args:
        versions: of the installed packages, by name.
    """
    if execution.here == "none":
        return "converted, not executed here"
    if execution.here == "reference":
        return "executed by edgeport's reference evaluator; converted for Core ML, not executed on Apple hardware"
    return f"executed by {runtime} {versions.get(runtime, 'of an unknown version')} here"


def overall(cells: Iterable[Cell]) -> int:
    """The exit code of a matrix: the lowest gate code, else the lowest other one; 3 where nothing was on offer."""
    found = list(cells)
    codes = {cell.exit_code for cell in found} - {EXIT_OK}
    gates = [code for code in codes if EXIT_PARITY <= code <= EXIT_NOT_VALID]
    if codes:
        return min(gates or codes)
    return EXIT_TARGET_REFUSES if all(cell.outcome == "not offered" for cell in found) else EXIT_OK
