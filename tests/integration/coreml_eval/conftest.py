"""Small MIL programs, saved by coremltools and evaluated from the saved file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

SavePackage = Callable[..., Path]


@dataclass(frozen=True)
class Case:
    """One use of one operator.

    Attributes:
        operator: MIL type that must stand in the saved program.
        build: (mb, **inputs) -> a variable, or a tuple or list of them.
        inputs: arrays by name; float32 or int32.
        reference: (*inputs) -> array or tuple of arrays; None takes MIL's own value inference.
        opset: coremltools target of the program.
        label: tells cases of one operator apart.
    """

    operator: str
    build: Callable[..., Any]
    inputs: Mapping[str, np.ndarray] = field(default_factory=dict)
    reference: Callable[..., Any] | None = None
    opset: str = "iOS17"
    label: str = ""

    @property
    def name(self) -> str:
        return f"{self.operator}-{self.label}" if self.label else self.operator


@dataclass(frozen=True)
class Outcome:
    """What the evaluator gave for a case, and what it should have."""

    got: tuple[np.ndarray, ...]
    expected: tuple[np.ndarray, ...]


@pytest.fixture(scope="session")
def save_package(tmp_path_factory: pytest.TempPathFactory) -> SavePackage:
    """(program, opset name, **convert options) -> the saved .mlpackage; no pass changes the program."""

    def save(program: Any, opset: str, **options: Any) -> Path:
        import coremltools as ct

        path = tmp_path_factory.mktemp("package") / "model.mlpackage"
        options.setdefault("pass_pipeline", ct.PassPipeline.EMPTY)
        model = ct.convert(
            program, minimum_deployment_target=getattr(ct.target, opset), skip_model_load=True, **options
        )
        model.save(str(path))
        return path

    return save


@pytest.fixture(scope="session")
def run_cases(save_package: SavePackage) -> Callable[[Iterable[Mapping[str, Any]]], dict[str, Outcome]]:
    """Cases (the fields of `Case`) -> outcomes by name; one program an opset, each case with inputs of its own."""

    def run(table: Iterable[Mapping[str, Any]]) -> dict[str, Outcome]:
        outcomes: dict[str, Outcome] = {}
        cases = [Case(**fields) for fields in table]
        assert len({case.name for case in cases}) == len(cases), "two cases have one name"
        for opset in sorted({case.opset for case in cases}):
            outcomes |= _run_opset([case for case in cases if case.opset == opset], opset, save_package)
        return outcomes

    return run


def _run_opset(cases: list[Case], opset: str, save: SavePackage) -> dict[str, Outcome]:
    import coremltools as ct
    import torch
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.mil import Function, Program, types

    from edgeport.mlpackage.package import load_package
    from edgeport.runtime.coreml.evaluate import Evaluator

    arrays = {f"c{i}_{name}": array for i, case in enumerate(cases) for name, array in case.inputs.items()}
    kinds = {"float32": types.fp32, "int32": types.int32}
    program = Program()
    specs = {name: mb.placeholder(shape=array.shape, dtype=kinds[array.dtype.name]) for name, array in arrays.items()}
    expected: dict[str, tuple[np.ndarray, ...]] = {}
    outputs: list[Any] = []
    places: dict[str, slice] = {}
    with Function(specs, opset_version=getattr(ct.target, opset)) as function:
        for i, case in enumerate(cases):
            variables = _as_tuple(case.build(mb, **{name: function.inputs[f"c{i}_{name}"] for name in case.inputs}))
            if case.reference is None:
                constant = _as_tuple(case.build(mb, **{name: mb.const(val=v) for name, v in case.inputs.items()}))
                assert all(variable.val is not None for variable in constant), f"MIL can't infer {case.name}"
                expected[case.name] = tuple(np.asarray(variable.val) for variable in constant)
            else:
                values = _as_tuple(case.reference(*case.inputs.values()))
                expected[case.name] = tuple(np.asarray(value) for value in values)
            places[case.name] = slice(len(outputs), len(outputs) + len(variables))
            for variable in variables:
                kept = variable.dtype in (types.fp32, types.int32)
                outputs.append(variable if kept else mb.cast(x=variable, dtype="int32"))
        function.set_outputs(outputs)
    program.add_function("main", function)

    package = load_package(save(program, opset))
    evaluator = Evaluator(package, policy="fp32")
    operators = {operation.type for operation in evaluator.function.body.walk()}
    assert {case.operator for case in cases} <= operators
    results = list(evaluator.run({name: torch.from_numpy(array.copy()) for name, array in arrays.items()}).values())
    assert len(results) == len(outputs)
    return {
        case.name: Outcome(tuple(value.numpy() for value in results[places[case.name]]), expected[case.name])
        for case in cases
    }


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)
