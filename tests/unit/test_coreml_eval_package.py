"""Reading .mlpackage files without coremltools: bits, blobs, paths, damage."""

from __future__ import annotations

import json
import os
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeport.errors import BadInputError
from edgeport.mlpackage.blob import BlobFile
from edgeport.mlpackage.constants import constants
from edgeport.mlpackage.constexpr import blockwise_shift_scale, decode
from edgeport.mlpackage.package import load_package
from edgeport.mlpackage.program import parse_function
from edgeport.mlpackage.proto import message_module
from edgeport.mlpackage.values import ELEMENT_TYPES, unpack_bits

TYPES = {kind.name: (number, kind) for number, kind in ELEMENT_TYPES.items()}


@given(bits=st.integers(1, 8), signed=st.booleans(), data=st.data())
@settings(max_examples=200, deadline=None)
def test_unpacking_undoes_packing(bits: int, signed: bool, data: st.DataObject) -> None:
    """Packed here with Python integers, least significant bit first."""
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    codes = data.draw(st.lists(st.integers(low, high), max_size=40))
    whole = sum((code & (2**bits - 1)) << (bits * place) for place, code in enumerate(codes))
    packed = np.frombuffer(whole.to_bytes((len(codes) * bits + 7) // 8, "little"), np.uint8)
    unpacked = unpack_bits(packed, bits, len(codes), signed=signed)
    assert unpacked.dtype == (np.int8 if signed else np.uint8)
    assert unpacked.tolist() == codes


def test_unpacking_needs_enough_bytes() -> None:
    with pytest.raises(BadInputError, match="can't hold 5 elements of 4 bits"):
        unpack_bits(np.zeros(2, np.uint8), 4, 5, signed=True)


@given(rows=st.integers(1, 5), groups=st.integers(1, 4), size=st.integers(1, 6), seed=st.integers(0, 999))
@settings(max_examples=50, deadline=None)
def test_blockwise_scales_serve_their_block(rows: int, groups: int, size: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    data = random.integers(-8, 8, size=(rows, groups * size)).astype(np.int8)
    scale = random.normal(size=(rows, groups)).astype(np.float32)
    offset = random.integers(-8, 8, size=(rows, groups)).astype(np.int8)
    value = blockwise_shift_scale(data, scale, offset)
    for row in range(rows):
        for column in range(groups * size):
            group = column // size
            exact = np.float32(int(data[row, column]) - int(offset[row, group])) * scale[row, group]
            assert value[row, column] == exact


def test_parameters_that_do_not_fit_each_other() -> None:
    with pytest.raises(BadInputError, match="don't divide"):
        decode("constexpr_blockwise_shift_scale", {"data": np.zeros((2, 6), np.int8), "scale": np.ones((2, 4))})
    with pytest.raises(BadInputError, match="don't fit each other"):
        decode("constexpr_affine_dequantize", {"quantized_data": np.zeros((2, 6), np.int8)})
    with pytest.raises(BadInputError, match="constexpr_zip"):
        decode("constexpr_zip", {})
    with pytest.raises(BadInputError, match="3 values for 2 set bits"):
        decode("constexpr_sparse_to_dense", {"nonzero_data": np.ones(3), "mask": np.array([1, 0, 1])})


def blob_bytes(data: bytes, stored: int, *, sentinel: int = 0xDEADBEEF, version: int = 2) -> bytes:
    """A weight file with one blob at offset 64."""
    header = struct.pack("<II56x", 1, version)
    return header + struct.pack("<IIQQQ32x", sentinel, stored, len(data), 128, 0) + data


def write_package(
    folder: Path, weights: bytes | None = None, *, offset: int = 64, file_name: str | None = None
) -> Path:
    """A package whose program is one float constant of five elements, in the weight file."""
    package = folder / "model.mlpackage"
    model_folder = package / "Data" / "com.apple.CoreML"
    (model_folder / "weights").mkdir(parents=True)
    spec = message_module("Model_pb2").Model()
    spec.specificationVersion = 8
    function = spec.mlProgram.functions["main"]
    function.opset = "CoreML7"
    block = function.block_specializations["CoreML7"]
    operation = block.operations.add(type="const")
    output = operation.outputs.add(name="weight")
    value = operation.attributes["val"]
    for kind in (output.type.tensorType, value.type.tensorType):
        kind.dataType = TYPES["fp32"][0]
        kind.dimensions.add().constant.size = 5
    value.blobFileValue.fileName = file_name or "@model_path/weights/weight.bin"
    value.blobFileValue.offset = offset
    block.outputs.append("weight")
    (model_folder / "model.mlmodel").write_bytes(spec.SerializeToString())
    if weights is not None:
        (model_folder / "weights" / "weight.bin").write_bytes(weights)
    manifest = {
        "fileFormatVersion": "1.0.0",
        "itemInfoEntries": {"a": {"path": "com.apple.CoreML/model.mlmodel", "name": "model.mlmodel"}},
        "rootModelIdentifier": "a",
    }
    (package / "Manifest.json").write_text(json.dumps(manifest))
    return package


VALUES = np.array([1, -2, 3.5, 0, 1e-3], np.float32)
WEIGHTS = blob_bytes(VALUES.tobytes(), 2)


def read(package: Path) -> np.ndarray:
    value: np.ndarray = constants(parse_function(load_package(package)).body)["weight"].value()
    return value


def test_a_constant_is_read_without_coremltools(tmp_path: Path) -> None:
    loaded = "coremltools" in sys.modules
    np.testing.assert_array_equal(read(write_package(tmp_path, WEIGHTS)), VALUES)
    assert ("coremltools" in sys.modules) == loaded


@pytest.mark.parametrize(
    ("weights", "offset", "message"),
    [
        (None, 64, "missing"),
        (b"", 64, "can't be read"),
        (WEIGHTS[:40], 64, "shorter than its header"),
        (WEIGHTS[:100], 64, "outside it"),
        (WEIGHTS[:-1], 64, "past its end"),
        (WEIGHTS, 2**40, "outside it"),
        (WEIGHTS, 72, "no blob record"),
        (blob_bytes(VALUES.tobytes(), 2, sentinel=1), 64, "no blob record"),
        (blob_bytes(VALUES.tobytes(), 2, version=1), 64, "version 1"),
        (blob_bytes(VALUES.tobytes(), 14), 64, "holds int32 where the program declares fp32"),
        (blob_bytes(VALUES.tobytes(), 99), 64, "holds type 99"),
        (blob_bytes(VALUES[:4].tobytes(), 2), 64, "16 bytes where the program declares 5 elements"),
    ],
)
def test_damaged_weight_files(tmp_path: Path, weights: bytes | None, offset: int, message: str) -> None:
    with pytest.raises(BadInputError) as caught:
        read(write_package(tmp_path, weights, offset=offset))
    assert message in str(caught.value)
    assert caught.value.where


def test_a_mapped_file_is_never_written(tmp_path: Path) -> None:
    path = tmp_path / "weight.bin"
    path.write_bytes(WEIGHTS)
    array = BlobFile(path).read(64, TYPES["fp32"][1], 5)
    array[:] = 7
    assert path.read_bytes() == WEIGHTS


@pytest.mark.parametrize("name", ["@model_path/../../../secret.bin", "/etc/hostname", "@model_path/..\\secret.bin"])
def test_weight_paths_stay_inside(tmp_path: Path, name: str) -> None:
    (tmp_path / "secret.bin").write_bytes(WEIGHTS)
    with pytest.raises(BadInputError, match="leads outside"):
        read(write_package(tmp_path, WEIGHTS, file_name=name))


def change_manifest(package: Path, **changes: Any) -> None:
    path = package / "Manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("path", ["../../x", "/etc/passwd", "com.apple.CoreML/../../../outside.mlmodel"])
def test_manifest_paths_stay_inside(tmp_path: Path, path: str) -> None:
    package = write_package(tmp_path, WEIGHTS)
    change_manifest(package, itemInfoEntries={"a": {"path": path}})
    with pytest.raises(BadInputError, match="leads outside"):
        load_package(package)


def test_links_stay_inside(tmp_path: Path) -> None:
    package = write_package(tmp_path)
    (tmp_path / "secret.bin").write_bytes(WEIGHTS)
    os.symlink(tmp_path / "secret.bin", package / "Data/com.apple.CoreML/weights/weight.bin")
    with pytest.raises(BadInputError, match="leads outside"):
        read(package)


def test_damaged_packages(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="no Core ML model package"):
        load_package(tmp_path / "nothing.mlpackage")
    package = write_package(tmp_path, WEIGHTS)
    model = package / "Data/com.apple.CoreML/model.mlmodel"
    whole = model.read_bytes()
    model.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadInputError, match="can't be read"):
        load_package(package)
    model.write_bytes(b"")
    with pytest.raises(BadInputError, match="model of unknown kind"):
        load_package(package)
    model.unlink()
    with pytest.raises(BadInputError, match="missing"):
        load_package(package)
    for entries in ({}, {"a": 5}, {"b": {"path": "x"}}, []):
        change_manifest(package, itemInfoEntries=entries)
        with pytest.raises(BadInputError, match="names no model"):
            load_package(package)
    (package / "Manifest.json").write_text("{")
    with pytest.raises(BadInputError, match="JSON"):
        load_package(package)


def test_truncated_specifications_are_bad_input(tmp_path: Path) -> None:
    package = write_package(tmp_path, WEIGHTS)
    model = package / "Data/com.apple.CoreML/model.mlmodel"
    whole = model.read_bytes()
    for size in range(len(whole)):
        model.write_bytes(whole[:size])
        with pytest.raises(BadInputError):
            read(package)


def test_changed_bytes_of_a_specification_are_bad_input_or_harmless(tmp_path: Path) -> None:
    """Every byte, changed in a few ways: nothing but a clear error may come out."""
    package = write_package(tmp_path, WEIGHTS)
    model = package / "Data/com.apple.CoreML/model.mlmodel"
    whole = model.read_bytes()
    refused = 0
    for place in range(len(whole)):
        for change in (0x01, 0x08, 0x80, 0xFF):
            model.write_bytes(whole[:place] + bytes([whole[place] ^ change]) + whole[place + 1 :])
            try:
                opened = load_package(package)
                for name in opened.spec.mlProgram.functions:
                    for constant in constants(parse_function(opened, name).body).values():
                        constant.value()
            except BadInputError:
                refused += 1
    assert refused > len(whole)  # most changes are noticed


def test_a_neural_network_of_the_old_format_is_refused(tmp_path: Path) -> None:
    package = write_package(tmp_path, WEIGHTS)
    spec = message_module("Model_pb2").Model()
    spec.neuralNetwork.SetInParent()
    (package / "Data/com.apple.CoreML/model.mlmodel").write_bytes(spec.SerializeToString())
    with pytest.raises(BadInputError, match="neuralNetwork"):
        load_package(package)
