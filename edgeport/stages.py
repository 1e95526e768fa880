"""The stage store: every stage's output under the hash of its inputs, so that a killed run resumes.

An entry is a folder that appears whole or not at all. It records the sha256 of its files, which are
checked on every use: a damaged entry is reported and made again.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from edgeport.errors import BadInputError
from edgeport.resources import PACKAGE
from edgeport.storage import cache_root, canonical_json, hash_file, hash_tree, hash_value, new_folder, read_json

TOOLCHAIN = (
    "torch",
    "transformers",
    "optimum",
    "onnx",
    "onnx-ir",
    "onnxscript",
    "onnxruntime",
    "executorch",
    "torchao",
    "coremltools",
    "numpy",
    "safetensors",
    "gguf",
    "tokenizers",
)


@functools.cache
def toolchain_versions() -> dict[str, str]:
    """Installed versions of the packages that decide what the files contain, and edgeport's own."""
    versions = {}
    for package in ("edgeport", *TOOLCHAIN):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


@functools.cache
def code_hash() -> str:
    """One hash of edgeport's own source: changed code must not be answered from an older run's cache."""
    return hash_value({p.relative_to(PACKAGE).as_posix(): hash_file(p) for p in sorted(PACKAGE.rglob("*.py"))})


def stage_key(stage: str, inputs: dict[str, Any]) -> str:
    """The hash of a stage's name, its inputs, the toolchain and edgeport's own code."""
    return hash_value({"stage": stage, "inputs": inputs, "versions": toolchain_versions(), "code": code_hash()})


def _folder(stage: str, key: str) -> Path:
    return cache_root() / "stages" / stage / key


def is_stored(stage: str, key: str) -> bool:
    """The store has an entry (not yet checked)."""
    return (_folder(stage, key) / "stage.json").is_file()


def stored(stage: str, key: str) -> Path:
    """The folder with a stage's output, which `run_stage` has made."""
    return _folder(stage, key) / "output"


def _is_whole(folder: Path) -> bool:
    try:
        recorded = read_json(folder / "stage.json").get("files")
    except BadInputError:
        return False
    return recorded == hash_tree(folder / "output")


def run_stage(
    stage: str, key: str, make: Callable[[Path], None], *, report: Callable[[str], None] = lambda _: None
) -> Path:
    """The folder with a stage's output, from the store or newly made.

    Args:
        make: writes the output into the empty folder it is given.
        report: is told, in one line, of a damaged entry that is made again.
    """
    folder = _folder(stage, key)
    if folder.exists():
        if _is_whole(folder):
            return folder / "output"
        report(f"The cache entry {stage}/{key[:12]} is damaged: its files don't match their sha256. It is made again.")
        shutil.rmtree(folder)
    try:
        with new_folder(folder) as temporary:
            output = temporary / "output"
            output.mkdir()
            make(output)
            (temporary / "stage.json").write_text(canonical_json({"stage": stage, "files": hash_tree(output)}))
    except BadInputError:
        # Another process may have finished the same stage first: its output is as good as ours.
        if not (folder.exists() and _is_whole(folder)):
            raise
    return folder / "output"
