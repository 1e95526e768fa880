"""The ORT-format file: a flatbuffer that ONNX Runtime's minimal builds load, for small apps.

See https://onnxruntime.ai/docs/performance/model-optimizations/ort-format-models.html. Beside it stands the
list of operators and types that such a build must hold (`--include_ops_by_config`).
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator
from pathlib import Path

from edgeport.export.onnx.ort_order import fix_order
from edgeport.storage import write_text

CONFIG = "required_operators_and_types.config"


@contextlib.contextmanager
def _root_logger_unchanged() -> Iterator[None]:
    """ONNX Runtime's tools set up the root logger when they are imported, and print at INFO."""
    root = logging.getLogger()
    handlers = list(root.handlers)
    yield
    root.handlers[:] = handlers
    logging.getLogger("ort_format_model.utils").setLevel(logging.WARNING)


def write_ort_format(onnx_file: Path) -> str:
    """Write `<name>.ort` and the required-operators config beside an ONNX file. Returns the .ort file's name.

    Constant folding is off: it would widen integer and float16 weights to float32 in the file. So are the
    layout optimizations, whose NCHWc form runs on no phone and which fold the Casts of float16 weights as well:
    those weights are widened at every call.
    """
    import onnxruntime

    with _root_logger_unchanged():
        from onnxruntime.tools.ort_format_model import create_config_from_models

    path, config = onnx_file.with_suffix(".ort"), onnx_file.with_name(CONFIG)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(path)
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.log_severity_level = 3
    options.add_session_config_entry("session.save_model_format", "ORT")
    options.add_session_config_entry("session.qdqisint8allowed", "1")
    onnxruntime.InferenceSession(
        str(onnx_file),
        sess_options=options,
        providers=["CPUExecutionProvider"],
        disabled_optimizers=["ConstantFolding"],
    )
    with contextlib.redirect_stdout(io.StringIO()):
        create_config_from_models([path], config, enable_type_reduction=True)
    fix_order(path)
    # Its comment lines name the model by its path on this machine.
    lines = config.read_text().splitlines(keepends=True)
    write_text(config, "".join(line for line in lines if not line.startswith("#")))
    return path.name
