"""The gate's verdict for machines and reviewers: JUnit XML, a Markdown summary, and the JSON document."""

from __future__ import annotations

import re
from typing import Any
from xml.etree import ElementTree

from edgeport.errors import (
    EXIT_ACCURACY,
    EXIT_LATENCY,
    EXIT_MEMORY,
    EXIT_NOT_VALID,
    EXIT_PARITY,
    EXIT_SIZE,
)
from edgeport.validate.evidence import Check, Verdict

GROUPS = {
    EXIT_PARITY: "parity",
    EXIT_ACCURACY: "accuracy",
    EXIT_LATENCY: "latency",
    EXIT_SIZE: "size",
    EXIT_MEMORY: "memory",
    EXIT_NOT_VALID: "validity",
}
"""What an exit code of the gate is about."""

_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Characters that XML 1.0 can't hold, not even escaped (section 2.2): a suite's name may come from anywhere."""


def number(value: float | None, unit: str = "") -> str:
    """A measured number for people; "—" where it is absent."""
    return "—" if value is None else f"{value + 0.0:.4g} {unit}".rstrip()


def title(check: Check) -> str:
    """What a check is about: its metric, and the output or suite."""
    return check.metric if check.output is None else f"{check.metric} [{check.output}]"


def verdict_document(bundle: str, verdict: Verdict, *, against: str | None = None) -> dict[str, Any]:
    """The verdict as JSON values; each check has its `outcome` in words."""
    checks = [{**check.model_dump(mode="json"), "outcome": check.outcome} for check in verdict.checks]
    return {
        "bundle": bundle,
        "against": against,
        "passed": verdict.passed,
        "exit_code": verdict.exit_code,
        "checks": checks,
        "notes": list(verdict.notes),
    }


def junit(bundle: str, verdict: Verdict) -> str:
    """JUnit XML, one test case a check: `failure` for what was measured and is too bad, `error` for what is not known.

    CI systems show the message of each without further set-up.
    """
    wrong = [check.outcome for check in verdict.checks if not check.passed]
    suite = ElementTree.Element(
        "testsuite",
        name=_text(f"edgeport gate {bundle}"),
        tests=str(len(verdict.checks)),
        failures=str(wrong.count("failed")),
        errors=str(len(wrong) - wrong.count("failed")),
        skipped="0",
    )
    for check in verdict.checks:
        group = GROUPS.get(check.exit_code, "validity")
        case = ElementTree.SubElement(suite, "testcase", classname=f"edgeport.{group}", name=_text(title(check)))
        if check.passed:
            ElementTree.SubElement(case, "system-out").text = _text(check.message)
            continue
        kind = "failure" if check.outcome == "failed" else "error"
        entry = ElementTree.SubElement(case, kind, type=check.outcome, message=_text(check.message))
        entry.text = _text(
            f"{check.message}\nmeasured: {number(check.measured, check.unit)}\n"
            f"allowed: {number(check.allowed, check.unit)}\nexit code: {check.exit_code}\n"
            f"first thing to try: {check.advice}"
        )
    root = ElementTree.Element("testsuites")
    root.append(suite)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def markdown(bundle: str, verdict: Verdict, *, against: str | None = None) -> str:
    """A summary for a pull request: the verdict, what failed and what to try, and a table of all checks."""
    failed = [check for check in verdict.checks if not check.passed]
    count = len(verdict.checks)
    word = "passed" if verdict.passed else f"failed (exit code {verdict.exit_code})"
    lines = [f"## edgeport gate: {word}", "", f"`{bundle}`" + (f" against `{against}`" if against else ""), ""]
    lines += [f"{count - len(failed)} of {count} checks passed.", ""]
    for check in failed:
        lines.append(f"- **{_cell(title(check))}** ({check.outcome}): {_cell(check.message)}. *{_cell(check.advice)}*")
    lines += ["", "| check | measured | interval | allowed | outcome |", "|---|---:|---:|---:|---|"]
    for check in verdict.checks:
        spread = "" if check.low is None or check.high is None else f"{check.low:.4g} to {check.high:.4g}"
        cells = (title(check), number(check.measured, check.unit), spread, number(check.allowed, check.unit))
        lines.append("| " + " | ".join(_cell(cell) for cell in (*cells, check.outcome)) + " |")
    lines += ["", *(f"- not compared: {_cell(note)}" for note in verdict.notes)]
    return "\n".join(lines).rstrip() + "\n"


def _text(value: str) -> str:
    return _NOT_XML.sub("\ufffd", value)


def _cell(value: str) -> str:
    return value.replace("|", "\\|").replace("\n", " ")
