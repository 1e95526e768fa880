"""The ML program of a package as plain data: functions, blocks, operations, constants."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from edgeport.errors import BadInputError
from edgeport.mlpackage.package import Package
from edgeport.mlpackage.values import TensorType, decode_immediate, parse_type


@dataclass(frozen=True)
class Literal:
    """A value written in the program, or in its weight file; read when asked for.

    Attributes:
        type: element type and shape; None for a list.
    """

    type: TensorType | None
    _proto: Any
    _package: Package

    def read(self) -> np.ndarray | list[Any]:
        """The array in its shape (a view of the mapped file where nothing is packed), or the list.

        Strings come as object arrays. Sub-byte integers come unpacked, in int8 or uint8.

        Raises:
            BadInputError: the weight file is damaged or does not hold what the program declares.
        """
        kind = self._proto.WhichOneof("value")
        if kind == "blobFileValue":
            if self.type is None:
                raise BadInputError("A weight file can't hold a list.", where=self._package.path)
            blob = self._package.blob_file(self._proto.blobFileValue.fileName)
            flat = blob.read(int(self._proto.blobFileValue.offset), self.type.element, self.type.count)
            return flat.reshape(cast("tuple[int, ...]", self.type.shape))
        held = self._proto.immediateValue.WhichOneof("value") if kind else None
        if held == "tensor" and self.type is not None:
            return decode_immediate(self._proto.immediateValue.tensor, self.type)
        if held == "list":
            items = [literal(value, self._package).read() for value in self._proto.immediateValue.list.values]
            return [item.item() if isinstance(item, np.ndarray) else item for item in items]
        raise BadInputError(f"The program holds a value of a kind that can't be read: {held}.")


@dataclass(frozen=True)
class Reference:
    """The name of a value that an earlier operation, or the caller, gives."""

    name: str


Argument = Literal | Reference


@dataclass(frozen=True)
class Variable:
    """A name and its declared type (None for lists and dictionaries)."""

    name: str
    type: TensorType | None


@dataclass(frozen=True)
class Operation:
    """One operation.

    Attributes:
        type: "linear", "const", "constexpr_blockwise_shift_scale", ...
        name: the operator's own name, for messages.
        inputs: parameters by name; variadic parameters have several arguments. Constexpr operators of iOS 16
            keep their parameters as attributes: they stand here too.
    """

    type: str
    name: str
    inputs: Mapping[str, tuple[Argument, ...]]
    outputs: tuple[Variable, ...]
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Block:
    """Operations in order, with the names that go in and come out."""

    inputs: tuple[Variable, ...]
    outputs: tuple[str, ...]
    operations: tuple[Operation, ...]

    def walk(self) -> Iterator[Operation]:
        """Every operation, with those of nested blocks."""
        for operation in self.operations:
            yield operation
            for block in operation.blocks:
                yield from block.walk()


@dataclass(frozen=True)
class Function:
    """One function of a program: "main" unless the package is multifunction.

    Attributes:
        inputs: declared inputs, states among them.
        states: names of the inputs that are states.
    """

    name: str
    opset: str
    inputs: tuple[Variable, ...]
    states: tuple[str, ...]
    body: Block


def literal(value: Any, package: Package) -> Literal:
    """A `Value` message as a Literal."""
    return Literal(parse_type(value.type), value, package)


def parse_function(package: Package, name: str | None = None) -> Function:
    """One function of a package's program.

    Args:
        name: None takes the package's default function ("main" where it names none).

    Raises:
        BadInputError: there is no such function.
    """
    functions = package.spec.mlProgram.functions
    chosen = name or package.spec.description.defaultFunctionName or "main"
    if chosen not in functions:
        raise BadInputError(
            f"The package has no function '{chosen}'.", where=package.path, allowed=sorted(functions.keys())
        )
    function = functions[chosen]
    if function.opset not in function.block_specializations:
        raise BadInputError(
            f"The function has no block for its operator set '{function.opset}'.", where=package.model_file
        )
    states = tuple(item.name for item in function.inputs if item.type.WhichOneof("type") == "stateType")
    return Function(
        name=chosen,
        opset=function.opset,
        inputs=_variables(function.inputs),
        states=states,
        body=_block(function.block_specializations[function.opset], package),
    )


def _block(proto: Any, package: Package) -> Block:
    operations = tuple(_operation(operation, package) for operation in proto.operations)
    return Block(_variables(proto.inputs), tuple(proto.outputs), operations)


def _operation(proto: Any, package: Package) -> Operation:
    inputs: dict[str, tuple[Argument, ...]] = {}
    for key, argument in proto.inputs.items():
        inputs[key] = tuple(
            Reference(binding.name) if binding.WhichOneof("binding") == "name" else literal(binding.value, package)
            for binding in argument.arguments
        )
    name = ""
    for key, value in proto.attributes.items():
        if key == "name":
            name = str(np.asarray(literal(value, package).read()).item())
        else:
            inputs[key] = (literal(value, package),)
    return Operation(
        type=proto.type,
        name=name,
        inputs=inputs,
        outputs=_variables(proto.outputs),
        blocks=tuple(_block(block, package) for block in proto.blocks),
    )


def _variables(protos: Any) -> tuple[Variable, ...]:
    return tuple(Variable(item.name, parse_type(item.type)) for item in protos)
