"""`edgeport export MODEL --target T [--recipe R] -o DIR`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgeport.cli.options import (
    AllowPickle,
    AsJson,
    CalibrationData,
    Context,
    Debug,
    ExampleInputs,
    Full,
    Name,
    Quick,
    Suites,
    Task,
    Verbose,
    check_effort,
)

if TYPE_CHECKING:
    from rich.console import Console

    from edgeport.job import ExportRequest
    from edgeport.pipeline import ExportResult
    from edgeport.plan import Plan
    from edgeport.recipe import Recipe


DEFAULT_RECIPE = "int8"


class Shapes(StrEnum):
    """The values of `--shapes`."""

    fixed = "fixed"
    dynamic = "dynamic"


def _lengths(text: str | None) -> tuple[int, ...]:
    """Read `--enumerate 32,64,128`.

    Raises:
        BadInputError: it is no list of whole numbers above 0.
    """
    from edgeport.errors import BadInputError

    if text is None:
        return ()
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise BadInputError(
            f"{text!r} is no list of lengths.", where="--enumerate", allowed="whole numbers above 0, such as 32,64,128"
        )
    return tuple(sorted({int(part) for part in parts}))


def _recipe(reference: str | None, model: str, calibration: list[str] | None) -> Recipe:
    """The recipe asked for; without one a compressed folder's own, or int8.

    Raises:
        BadInputError: there is no such recipe, or it can't be tuned on this data.
    """
    from edgeport.errors import BadInputError
    from edgeport.model.compressed import compressed_folder, read_record
    from edgeport.recipe import calibrated_on, load_recipe

    folder = compressed_folder(model)
    if folder is not None and calibration:
        raise BadInputError(
            "The folder is compressed already.",
            where="--calibration",
            next_step="Give it to `edgeport compress`, or export the model that the folder was made of.",
        )
    if folder is not None and reference is None:
        return read_record(folder).recipe
    return calibrated_on(load_recipe(reference or DEFAULT_RECIPE), calibration or ())


def export(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="zoo:NAME, a Hugging Face folder or hub id, a folder of `edgeport compress`, a .gguf file, or "
            "package.module:factory.",
            show_default=False,
        ),
    ],
    target: Annotated[
        str, typer.Option("--target", "-t", help="Where it must run: a name of `edgeport targets`, or a .toml file.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The bundle's folder.")],
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            "-r",
            help="What to do: a name of `edgeport recipes`, or a .toml file.",
            show_default="int8; of a compressed folder its own",
        ),
    ] = None,
    calibration: CalibrationData = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan, and write nothing.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the output folder if it is a bundle.")] = False,
    shapes: Annotated[
        Shapes | None, typer.Option(help="Fixed or dynamic input shapes.", show_default="the target's own")
    ] = None,
    sequence: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Length of the sequence axis; shapes are then fixed unless --shapes dynamic.",
            show_default=False,
        ),
    ] = None,
    context: Context = None,
    enumerate_: Annotated[
        str | None,
        typer.Option("--enumerate", metavar="N,N,...", help="Sequence lengths to take (Core ML).", show_default=False),
    ] = None,
    image_input: Annotated[bool, typer.Option("--image-input", help="Take a picture (Core ML, vision).")] = False,
    ort_format: Annotated[
        bool | None,
        typer.Option(
            "--ort-format/--no-ort-format", help="Also write an ORT-format file.", show_default="the target's own"
        ),
    ] = None,
    name: Name = None,
    task: Task = None,
    example_inputs: ExampleInputs = None,
    allow_pickle: AllowPickle = False,
    samples: Annotated[
        int, typer.Option(min=4, help="Real inputs to compare on (a compressed folder has its own).")
    ] = 64,
    suite: Suites = None,
    quick: Quick = False,
    full: Full = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Compress a model, lower it for a target, measure the file, and bundle both.

    \b
    Examples:
      edgeport export zoo:minilm --target android-arm64-ort -o out/minilm
      edgeport export ./my-hf-model -t ios18-coreml --recipe int8 --enumerate 32,64,128 -o out/mine
      edgeport export my_package.models:make_net -t raspberry-pi-5-executorch -r fp32 -o out/net
      edgeport export zoo:minilm -t android-arm64-ort --suite sentiment --suite intents -o out/minilm
      edgeport export ./my-lm -t android-arm64-ort -r int4 --calibration my-texts.jsonl -o out/lm
      edgeport export zoo:smollm2 -t android-arm64-ort -r int4 -o out/lm --dry-run
      edgeport export out/minilm-int8 -t ios18-coreml -o out/bundle      # what `edgeport compress` wrote

    Finished stages are kept in the cache: an interrupted run goes on where it was.
    """
    from edgeport.cli.console import answer, working
    from edgeport.job import ExportRequest
    from edgeport.target import load_target

    check_effort(quick, full)
    request = ExportRequest(
        model=model,
        target=load_target(target),
        recipe=_recipe(recipe, model, calibration),
        output=output,
        force=force,
        name=name,
        task=task,
        example_inputs=example_inputs,
        allow_pickle=allow_pickle,
        shapes=None if shapes is None else shapes.value,
        sequence=sequence,
        context=context,
        enumerated=_lengths(enumerate_),
        image_input=image_input,
        ort_format=ort_format,
        samples=samples,
        quick=quick,
        full=full,
        suites=tuple(suite or ()),
    )
    with working(verbose=verbose or debug) as watcher:
        watcher.stage("start")
        if dry_run:
            from edgeport.pipeline import plan

            planned = plan(request, watcher)
        else:
            from edgeport.pipeline import export as run

            result = run(request, watcher)
    if dry_run:
        answer(planned.model_dump(mode="json"), as_json, lambda console: _draw_plan(console, planned))
        return
    answer(_document(result), as_json, lambda console: _draw_result(console, request, result))
    raise typer.Exit(result.exit_code)


def _document(result: ExportResult) -> dict[str, Any]:
    return {
        "bundle": str(result.bundle),
        "report": str(result.bundle / "report.html"),
        "exit_code": result.exit_code,
        "verdict": result.verdict.model_dump(mode="json"),
        "seconds": round(result.seconds, 3),
        "evidence": dict(result.evidence),
    }


def _draw_result(console: Console, request: ExportRequest, result: ExportResult) -> None:
    from edgeport.cli.summary import draw_evidence

    title = f"{request.model} for {request.target.name}, recipe {request.recipe.name} ({result.seconds:.0f} s)"
    console.print(title, style="bold", markup=False, soft_wrap=True)
    more = [("bundle", str(result.bundle)), ("report", str(result.bundle / "report.html"))]
    draw_evidence(console, result.evidence, more)


def _draw_plan(console: Console, plan: Plan) -> None:
    from collections import Counter

    from edgeport.cli.summary import in_bytes, memory_plan_words
    from edgeport.cli.tables import facts

    formats = Counter(f"{layer.format} ({layer.activation} activations)" for layer in plan.layers)
    rows = [
        ("model", f"{plan.model}: {plan.task}, {plan.parameters / 1e6:.1f} M parameters, {in_bytes(plan.fp32_bytes)}"),
        ("target", f"{plan.target} ({plan.runtime})"),
        ("recipe", f"{plan.recipe}, arithmetic in {plan.precision}, {plan.shapes} shapes"),
        *((f"input {name}", " x ".join(str(size) for size in shape)) for name, shape in plan.inputs.items()),
        ("weights", ", ".join(f"{count} {name}" for name, count in sorted(formats.items()))),
        ("predicted size", f"{in_bytes(plan.predicted_bytes)} ({plan.predicted_bytes / plan.fp32_bytes:.2f}x of fp32)"),
        ("memory on device", memory_plan_words(plan.memory.model_dump())),
        ("peak memory here", _need(plan.predicted_peak_memory_bytes, plan.available_memory_bytes)),
        ("disk", _need(plan.predicted_disk_bytes, plan.available_disk_bytes)),
        *(("check", check) for check in plan.checks),
        *(("warning", warning) for warning in plan.warnings),
        *((f"stage {s.name}", s.detail + (" (in the cache)" if s.cached else "")) for s in plan.stages),
    ]
    console.print(facts(rows))
    console.print("Nothing was written: this was a dry run.")


def _need(predicted: int, available: int) -> str:
    from edgeport.cli.summary import in_bytes

    return f"about {in_bytes(predicted)} of {in_bytes(available)} free"
