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

# Results hold only values that stood in the operands: they need no rounding to a type that the operands have.
_CHOOSING = ("abs", "clip", "max_pool", "maximum", "minimum", "reduce_max", "reduce_min", "relu", "relu6", "select")
EXACT_OPERATORS = (
    frozenset({*layout.OPERATORS, "gather", "gather_along_axis", "gather_nd", "read_state", "slice_by_index"})
    | {"slice_by_size", "slice_update", *_CHOOSING}
) - {"fill", "fill_like", "one_hot", "pad", "range_1d"}
