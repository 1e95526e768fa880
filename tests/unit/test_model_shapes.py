"""Axes of a model: another example size, a smaller range."""

import pytest
import torch

from edgeport.errors import BadInputError
from edgeport.model.shapes import axes, with_axis, with_limit
from edgeport.model.types import Axis, Model, Source, TensorSpec

BATCH, SEQUENCE = Axis("batch", 1, 8, 1), Axis("sequence", 1, 64, 16)


@pytest.fixture
def model() -> Model:
    return Model(
        name="m",
        module=torch.nn.Identity(),
        source=Source("factory", "m", {}),
        task="other",
        modality="other",
        inputs=(TensorSpec("ids", "int64", (BATCH, SEQUENCE)),),
        outputs=(TensorSpec("y", "float32", (BATCH, SEQUENCE, 4)),),
        example={"ids": torch.arange(16).reshape(1, 16)},
        huggingface=False,
    )


@pytest.mark.parametrize("size", [1, 7, 16, 40, 64])
def test_the_example_follows_the_axis(model: Model, size: int):
    changed = with_axis(model, "sequence", size)
    assert changed.inputs[0].fixed_shape() == changed.example["ids"].shape == (1, size)
    assert changed.outputs[0].fixed_shape() == (1, size, 4)
    assert changed.example["ids"][0].tolist() == [index % 16 for index in range(size)]


@pytest.mark.parametrize("size", [0, 65])
def test_a_size_out_of_range_says_the_range(model: Model, size: int):
    with pytest.raises(BadInputError) as caught:
        with_axis(model, "sequence", size)
    assert caught.value.allowed == "1 to 64"


def test_an_unknown_axis_lists_the_known_ones(model: Model):
    with pytest.raises(BadInputError) as caught:
        with_axis(model, "frames", 3)
    assert caught.value.allowed == "batch, sequence"


def test_an_axis_limited_to_its_least_size_is_a_constant(model: Model):
    limited = with_limit(model, "batch", 1)
    assert limited.inputs[0].shape == (1, SEQUENCE)
    assert limited.outputs[0].shape == (1, SEQUENCE, 4)
    assert set(axes(limited.inputs)) == {"sequence"}
    assert axes(with_limit(model, "batch", 4).inputs)["batch"] == Axis("batch", 1, 4, 1)
    assert with_limit(model, "batch", 8).inputs == model.inputs
