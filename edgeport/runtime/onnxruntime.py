"""Run an ONNX or ORT-format file with ONNX Runtime's CPU provider."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from edgeport.errors import BadInputError, MeasurementError
from edgeport.export.artifact import Artifact
from edgeport.model.types import Axis, TensorSpec

# Before the first import of the library, which reads it then: nothing about a user's models leaves the machine.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import onnxruntime

PROVIDER = "CPUExecutionProvider"


def _saturates() -> bool:
    """An x86 processor that sums uint8 x int8 products in saturating 16 bits, because it has no VNNI."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    try:
        return "vnni" not in Path("/proc/cpuinfo").read_text()
    except OSError:
        return True


def _cast(spec: TensorSpec, value: np.ndarray) -> np.ndarray:
    """The value in the dtype that the file takes.

    Raises:
        BadInputError: the cast would lose something.
    """
    wanted = np.dtype(spec.dtype)
    if value.dtype == wanted:
        return np.ascontiguousarray(value)
    cast = value.astype(wanted)
    same_kind = np.issubdtype(value.dtype, np.floating) == np.issubdtype(wanted, np.floating)
    if not same_kind or not np.array_equal(
        cast.astype(value.dtype), value, equal_nan=same_kind and cast.dtype.kind == "f"
    ):
        raise BadInputError(
            f"The input {spec.name!r} has dtype {value.dtype}, which does not fit.", where=spec.name, allowed=spec.dtype
        )
    return np.ascontiguousarray(cast)


def _describe(shape: tuple[int | Axis, ...]) -> str:
    sizes = [f"{size.name} {size.minimum}..{size.maximum}" if isinstance(size, Axis) else str(size) for size in shape]
    return "(" + ", ".join(sizes) + ")"


def _check_shape(spec: TensorSpec, value: np.ndarray, seen: dict[str, int]) -> None:
    """`seen` holds the size of each axis met so far: axes of one name must agree."""
    fits = len(value.shape) == len(spec.shape)
    for size, axis in zip(value.shape, spec.shape, strict=False):
        if isinstance(axis, Axis):
            fits = fits and axis.minimum <= size <= axis.maximum and seen.setdefault(axis.name, size) == size
        else:
            fits = fits and size == axis
    if not fits:
        raise BadInputError(
            f"The input {spec.name!r} has the shape {tuple(value.shape)}, which does not fit.",
            where=spec.name,
            allowed=_describe(spec.shape),
        )


def check_input(spec: TensorSpec, value: np.ndarray, seen: dict[str, int] | None = None) -> np.ndarray:
    """A value as the file takes it.

    Args:
        seen: sizes of the axes met so far.

    Raises:
        BadInputError: its shape does not fit, or the cast would lose something.
    """
    array = np.asarray(value)
    _check_shape(spec, array, {} if seen is None else seen)
    return _cast(spec, array)


def open_file(
    artifact: Artifact, *, threads: int, path: Path | None = None, growing: bool = False
) -> onnxruntime.InferenceSession:
    """Load an artifact's file with the CPU provider.

    Args:
        path: one of the artifact's files; None for its entry.
        growing: no two calls have inputs of the same shapes, so a plan of memory that is kept for each is wasted.

    Raises:
        BadInputError: the file is missing or damaged.
    """
    path = path or artifact.path
    if not path.is_file():
        raise BadInputError("The model file is missing.", where=path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.enable_mem_pattern = not growing
    if _saturates():
        options.add_session_config_entry("session.x64quantprecision", "1")
    try:
        # A provider asked for but absent falls back with a mere warning, so only this one is ever asked for.
        session = onnxruntime.InferenceSession(str(path), sess_options=options, providers=[PROVIDER])
    except Exception as error:
        raise BadInputError(
            f"ONNX Runtime can't load the model file: {str(error).strip()}.",
            where=path.name,
            next_step="The file is damaged or was changed after export: export it again.",
        ) from error
    if session.get_providers() != [PROVIDER]:
        raise BadInputError(f"ONNX Runtime chose the providers {session.get_providers()}.", allowed=PROVIDER)
    return session


class OnnxRuntimeSession:
    """A loaded ONNX Runtime artifact. See `edgeport.runtime.session.Session`.

    Args:
        artifact: with `runtime == "onnxruntime"`; its entry ends in .onnx or .ort.
        threads: intra-op threads.

    Raises:
        BadInputError: the file is missing or damaged.
    """

    name = "onnxruntime"
    vendor_kernels = True

    def __init__(self, artifact: Artifact, *, threads: int = 1) -> None:
        self._inputs = artifact.inputs
        self._outputs = [spec.name for spec in artifact.outputs]
        self._entry = artifact.entry
        self._session = open_file(artifact, threads=threads)

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run once: every input by name in, every output by name out. See `Session.run`.

        Raises:
            MeasurementError: the runtime stopped, as at a token that the file has no row for.
        """
        names = [spec.name for spec in self._inputs]
        for name in inputs:
            if name not in names:
                raise BadInputError(f"The model has no input {name!r}.", allowed=names)
        seen: dict[str, int] = {}
        feed = {}
        for spec in self._inputs:
            if spec.name not in inputs:
                raise BadInputError(f"The input {spec.name!r} is missing.", allowed=names)
            feed[spec.name] = check_input(spec, inputs[spec.name], seen)
        try:
            results = self._session.run(self._outputs, feed)
        except Exception as error:  # the library's own exceptions have no public names
            raise MeasurementError(f"ONNX Runtime stopped: {str(error).strip()}", where=self._entry) from error
        return {name: np.asarray(result) for name, result in zip(self._outputs, results, strict=True)}
