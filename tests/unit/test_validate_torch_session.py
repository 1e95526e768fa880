"""The torch reference session: outputs by name, whatever form the module answers in."""

from collections import OrderedDict

import numpy as np
import pytest
import torch

from edgeport.errors import BadInputError
from edgeport.model.types import Axis, Model, Source, TensorSpec
from edgeport.runtime.torch import TorchSession

SPECS = (TensorSpec("ids", "int64", (1, Axis("sequence", 1, 8, 4))), TensorSpec("scale", "float32", (1,)))
INPUTS = {"ids": np.arange(3)[None], "scale": np.array([2.0], np.float32)}


class Double(torch.nn.Module):
    def __init__(self, form):
        super().__init__()
        self.form = form

    def forward(self, ids, scale):
        assert ids.dtype == torch.int64
        return self.form(ids * scale, ids.sum())


def session(form, outputs=("a", "b")):
    specs = tuple(TensorSpec(name, "float32", (1,)) for name in outputs)
    return TorchSession(
        Model("m", Double(form).eval(), Source("factory", "r", {}), "other", "other", SPECS, specs, {}, False)
    )


@pytest.mark.parametrize(
    "form",
    [
        lambda a, b: (a, b),
        lambda a, b: [a, b, a],
        lambda a, b: {"b": b, "unused": a, "a": a},
        lambda a, b: OrderedDict(b=b, a=a),
    ],
)
def test_outputs_by_name(form):
    found = session(form).run(INPUTS)
    assert list(found) == ["a", "b"]
    assert found["a"].dtype == np.float32
    np.testing.assert_array_equal(found["a"], [[0.0, 2.0, 4.0]])
    assert found["b"] == 3


def test_half_precision_is_widened():
    found = session(lambda a, b: a.to(torch.bfloat16), outputs=("y",)).run(INPUTS)
    assert found["y"].dtype == np.float32


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"ids": np.zeros((1, 9), np.int64)}, "shape"),
        ({"ids": np.zeros((1, 0), np.int64)}, "shape"),
        ({"ids": np.zeros(3, np.int64)}, "shape"),
        ({"ids": np.zeros((1, 3), np.float32)}, "float32"),
        ({"other": np.zeros(1)}, "names"),
    ],
)
def test_inputs_that_do_not_fit(changes, word):
    with pytest.raises(BadInputError, match=word):
        session(lambda a, b: (a, b)).run({**INPUTS, **changes})


def test_an_output_that_is_not_there():
    with pytest.raises(BadInputError, match="no such output"):
        session(lambda a, b: {"a": a}).run(INPUTS)
    with pytest.raises(BadInputError, match="no such output"):
        session(lambda a, b: (a,)).run(INPUTS)
