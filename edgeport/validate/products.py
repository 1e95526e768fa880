"""The products with weights that one call makes: as the shipped file has them, and as the compressed model does.

What pruning or factorizing promises is counted on the torch module (edgeport.compress.flops); this is the same number
out of the file. ONNX Runtime tells the shapes that it ran, Core ML's program is counted while it is evaluated, and
XNNPACK's graphs are read, at the largest shapes that the file takes. What attention multiplies has no weights and is
not counted; nor is a depthwise convolution, norm or lookup that a file keeps outside of XNNPACK.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from edgeport.model.types import Axis
from edgeport.validate.evidence import Products

if TYPE_CHECKING:
    import numpy as np

    from edgeport.export.artifact import Artifact
    from edgeport.model.types import Model


def count_products(artifact: Artifact, model: Model, sample: Mapping[str, np.ndarray]) -> Products | None:
    """Both counts at the same shapes; None for an encoder beside a decoder, and a delegate that can't be read.

    Args:
        model: as it was lowered.
        sample: a call's inputs by the model's names. Of a decoder with a cache one token is counted, on ExecuTorch as
            many as the file takes at once.

    Raises:
        BadInputError, MeasurementError: the file is damaged, or can't be run.
    """
    import numpy as np

    from edgeport.compress.flops import count_flops
    from edgeport.runtime.torch import as_tensor

    if artifact.encoder is not None or (artifact.runtime == "executorch" and artifact.delegate != "xnnpack"):
        return None
    if artifact.runtime == "executorch":
        largest = {spec.name: [_most(size) for size in spec.shape] for spec in artifact.inputs}
        names = {spec.name: spec.name for spec in model.inputs}
        if model.decoder is not None:
            tokens = largest[artifact.inputs[0].name][-1]
            inputs = {name: value[:, :1].repeat(tokens, 1) for name, value in sample.items() if name in names}
        else:
            inputs = {name: np.zeros(largest[name], sample[name].dtype) for name in names}
    elif model.decoder is not None:
        inputs = {name: value[:, -1:] for name, value in sample.items()}
    else:
        inputs = dict(sample)
    specs = {spec.name: spec for spec in model.inputs}
    tensors = {name: as_tensor(specs[name], value) for name, value in inputs.items()}
    options: dict[str, Any] = {} if model.decoder is None else {"use_cache": False, "logits_to_keep": 1}
    wanted = sum(count_flops(replace(model, example=tensors), **options).values())
    return Products(
        input_shapes={name: tuple(value.shape) for name, value in inputs.items()},
        file=_file(artifact, model, inputs),
        model=wanted,
    )


def _file(artifact: Artifact, model: Model, inputs: Mapping[str, np.ndarray]) -> int:
    import numpy as np

    if artifact.runtime == "executorch":
        from edgeport.export.executorch.products import xnnpack_products

        return xnnpack_products(artifact.path)
    if artifact.runtime == "coreml":
        from edgeport.runtime.coreml.products import coreml_products

        names = [spec.name for spec in artifact.inputs]
        if model.decoder is not None:
            ids, mask = names
            return coreml_products(
                artifact, {ids: next(iter(inputs.values())), mask: np.zeros((1, 1, 1, 1), np.float32)}
            )
        return coreml_products(artifact, inputs)
    from edgeport.runtime.onnx_products import onnx_products

    if model.decoder is not None:
        # One token into an empty cache.
        inputs = {**inputs, "attention_mask": np.ones((1, 1), np.int64), "position_ids": np.zeros((1, 1), np.int64)}
    return onnx_products(artifact, inputs)


def _most(size: int | Axis) -> int:
    return size.maximum if isinstance(size, Axis) else size
