"""Write a .mlpackage whose bytes depend on the model alone.

coremltools' own writer names the package's items with random identifiers and notes the day of conversion.
The layout is the one that it writes (Manifest.json, the specification, the weights).
"""

from __future__ import annotations

import json
import shutil
import uuid
from pathlib import Path
from typing import Any

from edgeport.storage import hash_bytes, hash_file, write_bytes, write_text

AUTHOR = "com.apple.CoreML"
NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "https://apple.github.io/coremltools/")
CONVERSION_DATE = "com.github.apple.coremltools.conversion_date"


def write_package(path: Path, spec: Any, weights_folder: Path) -> None:
    """Write specification and weights as a model package.

    Args:
        path: the .mlpackage folder to make.
        spec: the `Model` message; its date of conversion is removed.
        weights_folder: holds weight.bin, as coremltools left it.
    """
    spec.description.metadata.userDefined.pop(CONVERSION_DATE, None)
    model = spec.SerializeToString(deterministic=True)
    data = path / "Data" / AUTHOR
    write_bytes(data / "model.mlmodel", model)
    items = [("model.mlmodel", "CoreML Model Specification", hash_bytes(model))]
    weights = weights_folder / "weight.bin"
    if weights.is_file():
        (data / "weights").mkdir()
        shutil.copyfile(weights, data / "weights" / "weight.bin")
        items.append(("weights", "CoreML Model Weights", hash_file(weights)))
    entries = {
        str(uuid.uuid5(NAMESPACE, f"{name} {digest}")).upper(): {
            "author": AUTHOR,
            "description": description,
            "name": name,
            "path": f"{AUTHOR}/{name}",
        }
        for name, description, digest in items
    }
    manifest = {
        "fileFormatVersion": "1.0.0",
        "itemInfoEntries": entries,
        "rootModelIdentifier": next(iter(entries)),
    }
    write_text(path / "Manifest.json", json.dumps(manifest, indent=4) + "\n")
