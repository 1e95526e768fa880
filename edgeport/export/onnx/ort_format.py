"""The ORT-format file: a flatbuffer that ONNX Runtime's minimal builds load, for small apps.

See https://onnxruntime.ai/docs/performance/model-optimizations/ort-format-models.html. Beside it stands the
list of operators and types that such a build must hold (`--include_ops_by_config`).
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir

from edgeport.export.onnx.graph import CODES, SCALE, Writer
from edgeport.export.onnx.ort_order import fix_order
from edgeport.export.onnx.save import FILE, save
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


def settle_weights(graph: ir.Graph, names: Iterable[str]) -> bool:
    """Put in place what a session would fold when it loads an ONNX file: codes as blocks, scales as float32.

    An ORT-format file is loaded without constant folding. The Casts of scales would run at every call, and
    MatMulNBits would unpack codes that are no constants at every call (`blocks.py`). The price is the float32
    scales: with groups of 32 the file has 5 bits a weight instead of 4.5. A Reshape back to rows, for the embedding
    that is tied to a Linear layer, is free: it copies nothing.

    Args:
        names: of the initializers of compressed weights, without `.codes`.

    Returns:
        Whether anything was changed.
    """
    writer, changed = Writer(graph), False
    for name in names:
        for suffix, op_type in ((SCALE, "Cast"), (CODES, "Reshape")):
            stored = graph.initializers.get(name + suffix)
            node = None if stored is None else next((u for u, _ in stored.uses() if u.op_type == op_type), None)
            if node is None or stored is None or stored.const_value is None:
                continue
            array, output = stored.const_value.numpy(), node.outputs[0]
            if suffix == SCALE:
                settled = writer.constant(f"{name}{suffix}.float32", array.astype(np.float32))
            else:
                assert node.inputs[1] is not None
                assert node.inputs[1].const_value is not None
                settled = writer.constant(f"{name}{suffix}.blocks", array.reshape(node.inputs[1].const_value.numpy()))
            output.replace_all_uses_with(settled)
            graph.remove(node, safe=True)
            if stored.uses():
                rows = writer.of_weights("Reshape", [settled, writer.shape(list(array.shape))])
                stored.replace_all_uses_with(rows)
            del graph.initializers[name + suffix]
            changed = True
    return changed


def write_ort_format(program: ir.Model, names: Iterable[str], out: Path, file_name: str = FILE) -> str:
    """Write the ORT-format file of an ONNX file, and the required-operators config. Returns the .ort file's name.

    The program is changed: see `settle_weights`. `names`: see there.
    """
    if not settle_weights(program.graph, names):
        _convert(out / file_name, out)
    else:
        with tempfile.TemporaryDirectory(dir=out) as folder:
            save(program, Path(folder), file_name)
            _convert(Path(folder) / file_name, out)
    return Path(file_name).with_suffix(".ort").name


def _convert(onnx_file: Path, out: Path) -> None:
    """Write `<name>.ort` of an ONNX file into `out`, and the required-operators config of all such files there.

    Constant folding is off: it would widen integer and float16 weights to float32 in the file. So are the
    layout optimizations, whose NCHWc form runs on no phone and which fold the Casts of float16 weights as well:
    those weights are widened at every call.
    """
    import onnxruntime

    with _root_logger_unchanged():
        from onnxruntime.tools.ort_format_model import create_config_from_models

    path, config = (out / onnx_file.name).with_suffix(".ort"), out / CONFIG
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
        create_config_from_models(sorted(out.glob("*.ort")), config, enable_type_reduction=True)
    fix_order(path)
    # Its comment lines name the model by its path on this machine.
    lines = config.read_text().splitlines(keepends=True)
    write_text(config, "".join(line for line in lines if not line.startswith("#")))
