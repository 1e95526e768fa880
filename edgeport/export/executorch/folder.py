"""A folder as one run of bytes, as ExecuTorch's Core ML delegate carries a model package.

The contents of the files come first, one after another; then follows a JSON object, written backwards,
with a node for each file and folder: name, kind (0 file, 1 folder), region of the data, and for folders
the indexes of their children by name. The last node is the root. Source: executorch,
backends/apple/coreml/runtime/inmemoryfs (`inmemory_filesystem.cpp`); its own writer takes files in the
order in which the file system lists them, this one in the order of their names.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from edgeport.errors import BadInputError

FILE, FOLDER = 0, 1


def flatten_folder(folder: Path) -> bytes:
    """Every file below a folder in one run of bytes. Equal content gives equal bytes."""
    data: list[bytes] = []
    nodes: list[dict[str, Any]] = []
    size = 0

    def add(path: Path) -> int:
        nonlocal size
        node: dict[str, Any] = {
            "children": {},
            "dataRegion": {"offset": 0, "size": 0},
            "kind": FOLDER,
            "name": path.name,
        }
        if path.is_dir():
            node["children"] = {child.name: add(child) for child in sorted(path.iterdir(), key=lambda p: p.name)}
        else:
            content = path.read_bytes()
            node["kind"], node["dataRegion"] = FILE, {"offset": size, "size": len(content)}
            data.append(content)
            size += len(content)
        nodes.append(node)
        return len(nodes) - 1

    add(folder)
    tree = json.dumps({"nodes": nodes}, sort_keys=True, separators=(",", ":"))
    return b"".join([*data, tree.encode()[::-1]])


def _read_tree(data: bytes) -> list[dict[str, Any]]:
    """The nodes of a flattened folder."""
    # The object ends where its brackets close; what the file's own contents look like before it does not matter.
    limit = 1 << 16
    while True:
        text = data[-limit:][::-1].decode(errors="replace")
        try:
            nodes = json.JSONDecoder().raw_decode(text)[0]["nodes"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            if limit >= len(data):
                raise BadInputError("The program holds no Core ML package, or a damaged one.") from error
            limit *= 2
            continue
        return list(nodes)


def file_regions(data: bytes) -> dict[str, tuple[int, int]]:
    """(first byte, size) of each file of a flattened folder, by POSIX path below it.

    Raises:
        BadInputError: the bytes are no flattened folder.
    """
    nodes = _read_tree(data)
    found: dict[str, tuple[int, int]] = {}

    def walk(index: int, path: str, depth: int) -> None:
        node = nodes[index]
        if node["kind"] == FILE:
            found[path] = int(node["dataRegion"]["offset"]), int(node["dataRegion"]["size"])
            return
        for name, child in node["children"].items():
            if not 0 <= child < index or depth > 32:
                raise BadInputError("The program's Core ML package is damaged.", where=name)
            walk(child, f"{path}/{name}" if path else name, depth + 1)

    try:
        walk(len(nodes) - 1, "", 0)
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise BadInputError("The program's Core ML package is damaged.") from error
    return found


def unflatten_folder(data: bytes, folder: Path) -> None:
    """Write the files of a flattened folder below an existing folder.

    Raises:
        BadInputError: the bytes are no flattened folder, or a name in it leads elsewhere.
    """
    nodes = _read_tree(data)

    def write(index: int, path: Path, depth: int) -> None:
        node = nodes[index]
        if node["kind"] == FILE:
            start, size = node["dataRegion"]["offset"], node["dataRegion"]["size"]
            if not 0 <= start <= start + size <= len(data):
                raise BadInputError("The Core ML package in the program is cut off.", where=path.name)
            path.write_bytes(data[start : start + size])
            return
        path.mkdir(exist_ok=True)
        for name, child in node["children"].items():
            # An index below its parent's rules out cycles.
            if name in ("", ".", "..") or "/" in name or "\0" in name or not 0 <= child < index or depth > 32:
                raise BadInputError("A name in the program's Core ML package leads outside of it.", where=name)
            write(child, path / name, depth + 1)

    try:
        write(len(nodes) - 1, folder, 0)
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise BadInputError("The program's Core ML package is damaged.") from error
