"""The constants of a program by name: plain ones and compressed ones, with what the file really stores."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from edgeport.errors import BadInputError
from edgeport.mlpackage.constexpr import decode
from edgeport.mlpackage.program import Block, Literal, Operation, Reference
from edgeport.mlpackage.values import TensorType


@dataclass(frozen=True)
class Constant:
    """One constant value of a program.

    Attributes:
        name: the name that operations refer to.
        type: its type as operations see it (a compressed weight's is float).
        operator: "const", or the constexpr operator that makes it.
        parameters: what is stored, by the operator's parameter names ("val" for a const; "data", "scale",
            "offset" for constexpr_blockwise_shift_scale; ...). A parameter that another constexpr makes is decoded.
        stored: the types of stored parameters, by the same names ("int4" codes come unpacked in int8).
    """

    name: str
    type: TensorType | None
    operator: str
    parameters: Mapping[str, Any]
    stored: Mapping[str, TensorType | None]
    index: int = 0

    def value(self) -> Any:
        """The array (compressed ones in float32, unrounded), or the list.

        Raises:
            BadInputError: the parameters don't fit each other, or there is no value.
        """
        if self.operator != "const":
            values = decode(self.operator, self.parameters)
            if self.index < len(values):
                return values[self.index]
        elif "val" in self.parameters:
            return self.parameters["val"]
        raise BadInputError(f"The constant '{self.name}' has no value.")


def is_constant(operation: Operation) -> bool:
    """A const or constexpr operation: its outputs are known without any input."""
    return operation.type == "const" or operation.type.startswith("constexpr_")


def constants(block: Block) -> Mapping[str, Constant]:
    """Every constant of a function's body (`function.body`) and its nested blocks, by output name.

    Arrays are views of the memory-mapped weight file where nothing is packed.

    Raises:
        BadInputError: the weight file is damaged, or a constant refers to what is no constant.
    """
    found: dict[str, Constant] = {}
    for operation in block.walk():
        if is_constant(operation):
            for constant in read_constant(operation, found):
                found[constant.name] = constant
    return found


def read_constant(operation: Operation, known: Mapping[str, Constant]) -> Iterator[Constant]:
    """The outputs of one const or constexpr operation.

    Args:
        known: constants read so far, for constexpr operators that build on each other.
    """
    parameters: dict[str, Any] = {}
    stored: dict[str, TensorType | None] = {}
    for key, arguments in operation.inputs.items():
        if len(arguments) != 1:
            raise BadInputError(f"The constant '{operation.name}' has {len(arguments)} values for '{key}'.")
        argument = arguments[0]
        if isinstance(argument, Literal):
            parameters[key], stored[key] = argument.read(), argument.type
        else:
            parameters[key] = _known(argument, operation, known).value()
    for index, output in enumerate(operation.outputs):
        yield Constant(output.name, output.type, operation.type, parameters, stored, index)


def _known(reference: Reference, operation: Operation, known: Mapping[str, Constant]) -> Constant:
    if reference.name not in known:
        raise BadInputError(f"The constant '{operation.name}' refers to '{reference.name}', which is no constant.")
    return known[reference.name]
