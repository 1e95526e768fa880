"""Sessions on saved packages: policies, control flow, states, functions, inputs of every kind, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgeport.errors import BadInputError, MeasurementError
from edgeport.export.artifact import Artifact
from edgeport.mlpackage.package import load_package
from edgeport.mlpackage.program import parse_function
from edgeport.runtime.coreml.plan import plan
from edgeport.runtime.coreml.session import CoreMLReferenceSession

RANDOM = np.random.default_rng(4)


def artifact(path: Path) -> Artifact:
    return Artifact(runtime="coreml", delegate="cpu", root=path.parent, entry=path.name, inputs=(), outputs=())


def only(outputs: dict[str, np.ndarray]) -> np.ndarray:
    (value,) = outputs.values()
    return value


def convert_torch(
    save_package: Any, module: torch.nn.Module, inputs: Any, opset: str = "iOS17", **options: Any
) -> Path:
    """A traced torch module, with the passes that a real conversion has."""
    import coremltools as ct

    example = options.pop("example")
    traced = torch.jit.trace(module.eval(), example)
    return save_package(
        traced, opset, inputs=inputs, pass_pipeline=ct.PassPipeline.DEFAULT, convert_to="mlprogram", **options
    )


@pytest.fixture(scope="module")
def overflowing(save_package: Any) -> Path:
    """An fp16 program whose square overflows: mean(x^2) is finite in fp32 only."""
    import coremltools as ct
    from coremltools.converters.mil import Builder as mb

    @mb.program(input_specs=[mb.TensorSpec((1, 4))], opset_version=ct.target.iOS17)
    def program(x: Any) -> Any:
        half = mb.cast(x=x, dtype="fp16")
        squared = mb.square(x=half, name="squared")
        return mb.cast(x=mb.reduce_mean(x=squared, axes=[1]), dtype="fp32", name="result")

    return save_package(program, "iOS17")


def test_declared_types_show_overflow_that_fp32_does_not(overflowing: Path) -> None:
    x = np.array([[300.0, 1.0, 2.0, 3.0]], np.float32)
    assert np.isinf(only(CoreMLReferenceSession(artifact(overflowing)).run({"x": x})))
    exact = only(CoreMLReferenceSession(artifact(overflowing), "fp32").run({"x": x}))
    np.testing.assert_allclose(exact, [(90000 + 14) / 4], rtol=1e-6)


def test_declared_types_round_after_every_operator(overflowing: Path) -> None:
    x = np.array([[0.1, 0.7, 1.3, 2.9]], np.float32)
    half = np.square(x.astype(np.float16).astype(np.float32)).astype(np.float16)
    expected = half.astype(np.float32).mean(1).astype(np.float16)
    np.testing.assert_array_equal(
        only(CoreMLReferenceSession(artifact(overflowing)).run({"x": x})), expected.astype(np.float32)
    )


@pytest.fixture(scope="module")
def control(save_package: Any) -> Path:
    import coremltools as ct
    from coremltools.converters.mil import Builder as mb

    @mb.program(input_specs=[mb.TensorSpec((1,))], opset_version=ct.target.iOS17)
    def program(x: Any) -> Any:
        scalar = mb.squeeze(x=x)
        # Doubles until 100 is passed, counting the rounds.
        doubled, rounds = mb.while_loop(
            _cond=lambda value, count: mb.less(x=value, y=100.0),
            _body=lambda value, count: (mb.mul(x=value, y=2.0), mb.add(x=count, y=1.0)),
            loop_vars=(scalar, 0.0),
        )
        chosen = mb.cond(
            pred=mb.greater(x=rounds, y=3.0),
            _true_fn=lambda: mb.add(x=doubled, y=scalar),
            _false_fn=lambda: mb.sub(x=doubled, y=scalar),
        )
        return mb.expand_dims(x=chosen, axes=[0]), mb.expand_dims(x=rounds, axes=[0])

    return save_package(program, "iOS17")


@pytest.mark.parametrize(("start", "value", "rounds"), [(3.0, 192 + 3, 6), (60.0, 120 - 60, 1), (200.0, 0, 0)])
def test_loops_and_branches(control: Path, start: float, value: float, rounds: int) -> None:
    got = CoreMLReferenceSession(artifact(control)).run({"x": np.array([start], np.float32)})
    assert [float(item[0]) for item in got.values()] == [value, rounds]


class Accumulator(torch.nn.Module):
    """A buffer that sums what it has seen."""

    total: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(2, 3, dtype=torch.float16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.total.add_(x)
        return self.total * 2


def test_states_are_carried_only_when_asked(save_package: Any) -> None:
    import coremltools as ct

    path = convert_torch(
        save_package,
        Accumulator(),
        [ct.TensorType(shape=(2, 3), dtype=np.float16, name="x")],
        "iOS18",
        example=torch.ones(2, 3, dtype=torch.float16),
        states=[ct.StateType(wrapped_type=ct.TensorType(shape=(2, 3), dtype=np.float16), name="total")],
    )
    session = CoreMLReferenceSession(artifact(path))
    x = np.arange(6, dtype=np.float16).reshape(2, 3)
    state = session.new_state()
    assert list(state) == ["total"]
    np.testing.assert_array_equal(only(session.run({"x": x}, state)), 2 * x)
    np.testing.assert_array_equal(only(session.run({"x": x}, state)), 4 * x)
    np.testing.assert_array_equal(state["total"].numpy(), 2 * x)
    np.testing.assert_array_equal(only(session.run({"x": x})), 2 * x)


@pytest.mark.parametrize("looks_back", [False, True])
def test_a_cache_is_changed_in_place_only_where_nobody_looks(save_package: Any, looks_back: bool) -> None:
    """The row that was read before the update is a view: it must keep the old content when it is used later."""
    import coremltools as ct
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.mil import types

    specs = [mb.TensorSpec((1, 3), dtype=types.fp16), mb.StateTensorSpec((2, 3), dtype=types.fp16)]

    @mb.program(input_specs=specs, opset_version=ct.target.iOS18)
    def program(x: Any, cache: Any) -> Any:
        before = mb.read_state(input=cache)
        row = mb.slice_by_index(x=before, begin=[0, 0], end=[1, 3])
        early = mb.add(x=row, y=x)
        updated = mb.slice_update(x=before, update=x, begin=[0, 0], end=[1, 3])
        after = mb.coreml_update_state(state=cache, value=updated)
        total = mb.add(x=mb.reduce_sum(x=after, axes=[0], keep_dims=True), y=early)
        return mb.add(x=total, y=row, name="y") if looks_back else mb.identity(x=total, name="y")

    session = CoreMLReferenceSession(artifact(save_package(program, "iOS18")))
    state = session.new_state()
    memory = state["cache"].data_ptr()
    old = np.zeros((1, 3), np.float32)
    for step in (1.0, 10.0, 100.0):
        x = np.full((1, 3), step, np.float32)
        np.testing.assert_array_equal(only(session.run({"x": x}, state)), x + (old + x) + (old if looks_back else 0))
        np.testing.assert_array_equal(state["cache"].numpy(), np.concatenate([x, np.zeros((1, 3))]))
        old = x
    assert (state["cache"].data_ptr() == memory) is not looks_back


def test_functions_of_one_package(save_package: Any, tmp_path: Path) -> None:
    import coremltools as ct
    from coremltools.converters.mil import Builder as mb

    weight = RANDOM.normal(size=(4, 8)).astype(np.float32)
    paths = []
    for rows in (2, 5):

        @mb.program(input_specs=[mb.TensorSpec((rows, 8))], opset_version=ct.target.iOS18)
        def program(x: Any) -> Any:
            return mb.linear(x=x, weight=weight, name="y")

        paths.append(save_package(program, "iOS18"))
    description = ct.utils.MultiFunctionDescriptor()
    for name, path in zip(("short", "long"), paths, strict=True):
        description.add_function(str(path), src_function_name="main", target_function_name=name)
    description.default_function_name = "long"
    merged = tmp_path / "merged.mlpackage"
    ct.utils.save_multifunction(description, str(merged))

    for name, rows in (("short", 2), ("long", 5), (None, 5)):
        x = RANDOM.normal(size=(rows, 8)).astype(np.float32)
        got = CoreMLReferenceSession(artifact(merged), function=name).run({"x": x})
        np.testing.assert_allclose(only(got), x @ weight.T, rtol=1e-5, atol=1e-5)
    with pytest.raises(BadInputError, match="no function 'middle'") as caught:
        CoreMLReferenceSession(artifact(merged), function="middle")
    assert caught.value.allowed == "long, short"


@pytest.fixture(scope="module")
def ranged(save_package: Any) -> Path:
    """(1, 2..6) whole numbers looked up in a table of ten rows and averaged."""
    import coremltools as ct

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.table = torch.nn.Embedding(10, 3)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.table(tokens).mean(1)

    shape = ct.Shape((1, ct.RangeDim(2, 6, default=4)))
    return convert_torch(
        save_package,
        Model(),
        [ct.TensorType(name="tokens", shape=shape, dtype=np.int32)],
        example=torch.zeros(1, 4, dtype=torch.int32),
        compute_precision=ct.precision.FLOAT32,
    )


def test_a_range_of_shapes(ranged: Path) -> None:
    torch.manual_seed(0)
    table = torch.nn.Embedding(10, 3).weight.detach().numpy()
    session = CoreMLReferenceSession(artifact(ranged))
    for length in (2, 5, 6):
        tokens = RANDOM.integers(0, 10, size=(1, length))  # int64, as a tokenizer gives
        np.testing.assert_allclose(only(session.run({"tokens": tokens})), table[tokens].mean(1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"tokens": np.zeros((1, 7), np.int64)}, "shape (1, 7)"),
        ({"tokens": np.zeros((2, 4), np.int64)}, "shape (2, 4)"),
        ({"tokens": np.zeros((1, 4), np.float32)}, "float32 values can't be held exactly"),
        ({"tokens": np.full((1, 4), 2**31, np.int64)}, "can't be held exactly in int32"),
        ({}, "missing ['tokens']"),
        ({"tokens": np.zeros((1, 4), np.int64), "mask": np.zeros(4)}, "unknown ['mask']"),
    ],
)
def test_inputs_that_do_not_fit(ranged: Path, inputs: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(BadInputError) as caught:
        CoreMLReferenceSession(artifact(ranged)).run(inputs)
    assert message in caught.value.what
    assert caught.value.allowed


def test_an_index_outside_the_table_is_no_evidence(ranged: Path) -> None:
    with pytest.raises(MeasurementError, match="outside its axis"):
        CoreMLReferenceSession(artifact(ranged)).run({"tokens": np.full((1, 4), 10)})


def test_enumerated_shapes(save_package: Any) -> None:
    import coremltools as ct

    shapes = ct.EnumeratedShapes([(1, 4), (1, 9)], default=(1, 4))
    path = convert_torch(
        save_package,
        torch.nn.Softmax(-1),
        [ct.TensorType(name="x", shape=shapes)],
        example=torch.zeros(1, 4),
        compute_precision=ct.precision.FLOAT32,
    )
    session = CoreMLReferenceSession(artifact(path))
    x = RANDOM.normal(size=(1, 9)).astype(np.float32)
    np.testing.assert_allclose(only(session.run({"x": x})), torch.softmax(torch.from_numpy(x), -1), rtol=1e-6)
    with pytest.raises(BadInputError) as caught:
        session.run({"x": x[:, :5]})
    assert caught.value.allowed == "(1, 4) or (1, 9)"


def test_values_beyond_float16_are_refused(save_package: Any) -> None:
    import coremltools as ct
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.mil import types

    @mb.program(input_specs=[mb.TensorSpec((2,), dtype=types.fp16)], opset_version=ct.target.iOS17)
    def program(x: Any) -> Any:
        return mb.mul(x=x, y=np.float16(0.5), name="y")

    session = CoreMLReferenceSession(artifact(save_package(program, "iOS17")))
    got = only(session.run({"x": np.array([3.0, np.inf], np.float32)}))
    assert got.dtype == np.float16
    np.testing.assert_array_equal(got, np.array([1.5, np.inf], np.float16))
    with pytest.raises(BadInputError, match="beyond float16"):
        session.run({"x": np.array([3.0, 1e5], np.float32)})


class Classifier(torch.nn.Module):
    """Channel means of a picture as class scores."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(x.mean((2, 3)), -1)


@pytest.fixture(scope="module", params=["RGB", "BGR"])
def classifier(request: pytest.FixtureRequest, save_package: Any) -> tuple[str, Path]:
    import coremltools as ct

    image = ct.ImageType(
        name="image",
        shape=(1, 3, 5, 6),
        scale=1 / 64,
        bias=[-1.0, 0.5, 0.25],
        color_layout=getattr(ct.colorlayout, request.param),
    )
    path = convert_torch(
        save_package,
        Classifier(),
        [image],
        example=torch.zeros(1, 3, 5, 6),
        compute_precision=ct.precision.FLOAT32,
        classifier_config=ct.ClassifierConfig(["red", "green", "blue"]),
    )
    return request.param, path


def test_pictures_and_labels(classifier: tuple[str, Path]) -> None:
    layout, path = classifier
    session = CoreMLReferenceSession(artifact(path))
    assert session.labels == ("red", "green", "blue")
    picture = RANDOM.integers(0, 256, size=(5, 6, 3)).astype(np.uint8)
    channels = picture.astype(np.float32).transpose(2, 0, 1)
    channels = channels[::-1] if layout == "BGR" else channels
    scaled = torch.from_numpy(channels / 64 + np.array([-1.0, 0.5, 0.25], np.float32).reshape(3, 1, 1))[None]
    expected = Classifier()(scaled).numpy()
    for given in (picture, picture.transpose(2, 0, 1)[None], picture.transpose(2, 0, 1)[None].astype(np.float32)):
        got = session.run({"image": given})
        assert str(got["classLabel"]) == session.labels[int(expected.argmax())]
        np.testing.assert_allclose(got["classLabel_probs"], expected, rtol=1e-5)
    with pytest.raises(BadInputError, match="shape"):
        session.run({"image": picture[:4]})
    with pytest.raises(BadInputError, match="no picture"):
        session.run({"image": channels[None] / 255 - 1})


def rewritten(package: Path, folder: Path, change: Any) -> Path:
    """A copy of a package with another specification."""
    import shutil

    copy = folder / "changed.mlpackage"
    shutil.copytree(package, copy)
    opened = load_package(copy)
    change(opened.spec)
    opened.model_file.write_bytes(opened.spec.SerializeToString())
    return copy


def test_an_unknown_operator_is_named(overflowing: Path, tmp_path: Path) -> None:
    def rename(spec: Any) -> None:
        for operation in spec.mlProgram.functions["main"].block_specializations["CoreML7"].operations:
            if operation.type == "square":
                operation.type = "hypercube"

    changed = rewritten(overflowing, tmp_path, rename)
    with pytest.raises(MeasurementError, match="operator 'hypercube'") as caught:
        CoreMLReferenceSession(artifact(changed))
    assert caught.value.where == "output 'squared' of function 'main', specification version 8, operator set CoreML7"


def test_a_shape_that_the_program_does_not_declare_is_named(overflowing: Path, tmp_path: Path) -> None:
    def widen(spec: Any) -> None:
        for operation in spec.mlProgram.functions["main"].block_specializations["CoreML7"].operations:
            if operation.type == "square":
                operation.outputs[0].type.tensorType.dimensions[1].constant.size = 5

    changed = rewritten(overflowing, tmp_path, widen)
    with pytest.raises(MeasurementError, match=r"'squared' has shape \(1, 4\) where the program declares \(1, 5\)"):
        CoreMLReferenceSession(artifact(changed)).run({"x": np.ones((1, 4), np.float32)})


def test_the_callers_arrays_and_the_file_stay_as_they_are(control: Path) -> None:
    weights = {path: path.read_bytes() for path in control.rglob("*") if path.is_file()}
    x = np.array([3.0], np.float32)
    CoreMLReferenceSession(artifact(control)).run({"x": x})
    assert x[0] == 3.0
    assert weights == {path: path.read_bytes() for path in control.rglob("*") if path.is_file()}


def test_a_value_that_nothing_makes_is_bad_input(overflowing: Path, tmp_path: Path) -> None:
    def rename(spec: Any) -> None:
        for operation in spec.mlProgram.functions["main"].block_specializations["CoreML7"].operations:
            if operation.type == "square":
                operation.inputs["x"].arguments[0].name = "elsewhere"

    changed = rewritten(overflowing, tmp_path, rename)
    with pytest.raises(BadInputError, match="'elsewhere' before it makes it"):
        CoreMLReferenceSession(artifact(changed)).run({"x": np.ones((1, 4), np.float32)})


def test_each_value_is_dropped_once_after_its_last_use(control: Path) -> None:
    body = parse_function(load_package(control)).body
    dropped = [name for step in plan(body) for name in step.last]
    computed = [
        output.name for operation in body.operations if operation.type != "const" for output in operation.outputs
    ]
    assert sorted(dropped) == sorted(set(computed) - set(body.outputs))
