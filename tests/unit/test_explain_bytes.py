"""Bytes of stored files by what they say: every byte once, against the libraries that wrote the files."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import helper, numpy_helper

from edgeport.compress.apply import LayerRecord
from edgeport.errors import BadInputError
from edgeport.explain.groups import layer_group
from edgeport.explain.nameless import name_spans
from edgeport.explain.onnx_bytes import onnx_spans, read_initializers, read_name
from edgeport.explain.onnx_places import find_places
from edgeport.explain.shipped import Shipped
from edgeport.explain.sizes import read_bytes
from edgeport.explain.spans import Span, cover
from edgeport.export.artifact import Artifact, EncoderPart
from edgeport.recipe import load_recipe

PARAMETERS = ("layers.1.fc.weight", "layers.1.fc.weight_g", "layers.10.fc.weight", "conv.weight")


def tensors(seed: int = 0) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {
        "layers.1.fc.weight.codes": generator.integers(-127, 128, (64, 32), dtype=np.int8),
        "layers.1.fc.weight.scale": generator.normal(size=32).astype(np.float32),
        "layers.10.fc.weight": generator.normal(size=(16, 64)).astype(np.float32),
        "norm": generator.normal(size=100).astype(np.float16),
        "shape": np.array([1, -1], np.int64),
    }


def save(folder: Path, *, external: bool = False) -> Path:
    """A graph of nothing but initializers and one operator, as the onnx library writes it."""
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])],
        "graph",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n"])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n"])],
        [numpy_helper.from_array(array, name) for name, array in tensors().items()],
    )
    model = helper.make_model(graph, producer_name="test")
    path = folder / "model.onnx"
    options = {"save_as_external_data": True, "location": "model.onnx.data", "size_threshold": 64} if external else {}
    onnx.save(model, path, **options)
    return path


@pytest.mark.parametrize("external", [False, True], ids=["one file", "data beside it"])
def test_every_byte_of_an_onnx_file_has_its_place(tmp_path, external):
    path = save(tmp_path, external=external)
    found = onnx_spans(path, PARAMETERS)
    for name, spans in found.items():
        assert sum(span.size for span in spans) == os.path.getsize(tmp_path / name)
        assert [span.start for span in spans] == [0, *(span.stop for span in spans[:-1])]
    told = {span.name: (name, span) for name, spans in found.items() for span in spans if span.name}
    for name, array in tensors().items():
        file, span = told[name]
        assert (tmp_path / file).read_bytes()[span.start : span.stop] == array.tobytes()
    assert told["layers.1.fc.weight.codes"][1].part == "codes"
    assert told["layers.1.fc.weight.scale"][1].part == "scales"
    assert told["layers.10.fc.weight"][1].parameter == "layers.10.fc.weight"
    assert told["norm"][1].parameter is None
    assert set(found) == ({"model.onnx", "model.onnx.data"} if external else {"model.onnx"})


def test_a_message_in_pieces_is_read_as_one(tmp_path):
    """edgeport appends each initializer as a message of its own."""
    path = save(tmp_path)
    more = onnx.ModelProto()
    more.graph.initializer.append(numpy_helper.from_array(np.arange(6, dtype=np.float32), "late"))
    path.write_bytes(path.read_bytes() + more.SerializeToString())
    assert [item.name for item in read_initializers(path)] == [*tensors(), "late"]
    assert sum(span.size for span in onnx_spans(path, ())["model.onnx"]) == os.path.getsize(path)


def test_a_file_that_is_cut_off_is_refused(tmp_path):
    path = save(tmp_path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(BadInputError, match="cut off"):
        onnx_spans(path, PARAMETERS)


@pytest.mark.parametrize(
    ("name", "floats", "expected"),
    [
        ("layers.1.fc.weight.codes", False, ("codes", "layers.1.fc.weight")),
        ("layers.1.fc.weight.joined.scale", True, ("scales", "layers.1.fc.weight")),
        ("layers.1.fc.weight.zero_point", False, ("zero_points", "layers.1.fc.weight")),
        ("layers.1.fc.weight.correction.layers.1.fc.bias", True, ("floats", "layers.1.fc.weight")),
        ("layers.1.fc.weight_g.codes", False, ("codes", "layers.1.fc.weight_g")),
        ("module.layers.10.fc.weight.half", True, ("floats", "layers.10.fc.weight")),
        ("conv.weight.bias.codes", False, ("codes", "conv.weight")),
        ("activation_3.scale", True, ("scales", None)),
        ("activation_3.zero_point", False, ("zero_points", None)),
        ("edgeport.int32_zeros_64", False, ("zero_points", None)),
        ("edgeport.step", True, ("graph", None)),
        ("val_12", False, ("graph", None)),
        ("val_12", True, ("floats", None)),
    ],
)
def test_names_of_initializers(name, floats, expected):
    assert read_name(name, floats, PARAMETERS) == expected


def test_gaps_are_told_and_shared_bytes_counted_once():
    a, shared = Span(4, 8, "codes", "a"), Span(4, 8, "codes", "b")
    found = cover([Span(10, 12, "scales", "s"), shared, a, Span(9, 9, "floats", "empty")], 0, 16, "alignment")
    assert [(span.start, span.stop, span.name) for span in found] == [
        (0, 4, ""),
        (4, 8, "b"),
        (8, 10, ""),
        (10, 12, "s"),
        (12, 16, ""),
    ]
    assert sum(span.size for span in found) == 16


@pytest.mark.parametrize("span", [Span(6, 9, "codes"), Span(0, 5, "codes"), Span(14, 17, "codes")])
def test_bytes_that_are_said_twice_are_refused(span):
    with pytest.raises(BadInputError, match="are taken"):
        cover([Span(4, 8, "codes", "a"), span], 0, 16, "graph")


def record(name: str, shape: tuple[int, ...], kinds: tuple[str, ...] = ("linear",)) -> LayerRecord:
    size = 4 * int(np.prod(shape))
    return LayerRecord(name, kinds, shape, "float", "float", size, size, "", 0.0, None, (), "", None)


def test_float_weights_are_known_again_by_their_values(tmp_path):
    """As exporters write them: turned, in float16, or side by side with others that read the same input."""
    generator = torch.Generator().manual_seed(0)
    state = {
        name: torch.randn(shape, generator=generator)
        for name, shape in {
            "a.q_proj.weight": (16, 32),
            "a.k_proj.weight": (8, 32),
            "fc1.weight": (24, 32),
            "fc2.weight": (12, 32),
            "conv.weight": (8, 4, 3, 3),
        }.items()
    }
    arrays = {name: tensor.numpy() for name, tensor in state.items()}
    pieces = [
        np.concatenate([arrays["a.q_proj.weight"].T, arrays["a.k_proj.weight"].T], axis=1),
        arrays["fc1.weight"].T.astype(np.float16),
        arrays["fc2.weight"].T,
        arrays["conv.weight"].transpose(0, 2, 3, 1),
        generator.initial_seed() + np.ones((32, 32), np.float32),
    ]
    data, spans = b"", []
    for index, piece in enumerate(pieces):
        raw = np.ascontiguousarray(piece).tobytes()
        spans.append(Span(len(data), len(data) + len(raw), "floats", f"val_{index}"))
        data += raw
    path = tmp_path / "file"
    path.write_bytes(data)
    shipped = a_shipped(tmp_path, "file", tuple(record(name, tuple(t.shape)) for name, t in state.items()), 1)
    found = name_spans(path, spans, shipped, state)
    assert [span.parameter for span in found] == ["a.q_proj.weight", "fc1.weight", "fc2.weight", "conv.weight", None]


def a_shipped(root: Path, entry: str, layers: tuple[LayerRecord, ...], parameters: int) -> Shipped:
    artifact = Artifact("onnxruntime", "cpu", root, entry, (), ())
    return Shipped(artifact, "other", load_recipe("int8"), parameters, layers, (), ())


def test_the_waterfall_goes_from_the_original_to_the_file(tmp_path):
    save(tmp_path)
    (tmp_path / "beside.json").write_text("{}")
    layers = (record("layers.1.fc.weight", (64, 32)), record("layers.10.fc.weight", (16, 64)))
    found = read_bytes(a_shipped(tmp_path, "model.onnx", layers, 64 * 32 + 16 * 64 + 100))
    size = os.path.getsize(tmp_path / "model.onnx")
    assert found.file == size == sum(cell.bytes for cell in found.cells)
    assert found.original == 4 * (64 * 32 + 16 * 64 + 100)
    assert found.original + sum(step.change for step in found.steps) == size
    cells = {(cell.group, cell.part): cell.bytes for cell in found.cells}
    assert cells["feed_forward", "codes"] == 64 * 32
    assert cells["feed_forward", "scales"] == 32 * 4
    assert cells["feed_forward", "floats"] == 16 * 64 * 4
    assert cells["other", "floats"] == 100 * 2
    assert cells["file", "graph"] == size - (64 * 32 + 32 * 4 + 16 * 64 * 4 + 200)
    assert [file.path for file in found.beside] == ["beside.json"]
    assert found.before == {"feed_forward": 4 * (64 * 32 + 16 * 64), "other": 400}


def test_groups_tell_a_tied_head_from_an_embedding():
    assert layer_group("model.embed_tokens.weight", ("embedding", "linear")) == "tied_head"
    assert layer_group("model.embed_tokens.weight", ("embedding",)) == "embedding"


def test_two_files_that_are_loaded_together_are_told_together(tmp_path):
    """An encoder beside its decoder."""
    save(tmp_path)
    os.rename(tmp_path / "model.onnx", tmp_path / "encoder.onnx")
    save(tmp_path)
    whole = a_shipped(tmp_path, "model.onnx", (record("layers.1.fc.weight", (64, 32)),), 64 * 32)
    both = replace(whole, artifact=replace(whole.artifact, encoder=EncoderPart("encoder.onnx", (), ())))
    found = read_bytes(both)
    assert [file.path for file in found.files] == ["encoder.onnx", "model.onnx"]
    assert found.file == 2 * read_bytes(whole).file == sum(cell.bytes for cell in found.cells)
    assert found.original + sum(step.change for step in found.steps) == found.file


def test_the_layer_of_a_deep_graph_is_found(tmp_path):
    """Three thousand operators before it: what follows from constants is found in one pass, not by recursion."""
    weight = np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32)
    nodes = [helper.make_node("Add", [f"v{index}", f"v{index}"], [f"v{index + 1}"]) for index in range(3000)]
    nodes += [
        helper.make_node("MatMul", ["v3000", "turned"], ["product"]),
        helper.make_node("Add", ["product", "bias"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "deep",
        [helper.make_tensor_value_info("v0", onnx.TensorProto.FLOAT, [1, 8])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1, 16])],
        [numpy_helper.from_array(weight, "turned"), numpy_helper.from_array(np.ones(16, np.float32), "bias")],
    )
    onnx.save(helper.make_model(graph), tmp_path / "model.onnx")
    shipped = a_shipped(tmp_path, "model.onnx", (record("fc.weight", (16, 8)),), 128)
    places, missing = find_places(
        ir.load(tmp_path / "model.onnx").graph, shipped, {"fc.weight": torch.from_numpy(weight.T.copy())}
    )
    assert missing == []
    assert [(place.layer, place.output.name, place.input.name) for place in places] == [("fc", "y", "v3000")]
