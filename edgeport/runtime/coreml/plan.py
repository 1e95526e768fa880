"""A block of a program as the steps that an evaluator takes: names resolved, last uses known."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from edgeport.errors import BadInputError
from edgeport.mlpackage.constants import Constant, is_constant
from edgeport.mlpackage.program import Block, Literal, Operation, Reference

# Parameters that take several values even when one stands there.
VARIADIC = ("values", "loop_vars", "ref_tensors", "begins", "ends", "end_masks")
STATEFUL = ("read_state", "write_state")


@dataclass(frozen=True)
class Step:
    """One operation, ready to run.

    Attributes:
        arguments: the names of its values and constants, a tuple for a variadic parameter. Literals have the
            names that `literals` gives them.
        last: names of values that no later step of the block needs.
        state: what read_state and write_state work on; for a slice_update, the state into which the very next
            step writes its result.
    """

    operation: Operation
    arguments: Mapping[str, str | tuple[str, ...]]
    last: tuple[str, ...]
    state: str | None = None


def plan(block: Block) -> tuple[Step, ...]:
    """The steps of a block, without its constants and its nested blocks' steps.

    Raises:
        BadInputError: an operation has a parameter without a value.
    """
    produced = {
        output.name for operation in block.operations if not is_constant(operation) for output in operation.outputs
    }
    needed = set(block.outputs)
    steps: list[Step] = []
    for operation in reversed(block.operations):
        if is_constant(operation):
            continue
        used = set(_references(operation))
        step = _step(operation, tuple(sorted((used & produced) - needed)))
        if operation.type == "slice_update" and steps and steps[-1].operation.type == "write_state":
            follower = steps[-1]
            if follower.arguments.get("data") == operation.outputs[0].name:
                step = replace(step, state=follower.state)
        steps.append(step)
        needed |= used
    return tuple(reversed(steps))


def literals(block: Block) -> Iterator[Constant]:
    """Values that stand in operations' arguments themselves, in nested blocks too, under names of their own."""
    for operation in block.walk():
        if is_constant(operation):
            continue
        for key, arguments in operation.inputs.items():
            for position, argument in enumerate(arguments):
                if isinstance(argument, Literal):
                    name = _literal_name(operation, key, position)
                    yield Constant(name, argument.type, "const", {"val": argument.read()}, {"val": argument.type})


def _step(operation: Operation, last: tuple[str, ...]) -> Step:
    arguments: dict[str, str | tuple[str, ...]] = {}
    for key, given in operation.inputs.items():
        names = tuple(
            argument.name if isinstance(argument, Reference) else _literal_name(operation, key, position)
            for position, argument in enumerate(given)
        )
        if not names:
            raise BadInputError(f"The operator '{operation.type}' has no value for '{key}'.", where=operation.name)
        arguments[key] = names if key in VARIADIC else names[0]
    if operation.type not in STATEFUL:
        return Step(operation, arguments, last)
    state = arguments.pop("input", None)
    if not isinstance(state, str):
        raise BadInputError(f"The operator '{operation.type}' names no state.", where=operation.name)
    return Step(operation, arguments, last, state)


def _literal_name(operation: Operation, key: str, position: int) -> str:
    output = operation.outputs[0].name if operation.outputs else operation.name
    return f"{output}/{key}/{position}"  # "/" keeps it apart from the program's own names


def _references(operation: Operation) -> Iterator[str]:
    """Names that an operation uses, in its nested blocks too."""
    for arguments in operation.inputs.values():
        for argument in arguments:
            if isinstance(argument, Reference):
                yield argument.name
    for block in operation.blocks:
        yield from block.outputs
        for inner in block.operations:
            yield from _references(inner)
