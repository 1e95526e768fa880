"""Read a bundle, and find out whether it is still what was written."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path

from edgeport.bundle.golden import Golden, load_golden
from edgeport.bundle.manifest import GOLDEN_FOLDER, SCHEMA_VERSION, FileEntry, Manifest
from edgeport.bundle.write import EVIDENCE, EXPLANATION, MANIFEST, REPORT, report_text
from edgeport.errors import BadInputError
from edgeport.export.artifact import Artifact
from edgeport.schema import parse_mapping
from edgeport.storage import hash_bytes, hash_file, read_json
from edgeport.validate.evidence import Evidence

MADE_AGAIN = "Get the bundle again from where it came from, or make it again with `edgeport export`."


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk.

    Attributes:
        root: its folder.
        evidence: None where evidence.json was left out.
        artifact: the lowered model, ready for `edgeport.runtime.session.open_session`.
    """

    root: Path
    manifest: Manifest
    evidence: Evidence | None
    artifact: Artifact

    def golden(self) -> Golden:
        """The golden vectors."""
        return load_golden(self.root / GOLDEN_FOLDER)


def read_bundle(path: Path) -> Bundle:
    """Read the manifest and the evidence of a bundle; `verify_files` checks the rest.

    Raises:
        BadInputError: the folder is no bundle, is of another schema version, or a field is wrong.
    """
    if not (path / MANIFEST).is_file():
        raise BadInputError(
            f"The folder is no bundle: it has no {MANIFEST}." if path.is_dir() else "There is no such folder.",
            where=path,
            next_step="Give the folder that `edgeport export` wrote.",
        )
    value = read_json(path / MANIFEST)
    version = value.get("schema_version")
    if version != SCHEMA_VERSION:
        raise BadInputError(
            f"The manifest has schema version {version!r}; this edgeport reads version {SCHEMA_VERSION}.",
            where=path / MANIFEST,
            allowed=[SCHEMA_VERSION],
            next_step="Install the edgeport that made the bundle, or a newer one.",
        )
    manifest = parse_mapping(Manifest, value, path / MANIFEST)
    evidence = None
    if (path / EVIDENCE).is_file():
        evidence = parse_mapping(Evidence, read_json(path / EVIDENCE), path / EVIDENCE)
    return Bundle(root=path, manifest=manifest, evidence=evidence, artifact=manifest.artifact(path))


def _walk(root: Path) -> list[str]:
    """POSIX relative paths of all files below a folder, sorted.

    Raises:
        BadInputError: something is neither a regular file nor a folder; a link could lead out of the bundle.
    """
    found = []
    for folder, folders, names in os.walk(root):
        for name in (*folders, *names):
            path = Path(folder, name)
            mode = path.lstat().st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise _tampered("The bundle holds something that is neither a file nor a folder.", path)
            if stat.S_ISREG(mode):
                found.append(path.relative_to(root).as_posix())
    return sorted(found)


def _tampered(what: str, where: Path, next_step: str = MADE_AGAIN) -> BadInputError:
    return BadInputError(f"The bundle was tampered with or damaged. {what}", where=where, next_step=next_step)


def _verify_file(root: Path, name: str, expected: FileEntry) -> None:
    path = root / name
    size = path.stat().st_size
    if size != expected.bytes:
        raise _tampered(f"{name} has {size:,} bytes; the manifest says {expected.bytes:,}.", path)
    got = hash_file(path)
    if got != expected.sha256:
        raise _tampered(f"{name} has sha256 {got}; the manifest says {expected.sha256}.", path)


def _verify_texts(bundle: Bundle, report: bool) -> None:
    """Check that evidence and, where asked for, report belong to this manifest."""
    root = bundle.root
    if bundle.evidence is not None:
        got = hash_file(root / MANIFEST)
        if got != bundle.evidence.manifest_sha256:
            said = bundle.evidence.manifest_sha256
            raise _tampered(f"{MANIFEST} has sha256 {got}; {EVIDENCE} was measured for {said}.", root / MANIFEST)
    if report and (root / REPORT).is_file():
        _verify_report(bundle, root / REPORT)


def _verify_report(bundle: Bundle, report: Path) -> None:
    """Check that a report is the manifest's shell with the texts of evidence.json and, if any, explain.json in it."""
    root = bundle.root
    drawn = f"If nothing else of the bundle was changed, draw the page again: edgeport report {root}"
    html = report.read_bytes()
    measured = b"" if bundle.evidence is None else report_text((root / EVIDENCE).read_text()).encode()
    if measured and html.count(measured) != 1:
        raise _tampered(f"{REPORT} does not hold the very text of {EVIDENCE}.", report, drawn)
    html = html.replace(measured, b"") if measured else html
    if (root / EXPLANATION).is_file():
        # As it stands in the page, where a "<" could end the block.
        explained = (root / EXPLANATION).read_bytes().replace(b"<", b"\\u003c")
        html = html.replace(explained, b"", 1) if explained else html
    got = hash_bytes(html)
    if got != bundle.manifest.report_shell_sha256:
        said = bundle.manifest.report_shell_sha256
        raise _tampered(f"{REPORT} without its evidence has sha256 {got}; the manifest says {said}.", report, drawn)


def verify_files(bundle: Bundle, *, report: bool = True) -> None:
    """Check every file of the bundle against the manifest, the evidence and the report against each other.

    This finds damage and careless edits. It is no signature: who rewrites the whole chain of hashes is not found.

    Args:
        report: also that report.html is what manifest, evidence and explanation make; not when it is to be made again.

    Raises:
        BadInputError: a file is missing, changed, or not in the manifest; naming it, the expected and the found.
    """
    files = bundle.manifest.files
    found = set(_walk(bundle.root))
    for name in sorted(files):
        if name not in found:
            raise _tampered(f"{name} is missing.", bundle.root / name)
    for name in sorted(found):
        if name not in files and name not in (MANIFEST, EVIDENCE, REPORT, EXPLANATION):
            raise _tampered(f"{name} is not in the manifest.", bundle.root / name)
    for name, expected in sorted(files.items()):
        _verify_file(bundle.root, name, expected)
    _verify_texts(bundle, report)
