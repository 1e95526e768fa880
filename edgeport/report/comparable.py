"""What of two bundles can be compared, and why the rest can't: a difference of what differs anyway says nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgeport.gate.regression import same_samples
from edgeport.validate.evidence import Latency, Machine, Measurements


def same_model(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Two manifests (as JSON values) name the very same files of an original, and the same task."""
    return bool(one["source"]["files"] == other["source"]["files"] and one["task"] == other["task"])


def same_machine(one: Machine, other: Machine) -> bool:
    """As far as evidence can tell: processor, cores, memory and system are equal."""
    return (one.cpu, one.cores, one.memory_gb, one.platform) == (
        other.cpu,
        other.cores,
        other.memory_gb,
        other.platform,
    )


def why_invalid(measured: Measurements) -> str | None:
    """Why a bundle's latency is no claim; None where it is one."""
    if measured.latency is None:
        return measured.latency_absent or "not measured"
    return None if measured.latency.valid else f"not valid: {measured.latency.note}"


def why_ratios_differ(one: Latency, other: Latency) -> str | None:
    """Why even the ratios to the fp32 file can't be compared; None where they can."""
    if one.threads != other.threads:
        return "other number of threads"
    return None if one.input_shapes == other.input_shapes else "other input shapes"


def why_times_differ(one: Measurements, other: Measurements) -> str | None:
    """Why milliseconds of two bundles can't be compared; None where they can."""
    for measured in (one, other):
        if (why := why_invalid(measured)) is not None:
            return why
    if not same_machine(one.machine, other.machine):
        return "measured on another machine"
    assert one.latency is not None
    assert other.latency is not None
    return why_ratios_differ(one.latency, other.latency)


def why_memory_differs(one: Measurements, other: Measurements) -> str | None:
    """Why peaks of two processes can't be compared; None where they can."""
    for measured in (one, other):
        if measured.memory is None:
            return measured.memory_absent or "not measured"
    return None if same_machine(one.machine, other.machine) else "measured on another machine"


def why_parity_differs(one: Measurements, other: Measurements) -> str | None:
    """Why agreement with the original can't be compared; None where it can."""
    for measured in (one, other):
        if not measured.parity:
            return "not compared with the original"
    return None if same_samples(one.data, other.data) else "compared on other inputs"
