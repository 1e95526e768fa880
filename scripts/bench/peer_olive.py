"""One of Olive's passes on an ONNX file; run by quality.py in an interpreter that has olive-ai.

peer_olive.py FLOAT.onnx OUT_FOLDER PASS SETTINGS_AS_JSON
"""

from __future__ import annotations

import json
import os
import sys

os.environ["OLIVE_DISABLE_TELEMETRY"] = "1"

from olive.model import ONNXModelHandler
from olive.package_config import OlivePackageConfig
from olive.passes.olive_pass import create_pass_from_dict


def main() -> None:
    plain, out, name, settings = sys.argv[1:]
    kind = OlivePackageConfig.load_default_config().import_pass_module(name)
    made = create_pass_from_dict(kind, json.loads(settings), disable_search=True).run(ONNXModelHandler(plain), out)
    print(made.model_path)


if __name__ == "__main__":
    main()
