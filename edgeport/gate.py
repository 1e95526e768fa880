"""The gate: measurements and a recipe's budgets in, a verdict out. It fails closed.

What was not measured, or not measured validly, does not pass. Three checks need no budget: every output
is finite, no output is stuck, and the integer weights in the file are the logical ones, bit for bit.
"""

from __future__ import annotations

import math

from edgeport.errors import EXIT_LATENCY, EXIT_MEMORY, EXIT_NOT_VALID, EXIT_OK, EXIT_PARITY, EXIT_SIZE
from edgeport.recipe import Budgets
from edgeport.validate.evidence import Check, Evidence, Measurements, OutputParity, Verdict
from edgeport.validate.generation import LEAST_COSINE

ADVICE = {
    "finite": "Export with precision fp32, or look for a layer that overflows float16.",
    "varies": "Look at the exported graph: an input may be unused, or weights may be zero.",
    "weights_equal": "Report this as a bug of edgeport: the exporter did not write the weights it was given.",
    "long_cache": "Report this as a bug of edgeport: the cache goes wrong as it grows.",
    "tokenizer": "Do not ship it: the device would read other tokens. Look for what the checkpoint's tokenizer.json "
    "holds that the device's implementation does not know.",
    "cosine_min": "Keep the layers with the largest relative error in float (`exclude` in the recipe), or use int8.",
    "relative_l2_max": "Keep the layers with the largest relative error in float (`exclude` in the recipe).",
    "top1_agreement_min": "Keep the last layer in float (`exclude` in the recipe), or use int8 instead of int4.",
    "kl_max": "Keep the last layer in float (`exclude` in the recipe), or use int8 instead of int4.",
    "size_ratio_max": "Compress the largest layer group of the size waterfall, or use a smaller format.",
    "latency_ratio_max": "Use dynamic int8 activations where the target takes them.",
    "peak_memory_ratio_max": "Use fixed shapes or a shorter sequence, or keep weights quantized at run time.",
}
MEASURE_ADVICE = "Measure again on a quiet machine, without --quick."
ABSENT_ADVICE = "Take the budget out of the recipe for this target, or measure it on a device."
LOGITS = "logits"
PARITY_BUDGETS = ("cosine_min", "relative_l2_max", "top1_agreement_min", "kl_max")


def judge(measurements: Measurements, budgets: Budgets) -> Verdict:
    """Hold the measurements against the budgets.

    Returns:
        One check for each budget that is set, parity for each output of the model; the exit code is the lowest
        of the failed checks' (10 parity, 12 latency, 13 size, 14 memory, 15 not measured validly), or 0.
    """
    checks = (
        *_parity_checks(measurements, budgets),
        _weight_check(measurements),
        *_tokenizer_checks(measurements),
        *_generation_checks(measurements),
        *_latency_checks(measurements, budgets),
        *_size_checks(measurements, budgets),
        *_memory_checks(measurements, budgets),
    )
    exit_code = min((check.exit_code for check in checks if not check.passed), default=EXIT_OK)
    return Verdict(passed=exit_code == EXIT_OK, exit_code=exit_code, checks=checks)


def conclude(measurements: Measurements, budgets: Budgets) -> Evidence:
    """The measurements with the gate's verdict, and with `numerics_verified` said."""
    verdict = judge(measurements, budgets)
    compared = bool(measurements.parity)
    passed = all(check.passed for check in verdict.checks if check.metric in ("finite", "varies", *PARITY_BUDGETS))
    verified = "no" if not compared else "yes" if passed else "failed"
    states = measurements.states.model_copy(update={"numerics_verified": verified})
    return Evidence(**{**dict(measurements), "states": states}, verdict=verdict)


def _bound(
    metric: str, measured: float | None, allowed: float, exit_code: int, *, output: str | None = None, why: str = ""
) -> Check:
    """One number against its budget; the metric's name says the direction (`..._min`, `..._max`)."""
    what = metric if output is None else f"{metric} of {output}"
    if measured is None or not math.isfinite(measured):
        return Check(
            metric=metric,
            output=output,
            measured=None,
            allowed=allowed,
            passed=False,
            exit_code=exit_code,
            message=f"{what} could not be measured: {why}",
            advice=ADVICE[metric],
        )
    least = metric.endswith("_min")
    passed = measured >= allowed if least else measured <= allowed
    return Check(
        metric=metric,
        output=output,
        measured=measured,
        allowed=allowed,
        passed=passed,
        exit_code=exit_code,
        message=f"{what} is {measured:.4g}; at {'least' if least else 'most'} {allowed:.4g} is allowed",
        advice=ADVICE[metric],
    )


def _flag(metric: str, output: str | None, fine: bool, message: str) -> Check:
    """A yes-or-no check that always applies: 1 is measured when all is well, and 1 is demanded."""
    return Check(
        metric=metric,
        output=output,
        measured=float(fine),
        allowed=1.0,
        passed=fine,
        exit_code=EXIT_PARITY,
        message=message,
        advice=ADVICE[metric],
    )


def _unmeasured(metric: str, allowed: float, why: str, advice: str = ABSENT_ADVICE) -> Check:
    return Check(
        metric=metric,
        measured=None,
        allowed=allowed,
        passed=False,
        exit_code=EXIT_NOT_VALID,
        message=f"{metric} was not measured: {why}",
        advice=advice,
    )


def _parity_checks(measurements: Measurements, budgets: Budgets) -> list[Check]:
    wanted = {name: getattr(budgets, name) for name in PARITY_BUDGETS if getattr(budgets, name) is not None}
    if not measurements.parity:
        why = "the artifact's outputs were not compared with the original's"
        return [_unmeasured("finite", 1.0, why), *(_unmeasured(name, value, why) for name, value in wanted.items())]
    checks = []
    for parity in measurements.parity:
        name = parity.output
        finite = "every value is finite" if parity.finite else "the artifact gives NaN or infinite values"
        varies = "it follows the inputs" if parity.varies else "the artifact gives the same output whatever comes in"
        checks.append(_flag("finite", name, parity.finite, f"{name}: {finite}"))
        if parity.finite:
            checks.append(_flag("varies", name, parity.varies, f"{name}: {varies}"))
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
    return _bound(metric, measured, allowed, EXIT_PARITY, output=parity.output, why=why)


def _weight_check(measurements: Measurements) -> Check:
    found = measurements.weights
    if found is None:
        return _unmeasured("weights_equal", 1.0, "the weights in the file were not read", ADVICE["weights_equal"])
    equal = not found.different and found.equal == found.checked
    message = f"{found.equal} of {found.checked} compressed weights in the file equal the logical ones, bit for bit"
    if found.different:
        message += f"; {found.different[0]}"
    return _flag("weights_equal", None, equal, message)


def _tokenizer_checks(measurements: Measurements) -> list[Check]:
    """The device's tokenizer must agree; the others are told, not judged."""
    checks = []
    for found in measurements.tokenizers:
        if not found.device:
            continue
        if found.absent is not None:
            advice = "Install it: `pip install edgeport[all]`."
            checks.append(_unmeasured("tokenizer", 1.0, f"{found.implementation}: {found.absent}", advice))
            continue
        told = f"{found.implementation} {found.version} splits {found.texts} texts as the original does"
        if found.failed is not None:
            told = f"{found.implementation} {found.version}: {found.failed}"
        elif found.different:
            told = f"{found.implementation} {found.version} splits {found.different} of {found.texts} texts otherwise: "
            told += "; ".join(found.examples)
        checks.append(_flag("tokenizer", None, found.failed is None and not found.different, told))
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
    return [_flag("long_cache", LOGITS, fine, message)]


def _latency_checks(measurements: Measurements, budgets: Budgets) -> list[Check]:
    allowed = budgets.latency_ratio_max
    if allowed is None:
        return []
    latency = measurements.latency
    if latency is None:
        return [_unmeasured("latency_ratio_max", allowed, measurements.latency_absent or "no reason is recorded")]
    if not latency.valid:
        why = f"the run is not valid: {latency.note}"
        return [_unmeasured("latency_ratio_max", allowed, why, MEASURE_ADVICE)]
    return [_bound("latency_ratio_max", latency.ratio.mean, allowed, EXIT_LATENCY)]


def _size_checks(measurements: Measurements, budgets: Budgets) -> list[Check]:
    allowed = budgets.size_ratio_max
    if allowed is None:
        return []
    if measurements.size.ratio is None:
        return [_unmeasured("size_ratio_max", allowed, "there is no fp32 artifact of the same runtime")]
    return [_bound("size_ratio_max", measurements.size.ratio, allowed, EXIT_SIZE)]


def _memory_checks(measurements: Measurements, budgets: Budgets) -> list[Check]:
    allowed = budgets.peak_memory_ratio_max
    if allowed is None:
        return []
    memory = measurements.memory
    if memory is None:
        return [_unmeasured("peak_memory_ratio_max", allowed, measurements.memory_absent or "no reason is recorded")]
    if not memory.baseline_peak_rss_mb:
        return [_unmeasured("peak_memory_ratio_max", allowed, "there is no fp32 artifact of the same runtime")]
    return [_bound("peak_memory_ratio_max", memory.peak_rss_mb / memory.baseline_peak_rss_mb, allowed, EXIT_MEMORY)]
