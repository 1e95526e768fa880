"""`edgeport compress MODEL --recipe R -o DIR`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgeport.cli.options import AllowPickle, AsJson, CalibrationData, Debug, Name, Task, Verbose

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from edgeport.compress import LayerRecord
    from edgeport.compress.restructure import StepRecord
    from edgeport.compression import CompressPlan, CompressRequest, CompressResult

WORST = 5
"""Layers named as the worst."""


def compress(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A Hugging Face folder or hub id, zoo:NAME, a .gguf file, or package.module:factory."
        ),
    ],
    recipe: Annotated[
        str, typer.Option("--recipe", "-r", help="What to do: a name of `edgeport recipes`, or a .toml file.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write.")],
    target: Annotated[
        str | None,
        typer.Option(
            "--target",
            "-t",
            help="Use this target's formats and grids: a name of `edgeport targets`, or a .toml file.",
            show_default="the recipe's first formats, on scales that every target can store",
        ),
    ] = None,
    calibration: CalibrationData = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what each weight becomes; write nothing.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the output folder if it is a compressed model.")
    ] = False,
    sequence: Annotated[
        int | None,
        typer.Option(
            min=1, help="Length of the stored reference inputs, for targets with fixed shapes.", show_default=False
        ),
    ] = None,
    name: Name = None,
    task: Task = None,
    allow_pickle: AllowPickle = False,
    samples: Annotated[int, typer.Option(min=4, help="Real inputs stored with the original's outputs.")] = 64,
    as_json: AsJson = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Compress a model, and write it as a Hugging Face folder of packed codes and scales.

    \b
    Examples:
      edgeport compress zoo:minilm --recipe int8 -o out/minilm-int8
      edgeport compress ./my-lm -r int4 --target android-arm64-executorch -o out/lm-int4
      edgeport compress model.gguf -r int4 -o out/lm-int4 --dry-run
      edgeport export out/minilm-int8 --target ios18-coreml -o out/bundle    # here or on another machine

    The folder carries inputs and the original's outputs on them, so that an export elsewhere can prove itself against
    the original. Finished stages are kept in the cache: an interrupted run goes on where it was.
    """
    from edgeport.cli.console import answer, working
    from edgeport.compression import CompressRequest
    from edgeport.recipe import calibrated_on, load_recipe
    from edgeport.target import load_target

    request = CompressRequest(
        model=model,
        recipe=calibrated_on(load_recipe(recipe), calibration or ()),
        output=output,
        target=None if target is None else load_target(target),
        force=force,
        name=name,
        task=task,
        allow_pickle=allow_pickle,
        sequence=sequence,
        samples=samples,
    )
    with working(verbose=verbose or debug) as watcher:
        watcher.stage("start")
        if dry_run:
            from edgeport.compression import plan

            planned = plan(request, watcher)
        else:
            from edgeport.compression import compress as run

            result = run(request, watcher)
    if dry_run:
        answer(_planned(planned), as_json, lambda console: _draw_plan(console, planned))
    else:
        answer(_document(request, result), as_json, lambda console: _draw_result(console, request, result))


def _planned(planned: CompressPlan) -> dict[str, Any]:
    fields = {key: value for key, value in vars(planned).items() if key != "layers"}
    return {**fields, "layers": [layer.model_dump(mode="json") for layer in planned.layers]}


def _document(request: CompressRequest, result: CompressResult) -> dict[str, Any]:
    return {
        "folder": str(result.folder),
        "model": result.model,
        "recipe": request.recipe.name,
        "target": None if request.target is None else request.target.name,
        "bytes_before": result.bytes_before,
        "bytes_after": result.bytes_after,
        "samples": result.samples,
        "seconds": round(result.seconds, 3),
        "cost": asdict(result.cost),
        "steps": [asdict(step) for step in result.steps],
        "layers": [asdict(layer) for layer in result.layers],
        "files": dict(result.files),
    }


def _worst(layers: Iterable[LayerRecord], error: str) -> list[LayerRecord]:
    measured = [layer for layer in layers if layer.method and getattr(layer, error) is not None]
    return sorted(measured, key=lambda layer: (-getattr(layer, error), layer.name))


def _span(layers: list[LayerRecord], error: str) -> str:
    """Median and largest of a relative error."""
    from statistics import median

    ordered = _worst(layers, error)
    if not ordered:
        return "-"
    values = [getattr(layer, error) for layer in ordered]
    return f"{median(values):.4f}, worst {values[0]:.4f}"


def _draw_result(console: Console, request: CompressRequest, result: CompressResult) -> None:
    from edgeport.cli.summary import cost_words, in_bytes
    from edgeport.cli.tables import facts, listing

    grids = "any target" if request.target is None else request.target.name
    title = f"{request.model} for {grids}, recipe {request.recipe.name} ({result.seconds:.0f} s)"
    console.print(title, style="bold", markup=False, soft_wrap=True)
    table = listing("weights", "layers", "float32", "now", "error of the weight", "error of the output")
    by_format: dict[str, list[LayerRecord]] = {}
    for layer in result.layers:
        by_format.setdefault(layer.format, []).append(layer)
    for name, layers in sorted(by_format.items()):
        before, after = sum(layer.bytes_before for layer in layers), sum(layer.bytes_after for layer in layers)
        sizes = (in_bytes(before), in_bytes(after))
        table.add_row(name, str(len(layers)), *sizes, _span(layers, "relative_error"), _span(layers, "output_error"))
    console.print(table)
    if result.steps:
        console.print(_steps_table(result.steps))
    rows = [("size", f"{in_bytes(result.bytes_after)}, {result.bytes_after / result.bytes_before:.3f}x of float32")]
    error = "output_error" if _worst(result.layers, "output_error") else "relative_error"
    for index, layer in enumerate(_worst(result.layers, error)[:WORST]):
        label = ("worst outputs" if error == "output_error" else "worst weights") if index == 0 else ""
        rows.append((label, f"{getattr(layer, error):.4f} {layer.name} ({layer.format}, {layer.method})"))
    rows.append(("cost", cost_words(asdict(result.cost))))
    rows += [("reference", f"{result.samples} inputs with the original's outputs"), ("folder", str(result.folder))]
    console.print(facts(rows))


def _steps_table(steps: Iterable[StepRecord]) -> Table:
    """What came before the weights: a row for each step."""
    from edgeport.cli.summary import in_bytes
    from edgeport.cli.tables import listing

    table = listing("step", "parameters", "float32", "FLOPs", "divergence so far")
    for step in steps:
        pairs = (
            f"{step.parameters_before / 1e6:.1f} -> {step.parameters_after / 1e6:.1f} M",
            f"{in_bytes(step.bytes_before)} -> {in_bytes(step.bytes_after)}",
            f"{step.flops_before / 1e6:.0f} -> {step.flops_after / 1e6:.0f} M",
        )
        table.add_row(step.method, *pairs, "-" if step.divergence is None else f"{step.divergence:.4f}")
    return table


def _draw_plan(console: Console, planned: CompressPlan) -> None:
    from collections import Counter

    from edgeport.cli.summary import in_bytes
    from edgeport.cli.tables import facts

    formats = Counter(layer.format for layer in planned.layers)
    ratio = planned.bytes_after / planned.bytes_before
    rows = [
        ("model", f"{planned.model}, {in_bytes(planned.bytes_before)} in float32"),
        ("recipe", planned.recipe + (" (in the cache)" if planned.cached else "")),
        ("target", planned.target or "any: scales that every target can store"),
        ("weights", ", ".join(f"{count} {name}" for name, count in sorted(formats.items()))),
        ("predicted size", f"{in_bytes(planned.bytes_after)} ({ratio:.2f}x of float32)"),
        ("reference", f"{planned.samples} inputs with the original's outputs"),
    ]
    console.print(facts(rows))
    console.print("Nothing was written: this was a dry run.")
