"""`package.module:factory`: example inputs in every form, and errors that name the user's own mistake."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from edgeport.errors import BadInputError
from edgeport.model.load import load_model
from edgeport.model.types import Axis

CODE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4 * 6 * 6, 5)
        self.norm.running_mean += 0.5
    def forward(self, picture):
        return self.head(torch.relu(self.norm(self.conv(picture))).flatten(1))

class Two(nn.Module):
    example_inputs = {"b": torch.arange(6), "a": torch.ones(2, 4, dtype=torch.float64)}
    def forward(self, a, b):
        return {"sum": a.sum() + b.float(), "same": a, "count": b}

class OneBatchOnly(nn.Module):
    def forward(self, x):
        return x.reshape(1, 4) * 2

net = Net
def with_example(): return Net(), torch.randn(1, 3, 8, 8)
def with_tuple(): return Net(), (torch.randn(3, 3, 8, 8),)
def fixed(): return OneBatchOnly(), torch.ones(1, 4)
def fails(): raise RuntimeError("no weights here")
def returns_text(): return "a model"
def wrong_shape(): return Net(), torch.randn(1, 3, 9, 9)
def too_many(): return Net(), (torch.randn(1), torch.randn(1))
def no_tensor(): return Net(), ("x",)
def no_float():
    class Count(nn.Module):
        def forward(self, x): return x.long()
    return Count(), torch.ones(1)
number = 3
"""

_names = itertools.count()


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a Python module in the current folder, never imported before."""
    name = f"user_code_{next(_names)}"
    (tmp_path / f"{name}.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    return name


def test_a_module_with_an_example_is_the_users_function_with_a_free_batch(module: str) -> None:
    import importlib

    model = load_model(f"{module}:with_example", task="image-classification")
    torch.manual_seed(0)  # the factory's weights are random: load_model seeds them
    original, _ = importlib.import_module(module).with_example()
    batch = Axis("batch", 1, 8, 1)
    assert [(spec.name, spec.dtype, spec.shape) for spec in model.inputs] == [("picture", "float32", (batch, 3, 8, 8))]
    assert [(spec.name, spec.shape) for spec in model.outputs] == [("logits", (batch, 5))]
    assert not [child for child in model.module.modules() if isinstance(child, torch.nn.BatchNorm2d)]
    x = torch.randn(4, 3, 8, 8)
    torch.testing.assert_close(model.module(x), original.eval()(x), rtol=1e-5, atol=1e-5)


def test_a_dict_is_put_into_forwards_order_and_a_batch_that_can_not_vary_is_fixed(module: str) -> None:
    model = load_model(f"{module}:Two")
    assert [(s.name, s.dtype, s.shape) for s in model.inputs] == [("a", "float32", (2, 4)), ("b", "int64", (6,))]
    assert [(s.name, s.shape) for s in model.outputs] == [("sum", (6,)), ("same", (2, 4))]
    assert load_model(f"{module}:fixed").inputs[0].shape == (1, 4)
    three = load_model(f"{module}:with_tuple").inputs[0].shape[0]
    assert three == Axis("batch", 1, 8, 3)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_example_inputs_from_a_file(module: str, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"example{suffix}"
    values = np.arange(192, dtype=np.float32).reshape(1, 3, 8, 8)
    if suffix == ".npz":
        np.savez(path, picture=values)
    else:
        save_file({"picture": torch.from_numpy(values)}, path)
    model = load_model(f"{module}:net", example_inputs=path)
    assert np.array_equal(model.example["picture"].numpy(), values)
    assert path.name in model.source.files


def test_the_source_record_follows_the_weights_and_the_code(module: str, tmp_path: Path) -> None:
    first = load_model(f"{module}:with_example").source.files
    assert load_model(f"{module}:with_example").source.files == first
    other = f"user_code_{next(_names)}"
    (tmp_path / f"{other}.py").write_text(CODE.replace("+= 0.5", "+= 0.25"))
    second = load_model(f"{other}:with_example").source.files
    assert second["weights"] != first["weights"]
    assert second[f"{other}.py"] != first[f"{module}.py"]


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("net", "without example inputs"),
        ("fails", "RuntimeError: no weights here"),
        ("returns_text", "returned str"),
        ("wrong_shape", "fails on its example inputs"),
        ("too_many", r"don't fit forward\(picture\)"),
        ("no_tensor", "'picture' is no tensor"),
        ("no_float", "returns no float tensor"),
        ("number", "can't be called"),
        ("missing", "has no 'missing'"),
    ],
)
def test_each_mistake_is_one_clear_error(module: str, name: str, match: str) -> None:
    with pytest.raises(BadInputError, match=match) as caught:
        load_model(f"{module}:{name}")
    assert module in f"{caught.value.where} {caught.value.what}" or name == "no_float"


def test_modules_that_do_not_import(module: str, tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="'no_such_package' can't be found"):
        load_model("no_such_package.models:make")
    (tmp_path / f"{module}_broken.py").write_text("1 / 0")
    with pytest.raises(BadInputError, match="ZeroDivisionError"):
        load_model(f"{module}_broken:make")


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("a.npz", b"no archive", "damaged"),
        ("a.safetensors", b"\xff" * 20, "damaged"),
        ("a.pt", b"", "can't be read from a .pt file"),
        ("gone.npz", None, "missing"),
    ],
)
def test_bad_files_of_example_inputs(module: str, tmp_path: Path, name: str, content: bytes | None, match: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInputError, match=match):
        load_model(f"{module}:net", example_inputs=tmp_path / name)


def test_an_npz_with_pickled_objects_and_unknown_names_is_refused(module: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "pickled.npz", picture=np.array([{"a": 1}], dtype=object))
    with pytest.raises(BadInputError, match="damaged"):
        load_model(f"{module}:net", example_inputs=tmp_path / "pickled.npz")
    np.savez(tmp_path / "other.npz", image=np.zeros((1, 3, 8, 8), np.float32))
    with pytest.raises(BadInputError, match="takes no input 'image'") as caught:
        load_model(f"{module}:net", example_inputs=tmp_path / "other.npz")
    assert caught.value.allowed == "picture"
