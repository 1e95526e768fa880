"""Judge a bundle by the evidence it carries, with other budgets, or against an older bundle. Nothing is run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from edgeport.errors import BadInputError, MeasurementError

if TYPE_CHECKING:
    from edgeport.bundle.read import Bundle
    from edgeport.validate.evidence import Evidence, Verdict


def gate_bundle(
    bundle: Path,
    *,
    budgets: Path | None = None,
    against: Path | None = None,
    measured: Path | None = None,
    report: bool = True,
) -> Verdict:
    """The gate's verdict on a bundle.

    Args:
        budgets: a file that takes the place of the recipe's `[gate]`.
        against: an older bundle of the same task.
        measured: what `edgeport validate --json` printed of this bundle; it takes the place of the bundle's evidence.
        report: check the bundle's report.html too.

    Raises:
        BadInputError: a folder is no bundle, a file of it is missing, changed or added, the two bundles have
            different tasks, or a budget is wrong.
        MeasurementError: a bundle carries no evidence (exit 15).
    """
    from edgeport.budgets import load_budgets
    from edgeport.bundle.read import read_bundle, verify_files
    from edgeport.gate import judge

    wanted = None if budgets is None else load_budgets(budgets)
    found = read_bundle(bundle)
    verify_files(found, report=report)
    older = None
    if against is not None:
        old = read_bundle(against)
        verify_files(old)
        if old.manifest.task != found.manifest.task:
            raise BadInputError(
                f"The bundles have different tasks: {found.manifest.task} and {old.manifest.task}.", where=against
            )
        older = evidence_of(old)
    evidence = evidence_of(found) if measured is None else read_evidence(measured, found)
    return judge(evidence, wanted or found.manifest.recipe.gate, against=older)


def read_evidence(path: Path, bundle: Bundle) -> Evidence:
    """Evidence that was measured of a bundle elsewhere or later.

    Raises:
        BadInputError: it can't be read, is no evidence, or was measured of another bundle.
    """
    from edgeport.bundle.write import MANIFEST
    from edgeport.schema import parse_mapping
    from edgeport.storage import hash_file, read_json
    from edgeport.validate.evidence import Evidence

    document = read_json(path)
    evidence = parse_mapping(Evidence, document.get("evidence", document), path)
    expected = hash_file(bundle.root / MANIFEST)
    if evidence.manifest_sha256 != expected:
        raise BadInputError(
            f"The evidence was measured of another bundle: of the manifest {evidence.manifest_sha256}.",
            where=path,
            allowed=expected,
            next_step=f"Measure this one: edgeport validate {bundle.root} --json",
        )
    return evidence


def evidence_of(bundle: Bundle) -> Evidence:
    """The evidence that a bundle carries.

    Raises:
        MeasurementError: it carries none (exit 15).
    """
    if bundle.evidence is None:
        raise MeasurementError(
            "The bundle carries no evidence, so there is nothing to judge.",
            where=bundle.root / "evidence.json",
            next_step="Make the bundle again with `edgeport export`.",
        )
    return bundle.evidence
