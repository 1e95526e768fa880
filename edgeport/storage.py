"""Files that are never half-written: canonical JSON, hashes, atomic writes, the cache folder."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edgeport.errors import BadInputError

CHUNK = 1 << 20


def cache_root() -> Path:
    """`$EDGEPORT_CACHE`, or `edgeport` in the user's cache folder (`$XDG_CACHE_HOME`, `~/.cache`)."""
    chosen = os.environ.get("EDGEPORT_CACHE")
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "edgeport"


def canonical_json(value: Any) -> str:
    """JSON text that is the same for equal values: sorted keys, two-space indent, a final newline."""
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def hash_value(value: Any) -> str:
    """sha256 of a JSON-able value, in hex."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def hash_bytes(data: bytes) -> str:
    """sha256 of bytes, in hex."""
    return hashlib.sha256(data).hexdigest()


def hash_file(path: Path) -> str:
    """sha256 of one file's content, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def list_files(path: Path) -> list[Path]:
    """Every regular file below a folder (or the file itself), sorted by POSIX relative path."""
    if path.is_file():
        return [path]
    return sorted((p for p in path.rglob("*") if p.is_file()), key=lambda p: p.relative_to(path).as_posix())


def hash_tree(path: Path) -> dict[str, str]:
    """`{relative POSIX path: sha256}` of every file below a folder, or `{name: sha256}` of one file."""
    if path.is_file():
        return {path.name: hash_file(path)}
    return {p.relative_to(path).as_posix(): hash_file(p) for p in list_files(path)}


def tree_size(path: Path) -> int:
    """Bytes of every file below a folder, or of one file."""
    return sum(p.stat().st_size for p in list_files(path))


def write_text(path: Path, text: str) -> None:
    """Write a text file under a temporary name beside its place, then rename it."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file under a temporary name beside its place, then rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


NEW = ".new.edgeport"
OLD = ".old.edgeport"
"""Endings of the folders that `new_folder` works in; a leading dot hides them."""


def _is_abandoned(folder: Path) -> bool:
    """No process works in the folder: whoever does holds a lock on it, which the kernel drops when it dies."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(handle)
    return True


def clean_up_after_killed_runs(path: Path) -> None:
    """Remove what killed runs left beside `path`, and put back an older `path` that one had just moved away."""
    for old in path.parent.glob(f".{path.name}.*{OLD}"):
        if not _is_abandoned(old):
            continue
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.rename(old, path)
    for new in path.parent.glob(f".*{NEW}"):
        if _is_abandoned(new):
            shutil.rmtree(new, ignore_errors=True)


@contextmanager
def new_folder(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """A temporary folder beside `path` that becomes `path` when the block ends without an error.

    Args:
        path: the folder to make.
        replace: take the place of an existing folder (the old one goes only after the new is whole).

    Raises:
        BadInputError: the parent can't be written, or `path` exists and is not to be replaced.
    """
    path = path.absolute()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        clean_up_after_killed_runs(path)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=NEW, dir=path.parent))
    except OSError as error:
        raise BadInputError(
            f"The folder can't be written: {error.strerror}.",
            where=path.parent,
            next_step="Choose another output folder, or change its permissions.",
        ) from error
    lock = os.open(temporary, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.chmod(temporary, 0o755)
        yield temporary
        if replace and path.exists():
            old = temporary.with_name(temporary.name.removesuffix(NEW) + OLD)
            os.rename(path, old)
            os.rename(temporary, path)
            shutil.rmtree(old, ignore_errors=True)
        else:
            try:
                os.rename(temporary, path)
            except OSError as error:
                raise BadInputError("The folder exists already.", where=path) from error
    finally:
        os.close(lock)
        if temporary.exists():
            shutil.rmtree(temporary, ignore_errors=True)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        BadInputError: the file is missing, not JSON, or not an object.
    """
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise BadInputError("A file is missing.", where=path) from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BadInputError(f"The file can't be read as JSON: {error}.", where=path) from error
    if not isinstance(value, Mapping):
        raise BadInputError("The file holds no JSON object.", where=path)
    return dict(value)
