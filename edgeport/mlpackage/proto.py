"""Core ML's protobuf messages, without the import of coremltools.

`import coremltools` takes some ten seconds, prints, and pulls torch. Its generated message modules need only
protobuf, so they are loaded from its folder under a name of our own: 0.05 s. protobuf keeps one class for one
message descriptor, so the messages are the same classes that coremltools uses, whichever is imported first.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

from edgeport.errors import BadInputError

PRIVATE_NAME = "_edgeport_coreml_proto"


@cache
def message_module(name: str) -> ModuleType:
    """One of coremltools' generated modules, for example "Model_pb2", "MIL_pb2" or "FeatureTypes_pb2".

    Raises:
        BadInputError: coremltools is not installed.
    """
    if PRIVATE_NAME not in sys.modules:
        spec = importlib.util.find_spec("coremltools")
        if spec is None or not spec.submodule_search_locations:
            raise BadInputError(
                "Core ML packages can't be read: coremltools is not installed.",
                next_step="pip install 'edgeport[coreml]'",
            )
        package = ModuleType(PRIVATE_NAME, "coremltools' generated protobuf messages")
        package.__path__ = [str(Path(spec.submodule_search_locations[0]) / "proto")]
        sys.modules[PRIVATE_NAME] = package
    return importlib.import_module(f"{PRIVATE_NAME}.{name}")
