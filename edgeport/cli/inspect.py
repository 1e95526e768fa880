"""`edgeport inspect BUNDLE`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgeport.cli.options import AsJson, Debug, Verbose

if TYPE_CHECKING:
    from rich.console import Console

    from edgeport.bundle.manifest import TensorEntry
    from edgeport.bundle.read import Bundle


def inspect(
    bundle: Annotated[
        Path, typer.Argument(metavar="BUNDLE", help="A folder that `edgeport export` wrote.", show_default=False)
    ],
    as_json: AsJson = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Show what a bundle holds and where it came from, after checking every file's hash. Nothing is run.

    \b
    Examples:
      edgeport inspect out/minilm
      edgeport inspect out/minilm --json
    """
    from edgeport.bundle.read import read_bundle, verify_files
    from edgeport.cli.console import answer

    found = read_bundle(bundle)
    verify_files(found)
    document = {
        "bundle": str(bundle),
        "files_verified": len(found.manifest.files),
        "manifest": found.manifest.model_dump(mode="json"),
        "evidence": None if found.evidence is None else found.evidence.model_dump(mode="json"),
    }
    answer(document, as_json, lambda console: _draw(console, found))


def _tensor(entry: TensorEntry) -> str:
    sizes = [
        str(size) if isinstance(size, int) else f"{size.name} {size.minimum}..{size.maximum}" for size in entry.shape
    ]
    return f"{entry.name} {entry.dtype} [{', '.join(sizes)}]"


def _draw(console: Console, bundle: Bundle) -> None:
    from rich.markup import escape

    from edgeport.cli.summary import draw_evidence, in_bytes
    from edgeport.cli.tables import facts

    manifest = bundle.manifest
    layers = Counter(layer.format for layer in manifest.layers)
    total = sum(entry.bytes for entry in manifest.files.values())
    rows = [
        ("name", f"{manifest.name} ({manifest.task}, {manifest.parameters / 1e6:.1f} M parameters)"),
        ("source", f"{manifest.source.reference}, licence {manifest.source.licence or 'unknown'}"),
        *([("", manifest.source.note)] if manifest.source.note else []),
        ("target", f"{manifest.target.name}: {manifest.target.title}"),
        ("recipe", f"{manifest.recipe.name}: {manifest.recipe.summary}"),
        ("weights", ", ".join(f"{count} {name}" for name, count in sorted(layers.items())) or "none compressible"),
        ("load", manifest.entry),
        *(("input", _tensor(entry)) for entry in manifest.inputs),
        *(("output", _tensor(entry)) for entry in manifest.outputs),
        ("files", f"{len(manifest.files)}, {in_bytes(total)}, every sha256 as the manifest says"),
    ]
    console.print(facts(rows))
    if bundle.evidence is None:
        console.print("This bundle carries no evidence.json.")
        return
    evidence = bundle.evidence.model_dump(mode="json")
    console.print(f"\nMeasured {escape(str(evidence['measured_at']))} on {escape(evidence['machine']['cpu'])}:")
    draw_evidence(console, evidence, [])
