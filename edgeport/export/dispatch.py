"""One door to the backends: lower a model for a target, read the weights back out of the file."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

from edgeport.errors import BadInputError, TargetRefusesError
from edgeport.export.artifact import Artifact, LoweringSettings
from edgeport.model.types import Axis, Decoder, Model
from edgeport.quantized import QuantizedTensor
from edgeport.target import CoreMLOptions, Target

FLOAT, HALF = 4, 2
"""Bytes of a float16: Core ML's state."""


def check_settings(model: Model, target: Target, settings: LoweringSettings) -> None:
    """Refuse settings that the target does not offer, before anything long starts.

    Raises:
        TargetRefusesError: naming the setting and what the target takes.
        BadInputError: a setting that makes no sense for the model.
    """
    if settings.shapes not in target.shapes:
        raise TargetRefusesError(
            f"The target {target.name!r} takes no {settings.shapes} shapes.",
            where="--shapes",
            allowed=target.shapes,
        )
    if settings.enumerated and target.runtime != "coreml":
        raise TargetRefusesError(
            f"The target {target.name!r} has no enumerated shapes: they belong to Core ML.",
            where="--enumerate",
            allowed="--shapes dynamic, or --shapes fixed with --sequence N",
        )
    if settings.enumerated:
        axes = {size.name for spec in model.inputs for size in spec.shape if isinstance(size, Axis)}
        if "sequence" not in axes:
            raise TargetRefusesError(
                f"The model {model.name!r} has no sequence axis to enumerate.", where="--enumerate"
            )
    if model.decoder is not None and target.coreml is not None:
        from edgeport.export.coreml.decoder import check_settings as check_cache

        check_cache(settings, target.coreml.minimum_deployment_target)
    if settings.image_input and (target.runtime != "coreml" or model.image is None):
        raise TargetRefusesError(
            "A picture as input needs a Core ML target and a model with image preprocessing.",
            where="--image-input",
            next_step="Leave it out: the model then takes a float tensor.",
        )
    if settings.kv_cache != "float" and model.decoder is None:
        raise BadInputError(
            f"The recipe asks for a cache of keys and values in {settings.kv_cache}, and the model keeps none.",
            where="[lower] kv_cache",
            next_step="Leave it out, or export a decoder language model for a target that gives it a cache.",
        )
    if model.decoder is not None and model.decoder.cross:
        _check_encoder_decoder(target, settings)
    if settings.kv_cache != "float" and target.onnxruntime and target.onnxruntime.attention == "standard":
        raise TargetRefusesError(
            f"The standard's Attention keeps no keys and values in {settings.kv_cache}.",
            where="[lower] kv_cache",
            allowed='float, or attention = "fused" in the target\'s [onnxruntime]',
        )
    if settings.kv_cache not in target.kv_cache:
        raise TargetRefusesError(
            f"The target {target.name!r} keeps no keys and values in {settings.kv_cache}.",
            where="[lower] kv_cache",
            allowed=target.kv_cache,
        )
    if settings.ort_format and target.runtime != "onnxruntime":
        raise TargetRefusesError("The ORT format belongs to ONNX Runtime targets.", where="--ort-format")


def _check_encoder_decoder(target: Target, settings: LoweringSettings) -> None:
    """Refuse what attention to an encoder's states has no form for.

    Raises:
        TargetRefusesError: naming it.
    """
    if settings.kv_cache != "float":
        raise TargetRefusesError(
            f"A decoder beside an encoder keeps no keys and values in {settings.kv_cache}.",
            where="[lower] kv_cache",
            allowed="float",
        )
    if target.onnxruntime is not None and target.onnxruntime.attention == "standard":
        raise TargetRefusesError(
            "Attention to an encoder's states is not written in standard operators.",
            where="[onnxruntime] attention",
            allowed="fused",
        )


def cache_bytes(decoder: Decoder, target: Target) -> int:
    """Bytes of the buffers that hold a full cache of keys and values; those of an encoder's states included."""
    if decoder.cross:
        states = decoder.states or decoder.context
        beside = sum(2 * layer.kv_heads * layer.head_dim for layer in decoder.cross) * states
        return (decoder.cached_values * decoder.context + beside) * FLOAT
    if target.runtime == "onnxruntime":
        from edgeport.export.onnx.decoder import cache_specs, spec_bytes

        forgets = target.onnxruntime is None or target.onnxruntime.attention == "fused"
        return sum(spec_bytes(spec) for spec in cache_specs(replace(decoder, forgets=forgets))[0])
    if target.runtime == "executorch":
        from edgeport.export.executorch.cache import buffer_bytes, buffers

        return buffer_bytes(buffers(decoder))
    return decoder.cached_values * decoder.context * HALF


def lower(model: Model, target: Target, settings: LoweringSettings, out: Path) -> Artifact:
    """Write the model's files for a target into the empty folder `out`.

    Raises:
        TargetRefusesError: an operator, a shape or a format can't be lowered; the message names it.
    """
    check_settings(model, target, settings)
    if target.runtime == "onnxruntime":
        from edgeport.export.onnx.lower import lower as lower_onnx

        return lower_onnx(model, target, settings, out)
    if target.runtime == "executorch":
        if target.executorch is not None and target.executorch.delegate == "coreml":
            return _lower_inside_executorch(model, target, settings, out)
        from edgeport.export.executorch.lower import lower as lower_executorch

        return lower_executorch(model, target, settings, out)
    from edgeport.export.coreml.lower import lower as lower_coreml

    return lower_coreml(model, target, settings, out)


def _lower_inside_executorch(model: Model, target: Target, settings: LoweringSettings, out: Path) -> Artifact:
    """An ExecuTorch program whose only content is the Core ML package that a Core ML target would get."""
    from edgeport.export.coreml.lower import lower as lower_coreml
    from edgeport.export.executorch.shell import wrap_package

    assert target.executorch is not None
    deployment = target.executorch.minimum_deployment_target
    if deployment is None:
        raise TargetRefusesError(
            f"The target {target.name!r} names no minimum_deployment_target.",
            where="[executorch]",
            allowed="iOS17, iOS18",
        )
    options = CoreMLOptions(minimum_deployment_target=deployment)
    with tempfile.TemporaryDirectory() as folder:
        inner = target.model_copy(update={"runtime": "coreml", "coreml": options})
        package = lower_coreml(model, inner, settings, Path(folder))
        return wrap_package(package, model, target, settings, out)


def read_weights(artifact: Artifact) -> dict[str, QuantizedTensor]:
    """The compressed weights that are really in the file, by parameter name."""
    if artifact.runtime == "onnxruntime":
        from edgeport.export.onnx.weights import read_weights as read_onnx

        return read_onnx(artifact)
    if artifact.runtime == "executorch" and artifact.delegate == "coreml":
        from edgeport.export.executorch.shell import unwrap_package

        with tempfile.TemporaryDirectory() as folder:
            return read_weights(unwrap_package(artifact, Path(folder)))
    if artifact.runtime == "executorch":
        from edgeport.export.executorch.weights import read_weights as read_executorch

        return read_executorch(artifact)
    from edgeport.export.coreml.weights import read_weights as read_coreml

    return read_coreml(artifact)


def read_delegation(artifact: Artifact) -> tuple[int, tuple[str, ...]] | None:
    """How many delegates are really in the file, and the kernels that it calls outside of them; None for a runtime
    without delegates.

    Raises:
        BadInputError: the file is missing or damaged.
    """
    if artifact.runtime != "executorch":
        return None
    from edgeport.export.executorch.pte import operators, read_program

    program = read_program(artifact.path).program
    return len(program.execution_plan[0].delegates), tuple(operators(program))
