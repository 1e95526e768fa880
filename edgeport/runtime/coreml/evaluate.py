"""Evaluates a saved ML program in torch: the arithmetic that the program declares, not Apple's kernels.

Every float value is kept in float32. Under the policy "declared" the result of an operator whose type in the
program is fp16 is rounded to float16 (overflow becomes infinity); the operator itself computes in float32, so
what is seen is the rounding between operators, the least that a float16 backend does. Under the policy "fp32"
nothing is rounded: what remains is compression and conversion error alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch

from edgeport.errors import BadInputError, MeasurementError
from edgeport.mlpackage.constants import Constant, constants, is_constant
from edgeport.mlpackage.package import Package
from edgeport.mlpackage.program import Block, Function, Operation, Variable, parse_function
from edgeport.mlpackage.values import ElementType
from edgeport.runtime.coreml.ops import EXACT_OPERATORS, OPERATORS
from edgeport.runtime.coreml.ops.indexing import slice_update
from edgeport.runtime.coreml.plan import Step, literals, plan

Policy = Literal["declared", "fp32"]
Values = dict[str, Any]
State = dict[str, torch.Tensor]

# How a declared integer type is held. Unsigned types wider than torch's arithmetic take the next signed one.
HELD = {
    "bool": torch.bool,
    "int8": torch.int8,
    "int16": torch.int16,
    "int32": torch.int32,
    "int64": torch.int64,
    "uint8": torch.uint8,
    "uint16": torch.int32,
    "uint32": torch.int64,
    "uint64": torch.int64,
    "int4": torch.int8,
    "uint1": torch.uint8,
    "uint2": torch.uint8,
    "uint3": torch.uint8,
    "uint4": torch.uint8,
    "uint6": torch.uint8,
}
CONTROL = ("cond", "while_loop", "read_state", "write_state", "classify")


class Evaluator:
    """One function of a package, decoded once, run many times.

    Attributes:
        function: the parsed function.
        policy: "declared" or "fp32".
        labels: class labels of a classifier, in the order of its probabilities; empty for other models.
    """

    def __init__(self, package: Package, *, function: str | None = None, policy: Policy = "declared") -> None:
        """Parse a function and decode its constants.

        Raises:
            BadInputError: the package is damaged, or has no such function.
            MeasurementError: the program has an operator that this evaluator does not know.
        """
        self.function: Function = parse_function(package, function)
        self.policy = policy
        body = self.function.body
        _check_operators(self.function, package)
        self._constants = {name: self._decode(constant) for name, constant in constants(body).items()}
        self._constants |= {constant.name: self._decode(constant) for constant in literals(body)}
        blocks = [body, *(block for operation in body.walk() for block in operation.blocks)]
        self._plans = {id(block): plan(block) for block in blocks}
        self.labels: tuple[str | int, ...] = ()
        for step in self._plans[id(body)]:
            if step.operation.type == "classify":
                self.labels = tuple(self._value(str(step.arguments["classes"]), {}))

    def new_state(self) -> State:
        """States as a fresh Core ML state object holds them: zeros."""
        states = {}
        for variable in self.function.inputs:
            if variable.name in self.function.states and variable.type is not None:
                states[variable.name] = torch.zeros([int(size or 1) for size in variable.type.shape or ()])
        return states

    def run(self, inputs: Mapping[str, torch.Tensor], state: State | None = None) -> Values:
        """Evaluate once.

        Args:
            inputs: a tensor for each declared input that is no state, in its declared shape.
            state: states by name, changed in place as the program writes them; None starts from zeros.

        Returns:
            The function's outputs by name: tensors (floats as float32), for `classify` the label (str or int)
            and the probabilities as a tensor. They may share memory with the inputs and the state.

        Raises:
            BadInputError: an input is missing, or the program refers to a value that it never makes.
            MeasurementError: an operator fails, or gives a shape other than the program declares.
        """
        held = self.new_state() if state is None else state
        values: Values = {}
        for variable in self.function.inputs:
            if variable.name in self.function.states:
                continue
            if variable.name not in inputs:
                raise BadInputError(f"The program's input '{variable.name}' is missing.", allowed=sorted(inputs))
            values[variable.name] = self._hold(inputs[variable.name], variable, None)
        with torch.inference_mode():
            self._run_block(self.function.body, values, held)
        return {name: self._value(name, values) for name in self.function.body.outputs}

    def _decode(self, constant: Constant) -> Any:
        value = constant.value()
        if isinstance(value, list):
            return value
        if constant.type is None:
            raise BadInputError(f"The constant '{constant.name}' is declared to be no tensor, but is one.")
        if constant.type.element.name == "string":
            return str(value.item()) if value.ndim == 0 else [str(item) for item in value]
        # A plain constant is stored in its declared type; only a decompressed one needs rounding to it.
        return self._convert(to_tensor(value), constant.type.element, exact=constant.operator == "const")

    def _run_block(self, block: Block, values: Values, state: State) -> None:
        for step in self._plans[id(block)]:
            results = self._run_step(step, values, state)
            if len(results) != len(step.operation.outputs):
                raise MeasurementError(f"An operator gave {len(results)} results.", where=_where(step.operation))
            for variable, result in zip(step.operation.outputs, results, strict=True):
                values[variable.name] = self._hold(result, variable, step.operation)
            for name in step.last:
                del values[name]

    def _run_step(self, step: Step, values: Values, state: State) -> tuple[Any, ...]:
        operation = step.operation
        arguments = {
            key: self._value(names, values)
            if isinstance(names, str)
            else tuple(self._value(name, values) for name in names)
            for key, names in step.arguments.items()
        }
        if step.state is not None and step.state not in state:
            raise BadInputError(f"The state '{step.state}' is missing.", where=_where(operation), allowed=sorted(state))
        try:
            return self._apply(step, arguments, values, state)
        except (RuntimeError, ValueError, IndexError, TypeError, KeyError) as error:
            raise MeasurementError(
                f"The operator '{operation.type}' can't be evaluated: {error}.", where=_where(operation)
            ) from error

    def _apply(self, step: Step, arguments: Values, values: Values, state: State) -> tuple[Any, ...]:
        """The results of one operation: control flow and states here, the rest from the table."""
        kind, blocks = step.operation.type, step.operation.blocks
        if kind == "cond":
            return self._run_nested(blocks[0 if bool(arguments["pred"]) else 1], (), values, state)
        if kind == "while_loop":
            loop: tuple[Any, ...] = arguments["loop_vars"]
            while bool(self._run_nested(blocks[0], loop, values, state)[0]):
                loop = self._run_nested(blocks[1], loop, values, state)
            return loop
        if kind == "classify":
            probabilities = arguments["probabilities"]
            return arguments["classes"][int(torch.argmax(probabilities))], probabilities
        if kind == "read_state":
            return (state[str(step.state)],)
        if kind == "write_state":
            # A copy keeps the state apart from other values, unless it was already changed in place.
            shared = _memory(arguments["data"]) == _memory(state[str(step.state)])
            state[str(step.state)] = arguments["data"] if shared else arguments["data"].clone()
            return ()
        if kind == "slice_update" and _may_update_in_place(step, arguments["x"], values, state):
            return (slice_update(**arguments, in_place=True),)
        result = OPERATORS[kind](**arguments)
        return result if isinstance(result, tuple) else (result,)

    def _run_nested(self, block: Block, arguments: tuple[Any, ...], values: Values, state: State) -> tuple[Any, ...]:
        inner = dict(values)
        for variable, argument in zip(block.inputs, arguments, strict=True):
            inner[variable.name] = argument
        self._run_block(block, inner, state)
        return tuple(self._value(name, inner) for name in block.outputs)

    def _value(self, name: str, values: Values) -> Any:
        if name in values:
            return values[name]
        if name in self._constants:
            return self._constants[name]
        raise BadInputError(f"The program is damaged: it uses the value '{name}' before it makes it.")

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
        exact = operation is not None and operation.type in EXACT_OPERATORS
        return self._convert(value, variable.type.element, exact=exact)

    def _convert(self, value: torch.Tensor, element: ElementType, *, exact: bool) -> torch.Tensor:
        """A tensor in the type that holds a declared one; `exact` values need no rounding."""
        if element.is_float:
            held = value.to(torch.float32)
            if element.name == "fp16" and self.policy == "declared" and not exact:
                held = held.to(torch.float16).to(torch.float32)
            return held
        if element.name == "uint16":
            return value.to(torch.int32) & 0xFFFF
        return value.to(HELD[element.name])


def to_tensor(array: np.ndarray) -> torch.Tensor:
    """A numpy array as a tensor, sharing memory where torch can; unsigned 16 to 64 bits as wider signed ones."""
    if array.dtype == np.uint16:
        array = array.astype(np.int32)
    elif array.dtype in (np.uint32, np.uint64):
        array = array.astype(np.int64)
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _check_operators(function: Function, package: Package) -> None:
    for operation in function.body.walk():
        if operation.type not in OPERATORS and operation.type not in CONTROL and not is_constant(operation):
            output = operation.outputs[0].name if operation.outputs else operation.name
            raise MeasurementError(
                f"The Core ML reference evaluator does not know the operator '{operation.type}'.",
                where=f"output '{output}' of function '{function.name}', specification version "
                f"{package.specification_version}, operator set {function.opset}",
                next_step="Run the package on macOS, or report the operator.",
            )


def _may_update_in_place(step: Step, x: torch.Tensor, values: Values, state: State) -> bool:
    """`x` is a state's own memory, replaced by the next step, and no other live value looks into it.

    A cache of keys and values is large; copying it for every token and layer costs more than the model.
    """
    if step.state is None or step.arguments["x"] not in step.last:
        return False
    return _memory(x) == _memory(state[step.state]) and not any(
        isinstance(value, torch.Tensor) and _memory(value) == _memory(x)
        for name, value in values.items()
        if name != step.arguments["x"]
    )


def _memory(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage().data_ptr())


def _where(operation: Operation) -> str:
    output = operation.outputs[0].name if operation.outputs else operation.name
    return f"operator '{operation.type}', output '{output}'"
