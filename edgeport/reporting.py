"""Pages about bundles on disk: the report of one, made again or beside an older one, and several on one page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgeport.errors import BadInputError

if TYPE_CHECKING:
    from edgeport.bundle.read import Bundle
    from edgeport.explain.document import Explanation
    from edgeport.report.comparison import Comparison
    from edgeport.report.deltas import Delta
    from edgeport.validate.evidence import Evidence

ELSEWHERE = "Write it elsewhere: -o report.html."


@dataclass(frozen=True)
class Pages:
    """What can be written about one bundle.

    Attributes:
        html: self-contained page; markdown: the same for a pull request.
        evidence: what both show, with the verdict of the budgets asked for.
        own: nothing but the bundle's own files went in, so that the page may stand in the bundle.
    """

    html: str
    markdown: str
    evidence: Evidence
    own: bool


def make_report(
    bundle: Path, *, budgets: Path | None = None, against: Path | None = None, measured: Path | None = None
) -> Pages:
    """The report of a bundle from what it carries. Nothing is run.

    Args:
        budgets, against, measured: as `edgeport.gating.gate_bundle` takes them.

    Raises:
        BadInputError: a folder is no bundle, a file of it is missing, changed or added, or a budget is wrong.
        MeasurementError: a bundle carries no evidence.
    """
    from edgeport.bundle.read import read_bundle
    from edgeport.bundle.write import evidence_text, report_text
    from edgeport.gating import evidence_of, gate_bundle, read_evidence
    from edgeport.report.deltas import deltas
    from edgeport.report.markdown import report_markdown

    verdict = gate_bundle(bundle, budgets=budgets, against=against, measured=measured, report=False)
    found = read_bundle(bundle)
    evidence = evidence_of(found) if measured is None else read_evidence(measured, found)
    own = budgets is None and against is None and measured is None
    changes: tuple[Delta, ...] = ()
    if against is not None:
        changes = deltas(evidence, evidence_of(read_bundle(against)))
    if not own:
        evidence = evidence.model_copy(update={"verdict": verdict})
    name = None if against is None else against.name
    manifest = found.manifest.to_json()
    page = report_page(found, report_text(evidence_text(evidence)), changes=changes, against=name)
    explanation = _explanation(bundle)[1]
    text = report_markdown(bundle.name, manifest, evidence, explanation=explanation, changes=changes, against=name)
    return Pages(page, text, evidence, own=own)


def report_page(found: Bundle, evidence: str, *, changes: Sequence[Delta] = (), against: str | None = None) -> str:
    """The HTML of a bundle's report with this text of evidence, and with its explain.json where there is one."""
    from edgeport.report.render import embedded, render_report
    from edgeport.storage import canonical_json

    beside = {"name": against, "deltas": [asdict(change) for change in changes]}
    return render_report(
        found.manifest.to_json(),
        evidence,
        explanation=embedded(_explanation(found.root)[0]),
        against=embedded(canonical_json(beside)) if against is not None else "",
    )


def _explanation(root: Path) -> tuple[str, Explanation | None]:
    """A bundle's explain.json, as text and read; "" and None where there is none.

    Raises:
        BadInputError: it explains another bundle, or is none.
    """
    from edgeport.bundle.write import EXPLANATION, MANIFEST
    from edgeport.explain.document import Explanation
    from edgeport.schema import parse_mapping
    from edgeport.storage import hash_file, read_json

    path = root / EXPLANATION
    if not path.is_file():
        return "", None
    explanation = parse_mapping(Explanation, read_json(path), path)
    if explanation.manifest_sha256 != hash_file(root / MANIFEST):
        raise BadInputError(
            "The explanation is of another bundle.", where=path, next_step=f"Make it again: edgeport explain {root}"
        )
    return path.read_text(), explanation


def page_of(bundle: Path, evidence: Evidence) -> str:
    """The HTML of a bundle's report with evidence that was just measured."""
    from edgeport.bundle.read import read_bundle
    from edgeport.bundle.write import evidence_text, report_text

    return report_page(read_bundle(bundle), report_text(evidence_text(evidence)))


def remake_report(bundle: Path) -> Path:
    """Write a bundle's report.html again, with the explain.json that lies beside it.

    Raises:
        BadInputError: the bundle was made by another edgeport, to whose page the manifest is bound.
        MeasurementError: it carries no evidence.
    """
    from edgeport.bundle.read import read_bundle
    from edgeport.bundle.write import EVIDENCE, REPORT, report_text
    from edgeport.gating import evidence_of
    from edgeport.report.render import strip_evidence
    from edgeport.storage import hash_bytes, write_text

    found = read_bundle(bundle)
    evidence_of(found)
    page = report_page(found, report_text((bundle / EVIDENCE).read_text()))
    if hash_bytes(strip_evidence(page).encode()) != found.manifest.report_shell_sha256:
        raise BadInputError(
            "Another version of edgeport made this bundle: its manifest is bound to the page of that version.",
            where=bundle / REPORT,
            next_step=ELSEWHERE,
        )
    write_text(bundle / REPORT, page)
    return bundle / REPORT


def compare_bundles(bundles: Sequence[Path], *, by: str | None = None, different_models: bool = False) -> Comparison:
    """Several bundles by the evidence that they carry. Nothing is run.

    Args:
        by, different_models: as `edgeport.report.compare.compare` takes them.

    Raises:
        BadInputError: a folder is no bundle or was changed, one is named twice, they were made of different models, or
            none was measured by `by`.
        MeasurementError: a bundle carries no evidence.
    """
    from edgeport.bundle.read import read_bundle, verify_files
    from edgeport.gating import evidence_of
    from edgeport.report.compare import compare, unique_labels
    from edgeport.report.comparison import Candidate

    labels = unique_labels([path.resolve().parts for path in bundles])
    candidates = []
    for label, path in zip(labels, bundles, strict=True):
        found = read_bundle(path)
        verify_files(found)
        candidates.append(Candidate(label, found.manifest.to_json(), evidence_of(found)))
    return compare(candidates, by=by, different_models=different_models)
