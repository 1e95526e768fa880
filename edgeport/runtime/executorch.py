"""Run a .pte file: in ExecuTorch's own runtime, or (Core ML delegate) in the reference evaluator."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeport.errors import BadInputError, MeasurementError
from edgeport.export.executorch.quiet import load_libraries, muted
from edgeport.model.types import Axis, TensorSpec

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from edgeport.export.artifact import Artifact
    from edgeport.runtime.session import Arrays, Session


def check_input(spec: TensorSpec, value: np.ndarray) -> np.ndarray:
    """A value in the dtype and layout that the file takes.

    Raises:
        BadInputError: the shape does not fit, or the cast would lose something.
    """
    fits = len(value.shape) == len(spec.shape) and all(
        want.minimum <= got <= want.maximum if isinstance(want, Axis) else got == want
        for got, want in zip(value.shape, spec.shape, strict=True)
    )
    if not fits:
        shape = [f"{s.name} {s.minimum}..{s.maximum}" if isinstance(s, Axis) else str(s) for s in spec.shape]
        raise BadInputError(
            f"The input {spec.name!r} has the shape {tuple(value.shape)}.",
            where=f"input {spec.name}",
            allowed=f"({', '.join(shape)})",
        )
    cast = np.ascontiguousarray(value, dtype=spec.dtype)
    if cast.dtype.kind != "f" and not np.array_equal(cast, value):
        raise BadInputError(
            f"The input {spec.name!r} holds values that {spec.dtype} can't.", where=f"input {spec.name}"
        )
    return cast


def bind_inputs(specs: tuple[TensorSpec, ...], inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """Named arrays in the file's order.

    Raises:
        BadInputError: one is missing or unknown, or does not fit.
    """
    names = [spec.name for spec in specs]
    wrong = sorted(set(inputs) ^ set(names))
    if wrong:
        raise BadInputError(f"Inputs are missing or unknown: {', '.join(wrong)}.", where="inputs", allowed=names)
    return [check_input(spec, inputs[spec.name]) for spec in specs]


class ExecuTorchSession:
    """A program in ExecuTorch's runtime.

    Attributes:
        name: "executorch".
        vendor_kernels: True: these are the kernels that ship.
    """

    name = "executorch"
    vendor_kernels = True

    def __init__(self, artifact: Artifact, *, threads: int = 1) -> None:
        """Load the program. The thread count belongs to the whole process: the last session's holds.

        Raises:
            BadInputError: the file is missing or damaged.
        """
        self._inputs, self._outputs = artifact.inputs, artifact.outputs
        self._path = artifact.path
        self._method = load_method(artifact.path, threads)

    def run(self, inputs: Arrays) -> dict[str, np.ndarray]:
        """Run once; see `Session.run`.

        Raises:
            MeasurementError: the runtime stopped.
        """
        import torch

        values = [torch.from_numpy(array) for array in bind_inputs(self._inputs, inputs)]
        try:
            results = self._method.execute(values)
        except RuntimeError as error:
            raise MeasurementError(f"The ExecuTorch runtime stopped: {error}", where=self._path) from error
        # The runtime owns the memory of its outputs and reuses it.
        return {spec.name: result.numpy().copy() for spec, result in zip(self._outputs, results, strict=True)}


def load_method(path: Path, threads: int) -> Any:
    """A program's `forward` in ExecuTorch's runtime.

    Raises:
        BadInputError: the file is missing or damaged.
    """
    return load_methods(path, threads, ("forward",))[0]


def load_methods(path: Path, threads: int, names: Sequence[str]) -> list[Any]:
    """Methods of a program in ExecuTorch's runtime.

    Raises:
        BadInputError: the file is missing or damaged.
    """
    if not path.is_file():
        raise BadInputError("The program is missing.", where=path)
    load_libraries()
    from executorch.extension.pybindings import _portable_lib
    from executorch.runtime import Runtime

    with muted():
        _portable_lib._unsafe_reset_threadpool(threads)
        try:
            program = Runtime.get().load_program(path)
            return [program.load_method(name) for name in names]
        except RuntimeError as error:
            raise BadInputError(
                f"The ExecuTorch runtime can't load the program: {error}",
                where=path,
                next_step="Export again; the file may be damaged or of another version.",
            ) from error


class CoreMLDelegateSession:
    """The Core ML package inside a program, in edgeport's reference evaluator.

    Attributes:
        name: "coreml-reference".
        vendor_kernels: False: Apple's kernels exist on Apple's systems only.
    """

    name = "coreml-reference"
    vendor_kernels = False

    def __init__(self, artifact: Artifact) -> None:
        """Take the package out of the program and load it.

        Raises:
            BadInputError: the file is missing or damaged.
        """
        from edgeport.export.executorch.shell import unwrap_package
        from edgeport.runtime.coreml.session import CoreMLReferenceSession

        self._inputs = artifact.inputs
        folder = Path(tempfile.mkdtemp(prefix="edgeport-"))
        # The evaluator maps the weights into memory: the folder lives as long as the session.
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self._session = CoreMLReferenceSession(unwrap_package(artifact, folder))

    def run(self, inputs: Arrays) -> dict[str, np.ndarray]:
        """Run once; see `Session.run`."""
        values = bind_inputs(self._inputs, inputs)
        return self._session.run({spec.name: value for spec, value in zip(self._inputs, values, strict=True)})


def open_executorch(artifact: Artifact, *, threads: int = 1) -> Session:
    """Load a .pte file in the runtime that can execute it here.

    Raises:
        BadInputError: the file is missing or damaged.
    """
    if artifact.delegate == "coreml":
        return CoreMLDelegateSession(artifact)
    return ExecuTorchSession(artifact, threads=threads)
