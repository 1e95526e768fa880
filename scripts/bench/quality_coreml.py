"""coremltools' own compression for the quality bench, on the float16 package that edgeport converts."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quality_bench import Bench, Made
from quality_peers import Peer
from quality_table import EVALUATOR

from edgeport.export.artifact import Artifact, LoweringSettings
from edgeport.export.dispatch import lower
from edgeport.runtime.session import open_session
from edgeport.target import load_target

if TYPE_CHECKING:
    from edgeport.model.types import Model

TARGET = "ios18-coreml"
LINEAR, PALETTE = "linear_quantize_weights", "palettize_weights"
KINDS = ("linear", "matmul", "conv", "gather")
"""Operators whose weights are compressed: a global setting would also take folded constants of no use to anyone."""


def linear(coreml: Any, bits: int, block: int | None) -> Any:
    """Linear quantization, symmetric, a scale a channel or a block."""
    config = coreml.OpLinearQuantizerConfig(
        mode="linear_symmetric",
        dtype=f"int{bits}",
        granularity="per_channel" if block is None else "per_block",
        **({} if block is None else {"block_size": block}),
    )
    return coreml.OptimizationConfig(op_type_configs=dict.fromkeys(KINDS, config))


def palette(coreml: Any, bits: int, channels: int | None) -> Any:
    """K-means palettes, one a weight or one every some channels."""
    config = coreml.OpPalettizerConfig(
        mode="kmeans",
        nbits=bits,
        granularity="per_tensor" if channels is None else "per_grouped_channel",
        **({} if channels is None else {"group_size": channels}),
        num_kmeans_workers=1,
    )
    return coreml.OptimizationConfig(op_type_configs=dict.fromkeys(KINDS, config))


def stored_bits(path: Path) -> float:
    """Bits a weight of the constants that a package stores compressed, scales and palettes included."""
    from edgeport.export.coreml.weights import logical
    from edgeport.mlpackage.constants import constants
    from edgeport.mlpackage.package import load_package
    from edgeport.mlpackage.program import parse_function

    found = constants(parse_function(load_package(path)).body).values()
    tensors = [logical(constant) for constant in found if constant.operator.startswith("constexpr_")]
    return 8 * sum(t.storage_bytes() for t in tensors) / sum(t.codes.numel() for t in tensors)


def row(function: str, make_config: Callable[[Any], Any]) -> Callable[[Bench, Path], Made]:
    def make(bench: Bench, folder: Path) -> Made:
        import coremltools as ct
        import coremltools.optimize.coreml as coreml

        plain = _plain(bench)
        package = ct.models.MLModel(str(plain.path), skip_model_load=True)
        compressed = getattr(coreml, function)(package, make_config(coreml))
        path = folder / "model.mlpackage"
        compressed.save(str(path))
        made = Artifact("coreml", "coreml", folder, path.name, plain.inputs, plain.outputs)
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        return Made(bench.ask(open_session(made).run), size, stored_bits(path), EVALUATOR)

    return make


_CONVERTED: dict[Path, Artifact] = {}


def _plain(bench: Bench) -> Artifact:
    """The uncompressed package, converted once a run."""
    folder = bench.shared / "coreml"
    if folder not in _CONVERTED:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        settings = LoweringSettings("fp16", "dynamic")
        _CONVERTED[folder] = lower(bench.model, load_target(TARGET), settings, folder)
    return _CONVERTED[folder]


def coreml_peers(model: Model) -> Iterator[Peer]:
    """The rows that apply to a model."""
    tool = f"coremltools {version('coremltools')}"
    yield Peer(tool, "linear int8", "int8 per channel symmetric", row(LINEAR, lambda c: linear(c, 8, None)))
    yield Peer(tool, "linear int4, blocks", "int4 g32 symmetric", row(LINEAR, lambda c: linear(c, 4, 32)))
    for bits in (8, 6, 4):
        words = f"{bits}-bit palette"
        yield Peer(tool, f"k-means {bits} bits", words, row(PALETTE, lambda c, bits=bits: palette(c, bits, None)))
        if bits < 8:
            make = row(PALETTE, lambda c, bits=bits: palette(c, bits, 16))
            yield Peer(tool, f"k-means {bits} bits grouped", f"{words} every 16 channels", make)
