"""Where the bytes of an ORT-format file lie: initializers in a flatbuffer, read with ONNX Runtime's own schema.

Padding between the flatbuffer's tables is told as part of the graph: what is padding and what is a field of zero can't
be told apart without walking every table.
"""

from __future__ import annotations

import struct
from collections.abc import Collection
from pathlib import Path

from edgeport.errors import BadInputError
from edgeport.explain.onnx_bytes import FLOATS, read_name
from edgeport.explain.spans import Span, cover

RAW_DATA = 12
"""Place of the raw data in the vtable of `Tensor` (onnxruntime/core/flatbuffers/schema/ort.fbs): its fifth field."""


def ort_spans(path: Path, parameters: Collection[str]) -> list[Span]:
    """Every byte of an ORT-format file.

    Args:
        parameters: names of the model's weights, to know them again by.

    Raises:
        BadInputError: the file is missing or damaged.
    """
    from onnxruntime.tools.ort_format_model.ort_flatbuffers_py.fbs.InferenceSession import InferenceSession

    try:
        data = path.read_bytes()
        graph = InferenceSession.GetRootAs(data, 0).Model().Graph()
        spans = []
        for index in range(graph.InitializersLength()):
            tensor = graph.Initializers(index)
            table = tensor._tab
            place = table.Offset(RAW_DATA)
            if place == 0:
                continue
            start = table.Vector(place)
            name = tensor.Name().decode()
            part, parameter = read_name(name, tensor.DataType() in FLOATS, parameters)
            spans.append(Span(start, start + table.VectorLen(place), part, name, parameter))
    except (OSError, struct.error, AttributeError, TypeError, UnicodeDecodeError) as error:
        raise BadInputError(f"The ORT-format file can't be read: {error}.", where=path) from error
    return cover(spans, 0, len(data), "graph")
