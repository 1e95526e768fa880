"""The plan of a job: which stages are done already, and what the rest will take."""

from __future__ import annotations

import shutil

from edgeport import plan
from edgeport.errors import BadInputError
from edgeport.job import Job
from edgeport.storage import cache_root


def make_plan(job: Job) -> plan.Plan:
    """The plan of a prepared job.

    Raises:
        TargetRefusesError: the target's device has too little memory.
    """
    import psutil

    from edgeport.compress.mixed import weight_budgets
    from edgeport.device_memory import check_fits, plan_memory
    from edgeport.model.types import Axis
    from edgeport.stages import is_stored

    request, model, settings = job.request, job.model, job.settings
    target, recipe = request.target, request.recipe
    parameters = sum(p.numel() for p in model.module.parameters())
    budgets = {} if model.quantized else weight_budgets(job.assignments, recipe, target)
    predicted = plan.predict_size(job.shape, job.assignments, settings.precision, target.runtime, budgets)
    largest = plan.largest_weight(job.shape, job.assignments)
    widened = plan.widened_bytes(job.shape, job.assignments, settings.precision, target.runtime)
    device = plan_memory(job.shape, target, weights=predicted, repacked=largest + widened)
    check_fits(device, target)
    baseline = plan.predict_size(model, (), "fp32", target.runtime)
    memory = plan.LIBRARIES_BYTES[target.runtime] + int(plan.WEIGHT_COPIES[target.runtime] * parameters * 4)
    disk = 2 * predicted + baseline + plan.reference_bytes(model, job.sample_count)
    before = job.compressed is not None
    stages = [
        ("reference", "stored with the compressed model", None)
        if before
        else ("reference", f"{job.sample_count} inputs through the torch model", job.reference_key),
        *(() if job.shaped is None else (("restructure", _restructuring(job), job.restructure_key),)),
        ("compress", f"recipe {recipe.name}" + (", done before" if before else ""), None)
        if before or not job.compresses
        else ("compress", f"recipe {recipe.name}", job.compress_key),
        *([("scales", f"keys and values in {settings.kv_cache}", job.scales_key)] if job.scales_key else []),
        ("lower", f"{target.runtime}, {settings.precision}, {settings.shapes} shapes", job.lower_key),
        ("baseline", f"the {'dequantised' if before else 'same'} model in fp32, to compare with", job.baseline_key),
        ("validate", target.execution.statement, job.validate_key),
    ]
    available = psutil.virtual_memory().available
    cache = cache_root()
    while not cache.exists():
        cache = cache.parent
    free = shutil.disk_usage(cache).free
    warnings = []
    if memory > available:
        warnings.append(f"Lowering may need {memory / 1e9:.1f} GB of memory; {available / 1e9:.1f} GB are available.")
    if disk > free:
        warnings.append(f"The run may write {disk / 1e9:.1f} GB; {free / 1e9:.1f} GB are free.")
    if model.source.note:
        warnings.append(model.source.note)
    return plan.Plan(
        model=model.name,
        task=model.task,
        parameters=parameters,
        fp32_bytes=parameters * 4,
        target=target.name,
        runtime=target.runtime,
        recipe=recipe.name,
        precision=settings.precision,
        shapes=settings.shapes,
        inputs={
            spec.name: tuple(size.name if isinstance(size, Axis) else size for size in spec.shape)
            for spec in model.inputs
        },
        stages=tuple(
            plan.PlannedStage(name=name, detail=detail, cached=key is not None and is_stored(stage_folder(name), key))
            for name, detail, key in stages
        ),
        layers=plan.planned_layers(job.assignments),
        predicted_bytes=predicted,
        predicted_peak_memory_bytes=memory,
        available_memory_bytes=available,
        predicted_disk_bytes=disk,
        memory=device,
        available_disk_bytes=free,
        checks=plan.planned_checks(recipe, target, any(item.format.quantized for item in job.assignments)),
        warnings=tuple(warnings),
    )


def _restructuring(job: Job) -> str:
    """What the recipe makes of the model, in words."""
    steps = ", ".join(step.method for step in job.request.recipe.restructure)
    count = sum(parameter.numel() for parameter in job.shape.module.parameters())
    return f"{steps}: {count / 1e6:.1f} M parameters stay"


def stage_folder(name: str) -> str:
    """The store's folder for a stage: the baseline is a lowering like any other."""
    return "lower" if name == "baseline" else name


def check_resources(planned: plan.Plan) -> None:
    """Refuse a run that the disk can't hold. Memory is an estimate, so it only warns.

    Raises:
        BadInputError: too little disk is free.
    """
    if planned.predicted_disk_bytes > planned.available_disk_bytes:
        raise BadInputError(
            f"The run needs about {planned.predicted_disk_bytes / 1e9:.2f} GB of disk; "
            f"{planned.available_disk_bytes / 1e9:.2f} GB are free.",
            where=cache_root(),
            next_step="Free some space, or set EDGEPORT_CACHE to a folder on another disk.",
        )
