"""Open a .mlpackage: Manifest.json, the model specification, the weight files.

A package is untrusted input: every path in it must stay inside it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from edgeport.errors import BadInputError
from edgeport.mlpackage.blob import BlobFile
from edgeport.mlpackage.proto import message_module
from edgeport.storage import read_json

MODEL_PATH = "@model_path/"


@dataclass(frozen=True)
class Package:
    """An open model package.

    Attributes:
        path: the .mlpackage folder.
        model_file: the specification inside it (.mlmodel).
        spec: the `Model` message.
    """

    path: Path
    model_file: Path
    spec: Any
    _blobs: dict[str, BlobFile] = field(default_factory=dict, repr=False, compare=False)

    @property
    def specification_version(self) -> int:
        """Core ML specification version: 6 is iOS 15, 7 iOS 16, 8 iOS 17, 9 iOS 18."""
        return int(self.spec.specificationVersion)

    def blob_file(self, name: str) -> BlobFile:
        """The weight file that a program calls "@model_path/...", opened once.

        Raises:
            BadInputError: the name leads outside the package, or the file is missing or damaged.
        """
        if name not in self._blobs:
            relative = name.removeprefix(MODEL_PATH)
            self._blobs[name] = BlobFile(_inside(self.model_file.parent, relative, self.path))
        return self._blobs[name]


def load_package(path: Path) -> Package:
    """Open a .mlpackage folder that holds an ML program.

    Raises:
        BadInputError: the folder or a file in it is missing, damaged, leads outside the folder, or holds a model
            that is no ML program (a neural network of the older format, a pipeline).
    """
    if not path.is_dir():
        raise BadInputError("There is no Core ML model package here.", where=path, allowed="a .mlpackage folder")
    manifest = read_json(path / "Manifest.json")
    items = manifest.get("itemInfoEntries")
    root = manifest.get("rootModelIdentifier")
    item = items.get(root) if isinstance(items, dict) and isinstance(root, str) else None
    if not isinstance(item, dict) or not isinstance(item.get("path"), str):
        raise BadInputError("The package's manifest names no model.", where=path / "Manifest.json")
    model_file = _inside(path / "Data", item["path"], path)
    spec = _read_spec(model_file)
    if spec.WhichOneof("Type") != "mlProgram":
        raise BadInputError(
            f"The package holds a {spec.WhichOneof('Type') or 'model of unknown kind'}.",
            where=model_file,
            allowed="an ML program (mlProgram)",
        )
    if not spec.mlProgram.functions:
        raise BadInputError("The ML program has no function.", where=model_file)
    return Package(path=path, model_file=model_file, spec=spec)


def _read_spec(path: Path) -> Any:
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    model = message_module("Model_pb2").Model()
    try:
        model.ParseFromString(path.read_bytes())
    except (OSError, DecodeError) as error:
        raise BadInputError(f"The model specification can't be read: {error}.", where=path) from error
    return model


def _inside(folder: Path, relative: str, package: Path) -> Path:
    """`folder / relative`, refused when it (or a link on the way) leaves the package."""
    parts = PurePosixPath(relative)
    target = folder / parts
    inside = not parts.is_absolute() and ".." not in parts.parts and not set("\\\0") & set(relative)
    if not inside or not target.resolve().is_relative_to(package.resolve()):
        raise BadInputError("A path in the package leads outside it.", where=f"{package}: {relative}")
    if not target.is_file():
        raise BadInputError("A file of the package is missing.", where=target)
    return target
