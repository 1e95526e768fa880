"""Evaluates a saved ML program in torch: the arithmetic that the program declares, not Apple's kernels.

Every float value is kept in float32. Under the policy "declared" the result of an operator whose type in the
program is fp16 is rounded to float16 (overflow becomes infinity); the operator itself computes in float32, so
what is seen is the rounding between operators, the least that a float16 backend does. Under the policy "fp32"
nothing is rounded: what remains is compression and conversion error alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from edgeport.errors import MeasurementError
from edgeport.mlpackage.constants import Constant, constants, is_constant
from edgeport.mlpackage.package import Package
from edgeport.mlpackage.program import Block, Function, Operation, Reference, Variable, parse_function
from edgeport.mlpackage.values import ElementType
from edgeport.runtime.coreml.ops import OPERATORS

Policy = Literal["declared", "fp32"]
Values = dict[str, Any]

# How a declared element type is held. Unsigned types wider than torch's arithmetic take the next signed one.
HELD = {
    "bool": torch.bool,
    "int8": torch.int8,
    "int16": torch.int16,
    "int32": torch.int32,
    "int64": torch.int64,
    "uint8": torch.uint8,
    "uint16": torch.int32,
    "uint32": torch.int64,
    "int4": torch.int8,
    "uint1": torch.uint8,
    "uint2": torch.uint8,
    "uint3": torch.uint8,
    "uint4": torch.uint8,
    "uint6": torch.uint8,
}
# Parameters that take several values even when one stands there.
VARIADIC = ("values", "loop_vars", "ref_tensors", "begins", "ends", "end_masks")
CONTROL = ("cond", "while_loop", "read_state", "write_state", "classify")


@dataclass(frozen=True)
class Step:
    """One operation, ready to run.

    Attributes:
        fixed: parameters that are constants.
        named: parameters that are values of this run, by the values' names (a tuple for a variadic parameter,
            whose constants stand in the evaluator's table).
        last: names that no later step of the block needs.
    """

    operation: Operation
    fixed: Mapping[str, Any]
    named: Mapping[str, str | tuple[str, ...]]
    last: tuple[str, ...]


class Evaluator:
    """One function of a package, decoded once, run many times.

    Attributes:
        function: the parsed function.
        policy: "declared" or "fp32".
    """

    def __init__(self, package: Package, *, function: str | None = None, policy: Policy = "declared") -> None:
        """Parse a function and decode its constants.

        Raises:
            BadInputError: the package is damaged, or has no such function.
            MeasurementError: the program has an operator that this evaluator does not know.
        """
        self.function: Function = parse_function(package, function)
        self.policy = policy
        self._check_operators(package)
        self._constants: Values = {}
        for name, constant in constants(self.function.body).items():
            self._constants[name] = self._decode(constant)
        self._plans: dict[int, list[Step]] = {}
        self._plan(self.function.body)

    @property
    def labels(self) -> tuple[str | int, ...]:
        """Class labels of a classifier, in the order of its probabilities; empty for other models."""
        for step in self._plans[id(self.function.body)]:
            if step.operation.type == "classify":
                return tuple(step.fixed["classes"])
        return ()

    def new_state(self) -> dict[str, torch.Tensor]:
        """States as a fresh Core ML state object holds them: zeros."""
        states = {}
        for variable in self.function.inputs:
            if variable.name in self.function.states and variable.type is not None:
                states[variable.name] = torch.zeros([int(size or 1) for size in variable.type.shape or ()])
        return states

    def run(self, inputs: Mapping[str, torch.Tensor], state: dict[str, torch.Tensor] | None = None) -> Values:
        """Evaluate once.

        Args:
            inputs: a tensor for each declared input that is no state, in its declared shape.
            state: states by name, changed in place as the program writes them; None starts from zeros.

        Returns:
            The function's outputs by name: tensors (floats as float32), for `classify` the label (str or int)
            and the probabilities as a tensor.

        Raises:
            MeasurementError: an operator fails, or gives a shape other than the program declares.
        """
        held = self.new_state() if state is None else state
        values: Values = {}
        for variable in self.function.inputs:
            if variable.name not in self.function.states:
                values[variable.name] = self._hold(inputs[variable.name], variable, None)
        with torch.inference_mode():
            self._run_block(self.function.body, values, held)
        return {name: self._value(name, values) for name in self.function.body.outputs}

    def _check_operators(self, package: Package) -> None:
        for operation in self.function.body.walk():
            known = operation.type in OPERATORS or operation.type in CONTROL or is_constant(operation)
            if not known:
                output = operation.outputs[0].name if operation.outputs else operation.name
                raise MeasurementError(
                    f"The Core ML reference evaluator does not know the operator '{operation.type}'.",
                    where=f"output '{output}' of function '{self.function.name}', specification version "
                    f"{package.specification_version}, operator set {self.function.opset}",
                    allowed=sorted([*OPERATORS, *CONTROL]),
                    next_step="Run the package on macOS, or report the operator.",
                )

    def _decode(self, constant: Constant) -> Any:
        value = constant.value()
        if isinstance(value, list) or constant.type is None:
            return value
        if constant.type.element.name == "string":
            return str(value.item()) if value.ndim == 0 else [str(item) for item in value]
        return self._round(to_tensor(value), constant.type.element)

    def _plan(self, block: Block) -> None:
        """Resolve constants and find each value's last use, block by block."""
        produced = {
            output.name for operation in block.operations if not is_constant(operation) for output in operation.outputs
        }
        kept = set(block.outputs)
        steps: list[Step] = []
        for operation in reversed(block.operations):
            for inner in operation.blocks:
                self._plan(inner)
            if is_constant(operation):
                continue
            used = set(_references(operation))
            last = tuple(sorted(name for name in used if name in produced and name not in kept))
            kept |= used
            steps.append(self._step(operation, last))
        self._plans[id(block)] = steps[::-1]

    def _step(self, operation: Operation, last: tuple[str, ...]) -> Step:
        fixed: dict[str, Any] = {}
        named: dict[str, str | tuple[str, ...]] = {}
        for key, arguments in operation.inputs.items():
            names = []
            for position, argument in enumerate(arguments):
                if isinstance(argument, Reference):
                    names.append(argument.name)
                    continue
                name = f"{operation.name}/{key}/{position}"  # "/" keeps it apart from the program's names
                constant = Constant(name, argument.type, "const", {"val": argument.read()}, {"val": argument.type})
                self._constants[name] = self._decode(constant)
                names.append(name)
            if key in VARIADIC:
                named[key] = tuple(names)
            elif names[0] in self._constants:
                fixed[key] = self._constants[names[0]]
            else:
                named[key] = names[0]
        return Step(operation, fixed, named, last)

    def _run_block(self, block: Block, values: Values, state: Values) -> None:
        for step in self._plans[id(block)]:
            results = self._run_step(step, values, state)
            for variable, result in zip(step.operation.outputs, results, strict=True):
                values[variable.name] = self._hold(result, variable, step.operation)
            for name in step.last:
                del values[name]

    def _run_step(self, step: Step, values: Values, state: Values) -> tuple[Any, ...]:
        operation = step.operation
        if operation.type == "read_state":
            return (state[str(step.named["input"])],)
        arguments = dict(step.fixed)
        for key, names in step.named.items():
            if key == "input" and operation.type == "write_state":
                continue
            many = isinstance(names, tuple)
            arguments[key] = tuple(self._value(name, values) for name in names) if many else values[str(names)]
        if operation.type == "write_state":
            state[str(step.named["input"])] = arguments["data"]
            return ()
        if operation.type == "cond":
            chosen = operation.blocks[0 if bool(arguments["pred"]) else 1]
            return self._run_nested(chosen, (), values, state)
        if operation.type == "while_loop":
            return self._run_loop(operation, arguments["loop_vars"], values, state)
        if operation.type == "classify":
            probabilities = arguments["probabilities"]
            return arguments["classes"][int(torch.argmax(probabilities))], probabilities
        try:
            result = OPERATORS[operation.type](**arguments)
        except (RuntimeError, ValueError, IndexError, TypeError, KeyError) as error:
            raise MeasurementError(
                f"The operator '{operation.type}' can't be evaluated: {error}.", where=_where(operation)
            ) from error
        return result if isinstance(result, tuple) else (result,)

    def _run_loop(self, operation: Operation, loop: tuple[Any, ...], values: Values, state: Values) -> tuple[Any, ...]:
        condition, body = operation.blocks
        while bool(self._run_nested(condition, loop, values, state)[0]):
            loop = self._run_nested(body, loop, values, state)
        return loop

    def _run_nested(self, block: Block, arguments: tuple[Any, ...], values: Values, state: Values) -> tuple[Any, ...]:
        inner = dict(values)
        for variable, argument in zip(block.inputs, arguments, strict=True):
            inner[variable.name] = argument
        self._run_block(block, inner, state)
        return tuple(self._value(name, inner) for name in block.outputs)

    def _value(self, name: str, values: Values) -> Any:
        return values[name] if name in values else self._constants[name]

    def _hold(self, value: Any, variable: Variable, operation: Operation | None) -> Any:
        """A result in the form in which it is kept: its declared type, its declared shape checked."""
        if variable.type is None or not isinstance(value, torch.Tensor):
            return value
        shape = variable.type.shape
        if shape is not None and (
            len(shape) != value.ndim
            or any(want is not None and want != got for want, got in zip(shape, value.shape, strict=True))
        ):
            raise MeasurementError(
                f"'{variable.name}' has shape {tuple(value.shape)} where the program declares {shape}.",
                where=None if operation is None else _where(operation),
            )
        return self._round(value, variable.type.element)

    def _round(self, value: torch.Tensor, element: ElementType) -> torch.Tensor:
        if element.is_float:
            held = value.to(torch.float32)
            if element.name == "fp16" and self.policy == "declared":
                held = held.to(torch.float16).to(torch.float32)
            return held
        if element.name == "uint16":
            return value.to(torch.int32) & 0xFFFF
        return value.to(HELD[element.name])


def to_tensor(array: np.ndarray) -> torch.Tensor:
    """A numpy array as a tensor, sharing memory where torch can; unsigned 16 and 32 bits as wider signed ones."""
    if array.dtype == np.uint16:
        array = array.astype(np.int32)
    elif array.dtype in (np.uint32, np.uint64):
        array = array.astype(np.int64)
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _references(operation: Operation) -> list[str]:
    """Names of outer values that an operation uses, in its nested blocks too."""
    names = [
        argument.name
        for arguments in operation.inputs.values()
        for argument in arguments
        if isinstance(argument, Reference)
    ]
    for block in operation.blocks:
        names += block.outputs
        for inner in block.operations:
            names += _references(inner)
    return names


def _where(operation: Operation) -> str:
    output = operation.outputs[0].name if operation.outputs else operation.name
    return f"operator '{operation.type}', output '{output}'"
