"""The operator table of the Core ML reference evaluator, split by topic."""

from __future__ import annotations

from edgeport.runtime.coreml.ops import (
    activation,
    conv,
    elementwise,
    image,
    indexing,
    layout,
    linear,
    normalization,
    recurrent,
    reduction,
)
from edgeport.runtime.coreml.ops.arguments import Operators

OPERATORS: Operators = {
    **activation.OPERATORS,
    **conv.OPERATORS,
    **elementwise.OPERATORS,
    **image.OPERATORS,
    **indexing.OPERATORS,
    **layout.OPERATORS,
    **linear.OPERATORS,
    **normalization.OPERATORS,
    **recurrent.OPERATORS,
    **reduction.OPERATORS,
}
