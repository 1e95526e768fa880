"""Byte forms of ExecuTorch files, against values worked out by hand and against executorch's own packing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from edgeport.compress.quantize.grid import Grid
from edgeport.compress.quantize.rtn import quantize_rtn
from edgeport.errors import BadInputError
from edgeport.export.executorch.folder import flatten_folder, unflatten_folder
from edgeport.export.executorch.native import native_weight, pack_table
from edgeport.export.executorch.pte import unpack_nibbles
from edgeport.model.types import Axis, TensorSpec
from edgeport.runtime.executorch import bind_inputs


def random_codes(rows: int, columns: int) -> torch.Tensor:
    return torch.randint(-7, 8, (rows, columns), generator=torch.Generator().manual_seed(0)).to(torch.int8)


def test_table_packs_the_even_column_high():
    assert pack_table(torch.tensor([[-7, 7, 0, 1]], dtype=torch.int8)).tolist() == [[0x1F, 0x89]]


def test_swapped_table_packs_the_even_column_low_as_xnnpack_does():
    assert pack_table(torch.tensor([[-7, 7, 0, 1]], dtype=torch.int8), swapped=True).tolist() == [[0xF1, 0x98]]


@pytest.mark.parametrize("swapped", [False, True])
def test_unpacking_undoes_packing(swapped: bool):
    codes = random_codes(5, 64)
    packed = pack_table(codes, swapped=swapped).numpy().tobytes()
    assert torch.equal(unpack_nibbles(packed, 5, even_is_high=not swapped), codes)


def test_native_weight_shows_the_parameter_it_replaces():
    tensor = quantize_rtn(torch.randn(4, 64), Grid(bits=4, group_size=32, scale_dtype="bfloat16"))
    weight = native_weight("layer.weight", tensor)
    assert (weight.shape, weight.dtype) == (torch.Size([4, 64]), torch.float32)
    assert weight.detach().codes.data_ptr() == tensor.codes.data_ptr()


def tree(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


FILES = {"b.json": b"{}", "a/weights/weight.bin": bytes(range(256)) * 300, "a/model": b'"}{', "empty": b""}


def test_folder_survives_flattening(tmp_path: Path):
    source, back = tree(tmp_path / "source", FILES), tmp_path / "back"
    back.mkdir()
    unflatten_folder(flatten_folder(source), back)
    assert {p.relative_to(back).as_posix(): p.read_bytes() for p in back.rglob("*") if p.is_file()} == FILES


def test_flattening_depends_on_content_alone(tmp_path: Path):
    forwards = tree(tmp_path / "one" / "root", FILES)
    backwards = tree(tmp_path / "two" / "root", dict(reversed(FILES.items())))
    assert flatten_folder(forwards) == flatten_folder(backwards)


def flattened(nodes: list[dict[str, object]]) -> bytes:
    return b"content" + json.dumps({"nodes": nodes}).encode()[::-1]


LEAF = {"children": {}, "dataRegion": {"offset": 0, "size": 7}, "kind": 0, "name": "x"}


@pytest.mark.parametrize(
    "data",
    [
        flattened([LEAF, {"children": {"../x": 0}, "dataRegion": {}, "kind": 1, "name": "r"}]),
        flattened([LEAF, {"children": {"..": 0}, "dataRegion": {}, "kind": 1, "name": "r"}]),
        flattened([LEAF, {"children": {"x": 1}, "dataRegion": {}, "kind": 1, "name": "r"}]),
        flattened([{**LEAF, "dataRegion": {"offset": 0, "size": 10**9}}, {"children": {"x": 0}, "kind": 1}]),
        flattened([{"children": {}, "kind": 0, "name": "x"}]),
        b"no json at all",
        b"",
    ],
    ids=["parent", "dots", "cycle", "cut off", "no region", "no tree", "empty"],
)
def test_hostile_folders_are_refused(tmp_path: Path, data: bytes):
    target = tmp_path / "inside"
    target.mkdir()
    with pytest.raises(BadInputError):
        unflatten_folder(data, target)
    assert [p.name for p in tmp_path.iterdir()] == ["inside"]


IDS = TensorSpec("ids", "int64", (Axis("batch", 1, 2, 1), 3))


def test_inputs_are_bound_by_name_in_the_files_order():
    other = TensorSpec("mask", "float32", (1,))
    bound = bind_inputs((IDS, other), {"mask": np.array([0.5]), "ids": np.array([[1, 2, 3]], np.int32)})
    assert [(a.dtype.name, a.tolist()) for a in bound] == [("int64", [[1, 2, 3]]), ("float32", [0.5])]


@pytest.mark.parametrize(
    "inputs",
    [
        {},
        {"ids": np.zeros((1, 3), np.int64), "extra": np.zeros(1)},
        {"ids": np.zeros((3, 3), np.int64)},
        {"ids": np.zeros((1, 4), np.int64)},
        {"ids": np.full((1, 3), 0.5)},
    ],
    ids=["missing", "unknown", "beyond the maximum", "wrong fixed size", "lossy cast"],
)
def test_inputs_that_do_not_fit_are_refused(inputs: dict[str, np.ndarray]):
    with pytest.raises(BadInputError):
        bind_inputs((IDS,), inputs)
