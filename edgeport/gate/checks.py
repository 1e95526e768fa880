"""Checks of what is always measured: parity, weights, tokenizer, generation, latency, size, memory."""

from __future__ import annotations

import math
from collections.abc import Sequence

from edgeport.budgets import Budgets
from edgeport.errors import EXIT_LATENCY, EXIT_MEMORY, EXIT_NOT_VALID, EXIT_PARITY, EXIT_SIZE
from edgeport.units import count_bytes, milliseconds
from edgeport.validate.evidence import Check, Interval, Latency, Measurements, OutputParity
from edgeport.validate.free_text import MOST_ERROR
from edgeport.validate.generation import LEAST_COSINE

ADVICE = {
    "finite": "Export with precision fp32, or look for a layer that overflows float16.",
    "varies": "Look at the exported graph: an input may be unused, or weights may be zero.",
    "weights_equal": "Report this as a bug of edgeport: the exporter did not write the weights it was given.",
    "delegated": "Look at why the delegate refused it (`outside_delegates` in the manifest): shapes, data types, an "
    "operator that it lacks. Where it must be so, name the kernel in `fallback_allowed`.",
    "free_text": "Take a recipe with more bits: by itself the model writes something else, whatever its scores say.",
    "long_cache": "Report this as a bug of edgeport: the cache goes wrong as it grows.",
    "tokenizer": "Do not ship it: the device would read other tokens. Look for what the checkpoint's tokenizer.json "
    "holds that the device's implementation does not know.",
    "cosine_min": "Keep the layers with the largest relative error in float (`exclude` in the recipe), or use int8.",
    "relative_l2_max": "Keep the layers with the largest relative error in float (`exclude` in the recipe).",
    "top1_agreement_min": "Keep the last layer in float (`exclude` in the recipe), or use int8 instead of int4.",
    "kl_max": "Keep the last layer in float (`exclude` in the recipe), or use int8 instead of int4.",
    "size_ratio_max": "Compress the largest layer group of the size waterfall, or use a smaller format.",
    "latency_ratio_max": "Use dynamic int8 activations where the target takes them.",
    "latency_p90_max": "Use dynamic int8 activations where the target takes them, or a shorter sequence.",
    "cpu_ratio_max": "Use dynamic int8 activations where the target takes them.",
    "size_max": "Compress the largest layer group of the size waterfall, or use a smaller format.",
    "cold_load_max": "Use a smaller format: a file that was not read lately loads as fast as the disk reads it.",
    "first_run_max": "Use fixed shapes, so that the runtime plans before the first call.",
    "peak_memory_max": "Use fixed shapes or a shorter sequence, or keep weights quantized at run time.",
    "peak_memory_ratio_max": "Use fixed shapes or a shorter sequence, or keep weights quantized at run time.",
}
MEASURE_ADVICE = "Measure again on a quiet machine with `edgeport export --full`, or budget cpu_ratio_max instead."
ABSENT_ADVICE = "Take the budget out of the recipe for this target, or measure it on a device."
HEAVY_KERNELS = ("aten::addmm", "aten::convolution", "aten::linear", "aten::mm")
"""That multiply by weights, and that a delegate is there for."""
NO_BASELINE = "there is no fp32 artifact of the same runtime"
LOGITS = "logits"
PARITY_BUDGETS = ("cosine_min", "relative_l2_max", "top1_agreement_min", "kl_max")


def bound(
    metric: str,
    measured: float | None,
    allowed: float,
    exit_code: int,
    *,
    output: str | None = None,
    unit: str = "",
    interval: Interval | None = None,
    why: str = "",
) -> Check:
    """One number against its budget; the metric's name says the direction (`..._min`, `..._max`).

    Args:
        interval: how far the number can be trusted; it is told, and does not decide (see `settled`).
        why: the number is absent.
    """
    what = metric if output is None else f"{metric} of {output}"
    known = measured is not None and math.isfinite(measured)
    least = metric.endswith("_min")
    passed = measured is not None and known and (measured >= allowed if least else measured <= allowed)
    message = f"{what} could not be measured: {why}"
    if known:
        spread = "" if interval is None else f" [{interval.low:.4g}, {interval.high:.4g}]"
        number, limit = (f"{value:.4g} {unit}".rstrip() for value in (measured, allowed))
        message = f"{what} is {number}{spread}; at {'least' if least else 'most'} {limit} is allowed"
    return Check(
        metric=metric,
        output=output,
        measured=measured if known else None,
        allowed=allowed,
        unit=unit,
        low=interval.low if known and interval else None,
        high=interval.high if known and interval else None,
        n=interval.n if interval else None,
        passed=passed,
        exit_code=exit_code,
        message=message,
        advice=ADVICE[metric],
    )


def settled(check: Check, advice: str) -> Check:
    """The check of an upper bound, undecided (15) where its interval holds the budget: measuring again may turn it."""
    if check.low is None or check.high is None or not check.low <= check.allowed < check.high:
        return check
    message = f"{check.message}; the interval of {check.n} calls holds the budget, so this run does not decide it"
    changes = {"passed": False, "undecided": True, "exit_code": EXIT_NOT_VALID, "message": message, "advice": advice}
    return check.model_copy(update=changes)


def flag(metric: str, output: str | None, fine: bool, message: str, exit_code: int = EXIT_PARITY) -> Check:
    """A yes-or-no check that always applies: 1 is measured when all is well, and 1 is demanded."""
    return Check(
        metric=metric,
        output=output,
        measured=float(fine),
        allowed=1.0,
        passed=fine,
        exit_code=exit_code,
        message=message,
        advice=ADVICE[metric],
    )


def unmeasured(
    metric: str, allowed: float, why: str, advice: str = ABSENT_ADVICE, *, output: str | None = None, unit: str = ""
) -> Check:
    """A budget on something that was not measured, or not validly: it fails (15)."""
    return Check(
        metric=metric,
        output=output,
        measured=None,
        allowed=allowed,
        unit=unit,
        passed=False,
        exit_code=EXIT_NOT_VALID,
        message=f"{metric if output is None else f'{metric} of {output}'} was not measured: {why}",
        advice=advice,
    )


def measured_checks(measurements: Measurements, budgets: Budgets) -> list[Check]:
    """One check for each budget that is set, and those that need none."""
    return [
        *parity_checks(measurements.parity, budgets),
        _weight_check(measurements),
        *_delegation_checks(measurements, budgets),
        *_tokenizer_checks(measurements),
        *_generation_checks(measurements),
        *_latency_checks(measurements, budgets),
        *_size_checks(measurements, budgets),
        *_memory_checks(measurements, budgets),
    ]


def parity_checks(compared: Sequence[OutputParity], budgets: Budgets) -> list[Check]:
    """Closeness to the original, output by output; what was not compared fails."""
    wanted = {name: getattr(budgets, name) for name in PARITY_BUDGETS if getattr(budgets, name) is not None}
    if not compared:
        why = "the artifact's outputs were not compared with the original's"
        return [unmeasured("finite", 1.0, why), *(unmeasured(name, value, why) for name, value in wanted.items())]
    checks = []
    for parity in compared:
        name = parity.output
        finite = "every value is finite" if parity.finite else "the artifact gives NaN or infinite values"
        varies = "it follows the inputs" if parity.varies else "the artifact gives the same output whatever comes in"
        checks.append(flag("finite", name, parity.finite, f"{name}: {finite}"))
        if parity.finite:
            checks.append(flag("varies", name, parity.varies, f"{name}: {varies}"))
        checks += [
            _parity_check(parity, metric, allowed) for metric, allowed in wanted.items() if _applies(parity, metric)
        ]
    return checks


def _applies(parity: OutputParity, metric: str) -> bool:
    """Top-1 agreement and KL belong to outputs that score classes; only those have positions."""
    return metric not in ("top1_agreement_min", "kl_max") or parity.positions is not None


def _parity_check(parity: OutputParity, metric: str, allowed: float) -> Check:
    means = {"cosine_min": parity.cosine, "top1_agreement_min": parity.top1_agreement, "kl_max": parity.kl}
    interval = means.get(metric)
    measured = parity.relative_l2 if metric == "relative_l2_max" else interval.mean if interval else None
    why = "it is missing from the measurements" if parity.finite else "the output is not finite"
    return bound(metric, measured, allowed, EXIT_PARITY, output=parity.output, interval=interval, why=why)


def _weight_check(measurements: Measurements) -> Check:
    found = measurements.weights
    if found is None:
        return unmeasured("weights_equal", 1.0, "the weights in the file were not read", ADVICE["weights_equal"])
    equal = not found.different and found.equal == found.checked
    message = f"{found.equal} of {found.checked} compressed weights in the file equal the logical ones, bit for bit"
    if found.different:
        message += f"; {found.different[0]}"
    return flag("weights_equal", None, equal, message)


def _delegation_checks(measurements: Measurements, budgets: Budgets) -> list[Check]:
    """What multiplies by weights runs in the delegate: portable kernels are many times slower, and equally right."""
    found = measurements.delegation
    if found is None:
        return []
    unwanted = set(HEAVY_KERNELS) - set(budgets.fallback_allowed)
    heavy = [name for name in found.kernels if name.partition(".")[0] in unwanted]
    told = f"{found.delegates} parts of the file run in {found.delegate}"
    if not found.delegates:
        told = f"no part of the file runs in {found.delegate}: it fell back to portable kernels"
    elif heavy:
        told += f", but {', '.join(heavy)} fell back to portable kernels"
    return [flag("delegated", None, bool(found.delegates) and not heavy, told, EXIT_LATENCY)]


def _tokenizer_checks(measurements: Measurements) -> list[Check]:
    """The device's tokenizer must agree; the others are told, not judged."""
    checks = []
    for found in measurements.tokenizers:
        if not found.device:
            continue
        if found.absent is not None:
            advice = "Install it: `pip install edgeport[all]`."
            checks.append(unmeasured("tokenizer", 1.0, f"{found.implementation}: {found.absent}", advice))
            continue
        told = f"{found.implementation} {found.version} splits {found.texts} texts as the original does"
        if found.failed is not None:
            told = f"{found.implementation} {found.version}: {found.failed}"
        elif found.different:
            told = f"{found.implementation} {found.version} splits {found.different} of {found.texts} texts otherwise: "
            told += "; ".join(found.examples)
        checks.append(flag("tokenizer", None, found.failed is None and not found.different, told))
    return checks


def _generation_checks(measurements: Measurements) -> list[Check]:
    """A text in the cache token by token scores as it does all at once."""
    found = measurements.generation
    if found is None:
        return []
    fine = found.long_cosine >= LEAST_COSINE
    message = (
        f"{found.long_tokens} tokens one by one score as all at once: cosine {found.long_cosine:.4f}, "
        f"KL {found.long_kl:.2g} nats; at least {LEAST_COSINE} is demanded"
    )
    checks = [flag("long_cache", LOGITS, fine, message)]
    if (text := found.free_text) is not None:
        fine = text.edits <= MOST_ERROR * text.tokens and text.unended <= MOST_ERROR * text.texts
        message = (
            f"writing by itself, {text.equal} of {text.texts} texts are the original's and {text.unended} never end; "
            f"{text.edits} of {text.tokens} tokens to change, at most {MOST_ERROR:.0%} is allowed"
        )
        checks.append(flag("free_text", None, fine, message))
    return checks


def _latency_checks(measurements: Measurements, budgets: Budgets) -> list[Check]:
    latency = measurements.latency
    absent = measurements.latency_absent or "no reason is recorded"
    checks = []
    if (allowed := budgets.latency_ratio_max) is not None:
        why = absent if latency is None else NO_BASELINE
        checks.append(
            _wall_check("latency_ratio_max", latency, None if latency is None else latency.ratio, allowed, "", why)
        )
    if budgets.latency_p90_max is not None:
        why = absent if latency is None else "the evidence is older than this metric"
        most = milliseconds(budgets.latency_p90_max)
        checks.append(
            _wall_check("latency_p90_max", latency, None if latency is None else latency.p90, most, "ms", why)
        )
    if (allowed := budgets.cpu_ratio_max) is not None:
        checks.append(_cpu_check(latency, absent, allowed))
    return checks


def _wall_check(
    metric: str, latency: Latency | None, interval: Interval | None, allowed: float, unit: str, why: str
) -> Check:
    """Wall time is judged of a valid run only."""
    if latency is None or interval is None:
        return unmeasured(metric, allowed, why, unit=unit)
    if not latency.valid:
        return unmeasured(metric, allowed, f"the run is not valid: {latency.note}", MEASURE_ADVICE, unit=unit)
    return settled(bound(metric, interval.mean, allowed, EXIT_LATENCY, unit=unit, interval=interval), MEASURE_ADVICE)


def _cpu_check(latency: Latency | None, absent: str, allowed: float) -> Check:
    """Processor time stands where the wall time was disturbed."""
    if latency is None:
        return unmeasured("cpu_ratio_max", allowed, absent)
    if latency.cpu_ratio is None:
        why = NO_BASELINE if latency.ratio is None else f"{latency.queries} calls are too few"
        return unmeasured("cpu_ratio_max", allowed, why, MEASURE_ADVICE)
    interval = latency.cpu_ratio
    return settled(bound("cpu_ratio_max", interval.mean, allowed, EXIT_LATENCY, interval=interval), MEASURE_ADVICE)


def _size_checks(measurements: Measurements, budgets: Budgets) -> list[Check]:
    size, checks = measurements.size, []
    if (allowed := budgets.size_ratio_max) is not None:
        if size.ratio is None:
            checks.append(unmeasured("size_ratio_max", allowed, NO_BASELINE))
        else:
            checks.append(bound("size_ratio_max", size.ratio, allowed, EXIT_SIZE))
    if budgets.size_max is not None:
        most = count_bytes(budgets.size_max) / 1e6
        checks.append(bound("size_max", size.bytes / 1e6, most, EXIT_SIZE, unit="MB"))
    return checks


def _memory_checks(measurements: Measurements, budgets: Budgets) -> list[Check]:
    memory = measurements.memory
    absent = measurements.memory_absent or "no reason is recorded"
    checks = []
    if (allowed := budgets.peak_memory_ratio_max) is not None:
        if memory is None or not memory.baseline_peak_rss_mb:
            checks.append(unmeasured("peak_memory_ratio_max", allowed, absent if memory is None else NO_BASELINE))
        else:
            ratio = memory.peak_rss_mb / memory.baseline_peak_rss_mb
            checks.append(bound("peak_memory_ratio_max", ratio, allowed, EXIT_MEMORY))
    peak, cold, first = (
        (None, None, None) if memory is None else (memory.peak_rss_mb, memory.cold_load_ms, memory.first_run_ms)
    )
    wanted: list[tuple[str, float | None, float, str, int]] = []
    if budgets.peak_memory_max is not None:
        wanted.append(("peak_memory_max", peak, count_bytes(budgets.peak_memory_max) / 1e6, "MB", EXIT_MEMORY))
    if budgets.cold_load_max is not None:
        wanted.append(("cold_load_max", cold, milliseconds(budgets.cold_load_max), "ms", EXIT_LATENCY))
    if budgets.first_run_max is not None:
        wanted.append(("first_run_max", first, milliseconds(budgets.first_run_max), "ms", EXIT_LATENCY))
    for metric, measured, most, unit, code in wanted:
        if measured is None:
            why = absent if memory is None else "the file could not be put out of the system's memory first"
            checks.append(unmeasured(metric, most, why, unit=unit))
        else:
            checks.append(bound(metric, measured, most, code, unit=unit))
    return checks
