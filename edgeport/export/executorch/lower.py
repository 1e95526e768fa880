"""Lower a Model to `model.pte` through the XNNPACK delegate. (`shell.py` makes programs for the Core ML delegate.)"""

from __future__ import annotations

import gc
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeport.errors import TargetRefusesError, first_line
from edgeport.export.artifact import Artifact, EncoderPart, LoweringSettings
from edgeport.export.executorch.faster import code_made_when_run, delegates_built_once
from edgeport.export.executorch.native import NativeWeight
from edgeport.export.executorch.program import export_program, exporter_patches
from edgeport.export.executorch.pte import (
    operators,
    planned_bytes,
    products_with_float_activations,
    read_program,
    stored_weights,
)
from edgeport.export.executorch.quiet import load_libraries, muted, quiet
from edgeport.export.executorch.sharing import share_segments
from edgeport.export.executorch.weights import same_weight
from edgeport.model.types import Model, TensorSpec
from edgeport.quantized import QuantizedTensor
from edgeport.target import Target

if TYPE_CHECKING:
    import torch

ENTRY = "model.pte"
METHOD = "forward"
"""The method of a program that has one."""


@dataclass(frozen=True)
class _Interface:
    """What goes in and out of a file.

    Attributes:
        inputs, outputs: as the file has them; of several methods the last one's.
        examples: a call's inputs, in their order, of each method.
        constants: methods of the file that answer a constant.
        facts: what there is to report of the trace.
        encoder: the method that runs before, of an encoder-decoder.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    examples: Mapping[str, tuple[torch.Tensor, ...]]
    constants: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    encoder: EncoderPart | None = None


def _trace(model: Model, settings: LoweringSettings) -> tuple[dict[str, torch.export.ExportedProgram], _Interface]:
    """The program of each method, and what goes in and out."""
    if model.decoder is None:
        return {METHOD: export_program(model, settings)}, _Interface(
            _file_specs(model.inputs, settings),
            _file_specs(model.outputs, settings),
            {METHOD: tuple(model.example[spec.name].contiguous() for spec in model.inputs)},
        )
    if model.decoder.cross:
        from edgeport.export.executorch import encoder_decoder as both

        return both.export_both(model), _Interface(
            *both.decoder_specs(model),
            dict(zip((both.ENCODER, both.DECODER), both.example_inputs(model), strict=True)),
            both.constants(model),
            both.facts(model),
            EncoderPart(ENTRY, *both.encoder_specs(model), model.decoder.start),
        )
    from edgeport.export.executorch import decoder

    return {METHOD: decoder.export_decoder(model)}, _Interface(
        *decoder.file_specs(model.decoder),
        {METHOD: decoder.example_inputs(model.decoder)},
        decoder.constant_methods(model),
        decoder.facts(model.decoder),
    )


def _check_formats(model: Model) -> None:
    """Refuse weights in a form that XNNPACK would compute wrongly or can't take.

    Raises:
        TargetRefusesError: naming the layer.
    """
    for name, tensor in model.quantized.items():
        # A matrix with 32 columns has one group a row: 4-bit weights count as grouped all the same.
        known = (tensor.bits == 8 and tensor.per_channel) or (tensor.bits == 4 and tensor.group_size % 32 == 0)
        if not known or not tensor.symmetric or tensor.axis != 0:
            raise TargetRefusesError(
                f"XNNPACK has no kernel for {tensor.bits}-bit weights of this form.",
                where=f"layer {name}",
                allowed="symmetric 8-bit weights per channel, or 4-bit weights in groups of a multiple of 32",
            )
        ranges = model.ranges.get(name)
        if tensor.codes.dim() > 2 and tensor.codes.shape[1] == 1 and ranges is None:
            raise TargetRefusesError(
                "XNNPACK takes integer weights in full convolutions only when activations are quantized on the fly, "
                "and this one reads one channel a group.",
                where=f"layer {name}",
                allowed="static_int8 activations",
                next_step="Choose the recipe int8-static, or leave the layer uncompressed with `exclude`.",
            )
        if ranges is not None and ranges.output is None:
            raise TargetRefusesError(
                "XNNPACK's kernels for static activations give integers, and the layer has no range for its output.",
                where=f"layer {name}",
                next_step="Compress the original for this target.",
            )


def _lower_programs(
    programs: Mapping[str, torch.export.ExportedProgram], model: Model, constants: Mapping[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """The ExecuTorch program manager, and what was delegated.

    Raises:
        TargetRefusesError: a pass or the delegate failed.
    """
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.backends.xnnpack.utils.configs import get_transform_passes, get_xnnpack_edge_compile_config
    from executorch.exir import ExecutorchBackendConfig, to_edge_transform_and_lower
    from executorch.exir.passes import MemoryPlanningPass
    from transformers.exporters.utils import apply_fx_node_fixes, apply_fx_program_fixes

    try:
        for program in programs.values():
            apply_fx_program_fixes("executorch", program)
            apply_fx_node_fixes("executorch", program.graph_module)
        with code_made_when_run(), delegates_built_once():
            edge = to_edge_transform_and_lower(
                dict(programs),
                transform_passes=get_transform_passes(),
                partitioner=[XnnpackPartitioner()],
                compile_config=get_xnnpack_edge_compile_config(),
                constant_methods=dict(constants) or None,
            )
            delegation = _delegation(edge, programs)
            # Of several methods one reads what another gave, which is large: where it lies, not a copy.
            plan = MemoryPlanningPass(alloc_graph_input=len(programs) == 1)
            return edge.to_executorch(ExecutorchBackendConfig(memory_planning_pass=plan)), delegation
    except Exception as error:
        raise TargetRefusesError(
            f"ExecuTorch can't lower the model: {first_line(error)}",
            where=f"model {model.name}",
            next_step="Try fixed shapes (`--shapes fixed`), or another runtime.",
        ) from error


def _check_kernels(names: list[str], model: Model) -> None:
    """Refuse a program that calls a kernel which the runtime lacks.

    Raises:
        TargetRefusesError: naming the operators.
    """
    from executorch.extension.pybindings import _portable_lib

    known = set(_portable_lib._get_operator_names())
    # executorch_prim operators are built into the runtime's core and are not listed.
    missing = [name for name in names if name not in known and not name.startswith("executorch_prim::")]
    if missing:
        raise TargetRefusesError(
            f"The ExecuTorch runtime has no kernel for {', '.join(missing)}.",
            where=f"model {model.name}",
            next_step="Try another runtime, for example ONNX Runtime.",
        )


def _check_runs(path: Path, examples: Mapping[str, tuple[torch.Tensor, ...]], model: Model) -> None:
    """Load each method with its delegates and run it once on its example: some faults show only then.

    Raises:
        TargetRefusesError: the runtime refuses the file, or stops in it.
    """
    from executorch.runtime import Runtime

    try:
        with muted():
            program = Runtime.get().load_program(path)
            for method, example in examples.items():
                program.load_method(method).execute(list(example))
    except RuntimeError as error:
        raise TargetRefusesError(
            f"The ExecuTorch runtime can't run the lowered program: {first_line(error)}",
            where=f"model {model.name}",
            next_step="Try another recipe or runtime; `--debug` shows what the runtime says.",
        ) from error


def used_weights(program: torch.export.ExportedProgram, model: Model) -> dict[str, QuantizedTensor]:
    """The compressed weights that the exported outputs depend on: a head nobody asked for is not exported."""
    program.graph.eliminate_dead_code()
    parameters = program.graph_signature.inputs_to_parameters
    used = {
        program.state_dict[parameters[node.name]].layer
        for node in program.graph.nodes
        if node.op == "placeholder"
        and node.users
        and node.name in parameters
        and isinstance(program.state_dict[parameters[node.name]], NativeWeight)
    }
    return {name: tensor for name, tensor in model.quantized.items() if name in used}


def _check_activations(file: Any, places: Mapping[str, str]) -> None:
    """Refuse a file in which XNNPACK would multiply integer weights by float activations: the result is wrong.

    Raises:
        TargetRefusesError: naming the layer.
    """
    for place in products_with_float_activations(file):
        name = next((name for name, several in places.items() if place in several.split(" + ")), place)
        raise TargetRefusesError(
            "XNNPACK would multiply this layer's integer weights by float activations, which it computes wrongly.",
            where=f"layer {name}",
            next_step="Leave the layer uncompressed with the recipe's `exclude`.",
        )


def place_weights(quantized: Mapping[str, QuantizedTensor], file: Any) -> dict[str, str]:
    """Where the file holds each logical weight: places as in `stored_weights`, several joined by " + ".

    Raises:
        TargetRefusesError: a weight is nowhere in the file, bit for bit.
    """
    stored = list(stored_weights(file))
    places = {}
    for name, tensor in quantized.items():
        found = [place for place, weight in stored if same_weight(weight, tensor)]
        if not found:
            raise TargetRefusesError(
                "The lowered file does not hold the compressed weight: the delegate stored it in another form.",
                where=f"layer {name}",
                next_step="Leave the layer uncompressed with the recipe's `exclude`.",
            )
        places[name] = " + ".join(found)
    return places


def _delegation(edge: Any, methods: Iterable[str]) -> dict[str, Any]:
    """Counts of graph nodes inside and outside of delegates, of all methods; tuple accesses are not counted.

    `executorch.devtools` has such a count, but importing it takes 50 MB for pandas.
    """
    from executorch.exir.backend.utils import get_delegates, get_non_lowered_nodes

    def counted(nodes: Iterable[torch.fx.Node]) -> Counter[str]:
        # A node is named after its operator, with a number behind it from the second on.
        names = [re.sub(r"_\d+$", "", node.name) for node in nodes if node.op == "call_function"]
        return Counter(name for name in names if name != "getitem")

    delegates, inside, outside = 0, 0, Counter[str]()
    for method in methods:
        program = edge.exported_program(method).graph_module
        found = get_delegates(program.graph)
        delegates += len(found)
        inside += sum(counted(getattr(program, str(node.target)).original_module.graph.nodes).total() for node in found)
        outside += counted(get_non_lowered_nodes(program.graph))
    return {
        "delegates": delegates,
        "delegated_nodes": inside,
        "non_delegated_nodes": outside.total(),
        "outside_delegates": dict(sorted(outside.items())),
    }


def _file_specs(specs: tuple[TensorSpec, ...], settings: LoweringSettings) -> tuple[TensorSpec, ...]:
    if settings.shapes == "dynamic":
        return specs
    return tuple(replace(spec, shape=spec.fixed_shape()) for spec in specs)


def lower(model: Model, target: Target, settings: LoweringSettings, out: Path) -> Artifact:
    """Write `model.pte` into the existing folder `out`.

    Inputs and outputs of the file are in the model's order. The program is checked before it is handed
    on: every kernel it calls exists in the runtime, the runtime runs it, and every compressed weight that
    the outputs need lies in it bit for bit.

    Raises:
        TargetRefusesError: the model can't be traced, lowered or loaded; the message names the operator or layer.
    """
    if target.executorch is None or target.executorch.delegate != "xnnpack":
        raise TargetRefusesError(f"The target {target.name!r} does not run XNNPACK programs.", where=target.name)
    _check_formats(model)
    load_libraries()
    with quiet(), exporter_patches():
        programs, interface = _trace(model, settings)
        each = [used_weights(program, model) for program in programs.values()]
        used = {name: tensor for name, tensor in model.quantized.items() if any(name in found for found in each)}
        lowered, delegation = _lower_programs(programs, model, interface.constants)
        path = out / ENTRY
        with path.open("wb") as stream:
            lowered.write_to_file(stream)
        # Both hold every weight; what follows needs the file only.
        del programs, lowered
        gc.collect()
        share_segments(path)
        file = read_program(path)
        facts: dict[str, Any] = {
            "operators": operators(file.program),
            "planned_memory_bytes": planned_bytes(file.program),
        }
        _check_kernels(facts["operators"], model)
        places = place_weights(used, file)
        _check_activations(file, places)
        del file  # the runtime needs the room
        _check_runs(path, interface.examples, model)
    return Artifact(
        runtime="executorch",
        delegate="xnnpack",
        root=out,
        entry=ENTRY,
        inputs=interface.inputs,
        outputs=interface.outputs,
        weights=places,
        context=None if model.decoder is None else model.decoder.context,
        encoder=interface.encoder,
        facts={
            **delegation,
            **interface.facts,
            **facts,
            "weight_shapes": {name: list(tensor.codes.shape) for name, tensor in used.items()},
            "unused_weights": sorted(set(model.quantized) - set(used)),
            "versions": _versions(),
        },
    )


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("executorch", "torch", "transformers")}
