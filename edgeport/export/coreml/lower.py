"""Lower a Model to a .mlpackage.

torch.export -> decompositions -> coremltools, with the logical codes and scales as constexpr operators. The
conversion runs anywhere; which compute unit runs an operator is decided on the device and can't be known here.
"""

from __future__ import annotations

import contextlib
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from edgeport.errors import EdgeportError, TargetRefusesError
from edgeport.export.artifact import Artifact, LoweringSettings
from edgeport.export.coreml import decoder as caching
from edgeport.export.coreml.compressed import check_forms, compressed_constants, readers
from edgeport.export.coreml.float16 import takes_float16, tame_constants
from edgeport.export.coreml.interface import check_enumerated, file_specs, input_types
from edgeport.export.coreml.library import converting, failing_operator, load_coremltools
from edgeport.export.coreml.norms import safe_norms
from edgeport.export.coreml.package import write_package
from edgeport.export.coreml.sparse import OPERATOR as SPARSE
from edgeport.export.coreml.sparse import check_sparse_weights
from edgeport.export.coreml.trace import export
from edgeport.export.coreml.weights import logical
from edgeport.mlpackage.constants import Constant, constants
from edgeport.mlpackage.package import load_package
from edgeport.mlpackage.program import Function, parse_function
from edgeport.model.types import Model, TensorSpec
from edgeport.quantized import QuantizedTensor, digest
from edgeport.target import Target

ENTRY = "model.mlpackage"
LABEL = "classLabel"
AVOIDED = "_workaround"
"""What coremltools puts behind a name that is a word of the program's language."""
PLACEMENT = "Which compute unit (CPU, GPU, Neural Engine) runs an operator is decided on the device: not known here."


def lower(model: Model, target: Target, settings: LoweringSettings, out: Path) -> Artifact:
    """Write `model.mlpackage` into the existing empty folder `out`.

    Raises:
        TargetRefusesError: the model, an operator in it or a shape can't be converted; the message names it.
        BadInputError: coremltools is not installed.
    """
    if target.coreml is None:
        raise TargetRefusesError(f"The target {target.name!r} has no [coreml] table.", where=target.name)
    deployment = target.coreml.minimum_deployment_target
    if model.decoder is None:
        check_enumerated(model, settings, deployment)
    check_forms(model.quantized, deployment, settings.precision)
    ct = load_coremltools()
    classifier = settings.image_input and bool(model.labels)
    half = settings.precision == "fp16"
    program, norms = _program(model, settings, classifier=classifier)
    changed = tame_constants(program) if half else 0
    names = readers(program, model.quantized)
    sparse = {name: program.state_dict[name] for name in model.sparse if name not in model.quantized}
    sparse_names = readers(program, sparse)
    written: dict[str, QuantizedTensor | torch.Tensor] = {
        read_as: model.quantized[name] for name, inputs in names.items() for read_as in inputs
    }
    written |= {read_as: sparse[name] for name, inputs in sparse_names.items() for read_as in inputs}
    with compressed_constants(written, deployment):
        mlmodel = _convert(ct, program, model, settings, deployment, classifier)
    path = out / ENTRY
    write_package(path, mlmodel.get_spec(), Path(mlmodel.weights_dir))
    shutil.rmtree(mlmodel.package_path, ignore_errors=True)
    function = parse_function(load_package(path))
    decoder = model.decoder
    inputs, outputs = (
        (_input_specs(model, settings), file_specs(model.outputs, settings))
        if decoder is None
        else caching.file_specs(decoder)
    )
    renamed = renamed_inputs(inputs, function)
    stored = constants(function.body)
    check_sparse_weights({name: sparse[name] for name in sparse_names}, stored, settings.precision)
    return Artifact(
        runtime="coreml",
        delegate="coreml",
        root=out,
        entry=ENTRY,
        inputs=tuple(replace(spec, name=renamed.get(spec.name, spec.name)) for spec in inputs),
        outputs=outputs,
        weights=_stored_names(model, names, stored),
        facts={
            "minimum_deployment_target": deployment,
            "specification_version": load_package(path).specification_version,
            "compute_precision": settings.precision,
            "operators": _histogram(function),
            "weight_file_bytes": _weight_bytes(path),
            "unused_weights": sorted(set(model.quantized) - set(names)),
            "sparse_weights": len(sparse_names),
            "safe_norms": len(norms),
            "constants_brought_into_float16": changed,
            "image_input": settings.image_input,
            "classifier_outputs": [LABEL, f"{LABEL}_probs"] if classifier else [],
            "compute_units": PLACEMENT,
            **({"renamed_inputs": renamed} if renamed else {}),
            **({} if decoder is None else caching.facts(decoder)),
        },
        context=None if decoder is None else decoder.context,
    )


def _program(
    model: Model, settings: LoweringSettings, *, classifier: bool
) -> tuple[torch.export.ExportedProgram, list[str]]:
    """The traced model, and the names of its norms that took their safe form (with float16 only)."""
    half = settings.precision == "fp16"
    if model.decoder is not None:
        return caching.export_decoder(model, half=half)
    with contextlib.ExitStack() as stack:
        norms = stack.enter_context(safe_norms(model.module)) if half else []
        return export(model, settings, probabilities=classifier), norms


def _convert(
    ct: ModuleType,
    program: torch.export.ExportedProgram,
    model: Model,
    settings: LoweringSettings,
    deployment: str,
    classifier: bool,
) -> Any:
    half = ct.transform.FP16ComputePrecision(op_selector=takes_float16)
    precision = half if settings.precision == "fp16" else ct.precision.FLOAT32
    outputs = [ct.TensorType(name=spec.name, dtype=np.float32) for spec in model.outputs]
    config = None
    if classifier:
        outputs.append(ct.TensorType(name=f"{LABEL}_probabilities", dtype=np.float32))
        config = ct.ClassifierConfig(
            distinct_labels(model),
            predicted_feature_name=LABEL,
            predicted_probabilities_output=f"{LABEL}_probabilities",
        )
    inputs = input_types(ct, model, settings) if model.decoder is None else caching.input_types(ct, model.decoder)
    with converting() as lines:
        try:
            return ct.convert(
                program,
                inputs=inputs,
                outputs=outputs,
                classifier_config=config,
                minimum_deployment_target=ct.target[deployment],
                compute_precision=precision,
                skip_model_load=True,
            )
        except EdgeportError:
            raise
        except Exception as error:
            operator = failing_operator(lines)
            what = "Core ML's converter can't take this model"
            dynamic = settings.shapes == "dynamic" or len(settings.enumerated) > 1
            otherwise = "with fixed shapes (`--shapes fixed`)" if model.decoder is None else caching.UNCACHED
            raise TargetRefusesError(
                f"{what}: it stops at the operator {operator}." if operator else f"{what}.",
                where=f"{model.name} ({type(error).__name__}: {str(error).strip()[:300]})",
                next_step=f"Export {otherwise}." if dynamic else None,
            ) from error


def distinct_labels(model: Model) -> list[str]:
    """The class names, told apart by their number where several classes share one: Core ML looks them up by name.

    Raises:
        TargetRefusesError: there are not as many names as classes.
    """
    classes = model.outputs[0].shape[-1]
    if len(model.labels) != classes:
        raise TargetRefusesError(
            f"The model has {len(model.labels)} class names for {classes} classes.",
            where=model.name,
            next_step="Leave out `--image-input`, or correct the labels in the checkpoint's config.",
        )
    counts = Counter(model.labels)
    return [f"{label} ({index})" if counts[label] > 1 else label for index, label in enumerate(model.labels)]


def _input_specs(model: Model, settings: LoweringSettings) -> tuple[TensorSpec, ...]:
    specs = file_specs(model.inputs, settings)
    return tuple(TensorSpec(spec.name, "uint8", spec.shape) for spec in specs) if settings.image_input else specs


def renamed_inputs(specs: tuple[TensorSpec, ...], function: Function) -> dict[str, str]:
    """Inputs with another name in the file: coremltools avoids words of the program's language, such as `state`."""
    names = {variable.name for variable in function.inputs}
    return {spec.name: f"{spec.name}{AVOIDED}" for spec in specs if f"{spec.name}{AVOIDED}" in names}


def _same(stored: Constant, tensor: QuantizedTensor) -> bool:
    if stored.operator in ("const", SPARSE) or stored.type is None or stored.type.count != tensor.codes.numel():
        return False
    return digest(logical(stored)) == digest(tensor)


def _stored_names(model: Model, inputs: Mapping[str, tuple[str, ...]], found: Mapping[str, Constant]) -> dict[str, str]:
    """Where each compressed weight is in the file.

    A constant carries the name of the program's input, at times with a suffix; of two weights with equal bytes
    coremltools keeps one, under the other's name.

    Raises:
        EdgeportError: a weight is in the file otherwise than compressed (a bug: nothing here should do that).
    """
    names = {}
    for name, read_as in inputs.items():
        tensor = model.quantized[name]
        likely = [key for key in found if key.startswith(read_as)]
        stored = next((key for key in (*sorted(likely), *found) if _same(found[key], tensor)), None)
        if stored is None:
            raise EdgeportError("The converter did not keep a compressed weight as it was.", where=f"layer {name}")
        names[name] = stored
    return names


def _histogram(function: Function) -> dict[str, int]:
    """How often each operator stands in the program; plain constants are left out, compressed ones are not."""
    return dict(sorted(Counter(op.type for op in function.body.walk() if op.type != "const").items()))


def _weight_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("weight.bin"))
