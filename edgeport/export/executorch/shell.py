"""An ExecuTorch program around a Core ML package.

With every operator of a model inside one Core ML delegate, an ExecuTorch program is a shell: its inputs,
its outputs, one call, and the package. This module writes that shell around a package that the Core ML
lowering made, instead of converting a second time through executorch's `CoreMLPartitioner`: the package is
then the very one that the Core ML targets get (float16-safe norms and masks, weights as logical codes, the
same bytes every time), which the partitioner's own conversion is not. A test holds the shell against the
one that the partitioner writes.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from edgeport.errors import BadInputError, TargetRefusesError
from edgeport.export.artifact import Artifact, LoweringSettings
from edgeport.export.executorch.folder import flatten_folder, unflatten_folder
from edgeport.export.executorch.pte import delegate_data, planned_bytes, read_program
from edgeport.export.executorch.quiet import load_libraries
from edgeport.model.types import Model, TensorSpec
from edgeport.storage import hash_tree, hash_value, write_bytes, write_text
from edgeport.target import Target

ENTRY = "model.pte"
BACKEND = "CoreMLBackend"
PACKAGE = "model.mlpackage"
ALIGNMENT = 16

SCALAR_TYPES = {
    "uint8": "BYTE",
    "int8": "CHAR",
    "int32": "INT",
    "int64": "LONG",
    "float16": "HALF",
    "float32": "FLOAT",
    "bool": "BOOL",
}
"""numpy's names for the dtypes of executorch's ScalarType."""

SPECIFICATION_VERSIONS = {"iOS17": 8, "iOS18": 9}
"""Core ML's specification version of each deployment target, as executorch writes targets down."""


def _payload(package: Path, inputs: list[str], outputs: list[str]) -> bytes:
    """The delegate's data: the package, and a file that names its inputs and outputs in the order of the call."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "lowered_module"
        folder.mkdir()
        (folder / PACKAGE).symlink_to(package.resolve(), target_is_directory=True)
        # The device keeps its compiled copy of the model under this name.
        identifier = f"executorch_{hash_value(hash_tree(package))[:32]}"
        metadata = {"inputNames": inputs, "outputNames": outputs, "identifier": identifier}
        write_text(folder / "metadata.json", json.dumps(metadata))
        return flatten_folder(folder)


def _plan_memory(specs: tuple[TensorSpec, ...]) -> tuple[list[int], int]:
    """An offset in the arena for each tensor, side by side, and the arena's size in bytes."""
    offsets, end = [], 0
    for spec in specs:
        offsets.append(end)
        size = int(np.prod(spec.fixed_shape())) * np.dtype(spec.dtype).itemsize
        end += -(-size // ALIGNMENT) * ALIGNMENT
    return offsets, end


def _tree(names: list[str] | None, count: int) -> str:
    """torch's description of a tuple of `count` tensors, or of keyword arguments, as a program carries it."""
    leaf: dict[str, Any] = {"type": None, "context": None, "children_spec": []}
    tuple_of = {"type": "builtins.tuple", "context": "null"}
    if names is None:
        return json.dumps([1, {**tuple_of, "children_spec": [leaf] * count}])
    keywords = {"type": "builtins.dict", "context": json.dumps(names), "children_spec": [leaf] * count}
    return json.dumps([1, {**tuple_of, "children_spec": [{**tuple_of, "children_spec": []}, keywords]}])


def _program(
    payload: bytes, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...], options: Mapping[str, str]
) -> Any:
    """executorch's `Program` with one delegate that takes every input and gives every output."""
    from executorch.exir import schema
    from executorch.exir.scalar_type import ScalarType

    specs = inputs + outputs
    offsets, arena = _plan_memory(specs)
    values = [
        schema.EValue(
            schema.Tensor(
                scalar_type=ScalarType[SCALAR_TYPES[spec.dtype]],
                storage_offset=0,
                sizes=list(spec.fixed_shape()),
                dim_order=list(range(len(spec.shape))),
                requires_grad=False,
                layout=0,
                data_buffer_idx=0,
                allocation_info=schema.AllocationDetails(1, offset, 0),
                shape_dynamism=schema.TensorShapeDynamism.STATIC,
            )
        )
        for spec, offset in zip(specs, offsets, strict=True)
    ]
    count = len(inputs)
    call = schema.DelegateCall(delegate_index=0, args=list(range(len(specs))))
    plan = schema.ExecutionPlan(
        name="forward",
        container_meta_type=schema.ContainerMetadata(
            encoded_inp_str=_tree([spec.name for spec in inputs], count), encoded_out_str=_tree(None, len(outputs))
        ),
        values=values,
        inputs=list(range(count)),
        outputs=list(range(count, len(specs))),
        chains=[schema.Chain(inputs=[], outputs=[], instructions=[schema.Instruction(call)], stacktrace=None)],
        operators=[],
        delegates=[
            schema.BackendDelegate(
                id=BACKEND,
                processed=schema.BackendDelegateDataReference(schema.DataLocation.INLINE, 0),
                compile_specs=[schema.CompileSpec(key, value.encode()) for key, value in options.items()],
            )
        ],
        non_const_buffer_sizes=[0, arena],
    )
    return schema.Program(
        version=0,
        execution_plan=[plan],
        constant_buffer=[schema.Buffer(storage=b"")],
        backend_delegate_data=[schema.BackendDelegateInlineData(data=payload)],
        segments=[],
        constant_segment=schema.SubsegmentOffsets(segment_index=0, offsets=[]),
    )


def wrap_package(package: Artifact, model: Model, target: Target, settings: LoweringSettings, out: Path) -> Artifact:
    """Write `model.pte` with a Core ML package inside into the existing folder `out`.

    Args:
        package: the lowered package, with fixed shapes, its inputs in the model's order.

    Raises:
        TargetRefusesError: a dtype that ExecuTorch tensors don't have.
    """
    assert target.executorch is not None
    deployment = target.executorch.minimum_deployment_target
    assert deployment is not None
    inputs, outputs = _fixed(model.inputs), _fixed(model.outputs)
    for spec in inputs + outputs:
        if spec.dtype not in SCALAR_TYPES:
            raise TargetRefusesError(
                f"ExecuTorch has no tensors of {spec.dtype}.", where=f"{spec.name}", allowed=sorted(SCALAR_TYPES)
            )
    options = {
        "compute_units": "all",
        "min_deployment_target": str(SPECIFICATION_VERSIONS[deployment]),
        "model_compute_precision": {"fp16": "float16", "fp32": "float32"}[settings.precision],
        "model_type": "model",
    }
    load_libraries()
    from executorch.exir._serialize._program import PTEFile, serialize_pte_binary

    payload = _payload(package.path, [spec.name for spec in package.inputs], [spec.name for spec in outputs])
    program = _program(payload, inputs, outputs, options)
    path = out / ENTRY
    write_bytes(path, bytes(serialize_pte_binary(PTEFile(program), extract_delegate_segments=True)))
    file = read_program(path)
    return Artifact(
        runtime="executorch",
        delegate="coreml",
        root=out,
        entry=ENTRY,
        inputs=inputs,
        outputs=outputs,
        weights=package.weights,
        facts={
            **package.facts,
            "delegates": 1,
            "non_delegated_nodes": 0,
            "outside_delegates": {},
            "planned_memory_bytes": planned_bytes(file.program),
        },
    )


def _fixed(specs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    return tuple(replace(spec, shape=spec.fixed_shape()) for spec in specs)


def unwrap_package(artifact: Artifact, folder: Path) -> Artifact:
    """The Core ML package inside a program, written below an existing folder.

    Raises:
        BadInputError: the file is damaged, or holds no Core ML package.
    """
    payloads = delegate_data(read_program(artifact.path).program, BACKEND)
    if len(payloads) != 1:
        raise BadInputError(
            f"The program has {len(payloads)} Core ML delegates.", where=artifact.path, allowed="exactly one"
        )
    unflatten_folder(payloads[0], folder)
    return replace(artifact, runtime="coreml", root=folder, entry=PACKAGE)
