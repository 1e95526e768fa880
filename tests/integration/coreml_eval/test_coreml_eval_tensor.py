"""Layout and indexing operators of the evaluator, against MIL's value inference, numpy or torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from edgeport.runtime.coreml.ops import indexing, layout

RANDOM = np.random.default_rng(2)
X = RANDOM.normal(size=(2, 3, 4)).astype(np.float32)
Y = RANDOM.normal(size=(2, 3, 4)).astype(np.float32)
SQUARE = RANDOM.normal(size=(2, 5, 5)).astype(np.float32)
PICTURE = RANDOM.normal(size=(2, 8, 4, 6)).astype(np.float32)
TABLE = RANDOM.normal(size=(5, 3)).astype(np.float32)


def case(
    operator: str,
    build: Callable[..., Any],
    reference: Callable[..., Any] | None = None,
    *,
    opset: str = "iOS17",
    label: str = "",
    **inputs: np.ndarray,
) -> dict[str, Any]:
    return {
        "operator": operator,
        "build": build,
        "reference": reference,
        "opset": opset,
        "label": label,
        "inputs": inputs,
    }


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


LAYOUT = [
    case("reshape", lambda mb, x: mb.reshape(x=x, shape=[4, -1]), x=X),
    case(
        "reshape",
        lambda mb, x: mb.reshape(x=x, shape=[0, -1, 0]),
        lambda x: x.reshape(2, 3, 4),
        opset="iOS15",
        label="zeros-ios15",
        x=X,
    ),
    case(
        "reshape",
        lambda mb, x: mb.reshape(x=x, shape=[1, 0, -1, 0]),
        lambda x: x.reshape(1, 1, 2, 12),
        label="zeros-ios17",
        x=X.reshape(2, 12),
    ),
    case(
        "reshape",
        lambda mb, x, s: mb.reshape(x=x, shape=s),
        lambda x, s: x.reshape(s),
        label="runtime-shape",
        x=X,
        s=ints(3, 8),
    ),
    case(
        "reshape_like",
        lambda mb, x, y, z: mb.reshape_like(
            x=x, ref_tensors=[y, z], begins=[0, 1], ends=[1, 0], end_masks=[False, True]
        ),
        lambda x, y, z: x.reshape(2, 3, 4),
        x=X.reshape(4, 6),
        y=RANDOM.normal(size=(2, 9)).astype(np.float32),
        z=Y,
    ),
    case("expand_dims", lambda mb, x: mb.expand_dims(x=x, axes=[-1, 1]), lambda x: x[:, None, :, :, None], x=X),
    case("squeeze", lambda mb, x: mb.squeeze(x=x), lambda x: x.reshape(3, 4), label="all", x=X[:1, :, None]),
    case("squeeze", lambda mb, x: mb.squeeze(x=x, axes=[-2]), lambda x: x[:, :, 0], label="axes", x=X[:1, :, None]),
    case("transpose", lambda mb, x: mb.transpose(x=x, perm=[2, 0, -2]), lambda x: x.transpose(2, 0, 1), x=X),
    case("flatten2d", lambda mb, x: mb.flatten2d(x=x, axis=2), lambda x: x.reshape(6, 4), x=X),
    case("flatten2d", lambda mb, x: mb.flatten2d(x=x, axis=-2), lambda x: x.reshape(2, 12), label="negative", x=X),
    case("shape", lambda mb, x: mb.shape(x=x), x=X),
    case("concat", lambda mb, x, y: mb.concat(values=[x, y], axis=-1), x=X, y=Y),
    case(
        "concat",
        lambda mb, x, y: mb.concat(values=[x, y], axis=1, interleave=True),
        lambda x, y: np.stack([x, y], 2).reshape(2, 6, 4),
        label="interleave",
        x=X,
        y=Y,
    ),
    case("concat", lambda mb, x: mb.concat(values=[x], axis=1), lambda x: x, label="one", x=X),
    case("stack", lambda mb, x, y: mb.stack(values=[x, y], axis=1), lambda x, y: np.stack([x, y], 1), x=X, y=Y),
    case("split", lambda mb, x: mb.split(x=x, num_splits=2, axis=-1), lambda x: np.split(x, 2, -1), label="even", x=X),
    case(
        "split",
        lambda mb, x: mb.split(x=x, split_sizes=[1, 3], axis=2),
        lambda x: np.split(x, [1], 2),
        label="sizes",
        x=X,
    ),
    case("tile", lambda mb, x: mb.tile(x=x, reps=[2, 1, 3]), x=X),
    case(
        "pad",
        lambda mb, x: mb.pad(x=x, pad=[1, 2, 0, 3], constant_val=0.5),
        lambda x: np.pad(x, [(0, 0), (1, 2), (0, 3)], constant_values=0.5),
        label="constant",
        x=X,
    ),
    case(
        "pad",
        lambda mb, x: mb.pad(x=x, pad=[0, 0, 1, 2, 3, 1], mode="reflect"),
        lambda x: np.pad(x, [(0, 0), (1, 2), (3, 1)], mode="reflect"),
        label="reflect",
        x=X,
    ),
    case(
        "pad",
        lambda mb, x: mb.pad(x=x, pad=[1, 2], mode="replicate"),
        lambda x: np.pad(x, [(0, 0), (0, 0), (1, 2)], mode="edge"),
        label="replicate",
        x=X,
    ),
    case("reverse", lambda mb, x: mb.reverse(x=x, axes=[0, 2]), lambda x: x[::-1, :, ::-1], label="axes", x=X),
    case("reverse", lambda mb, x: mb.reverse(x=x), lambda x: x[::-1, ::-1, ::-1], label="all", x=X),
    case(
        "reverse_sequence",
        lambda mb, x, n: mb.reverse_sequence(x=x, lengths=n, seq_axis=2, batch_axis=0),
        lambda x, n: np.stack([np.concatenate([x[b, :, : n[b]][:, ::-1], x[b, :, n[b] :]], 1) for b in (0, 1)]),
        x=X,
        n=ints(3, 2),
    ),
    case(
        "sliding_windows",
        lambda mb, x: mb.sliding_windows(x=x, axis=1, size=3, stride=2),
        lambda x: np.stack([x[:, 0:3], x[:, 2:5]], 1),
        x=SQUARE,
    ),
    case(
        "depth_to_space",
        lambda mb, x: mb.depth_to_space(x=x, block_size=2),
        lambda x: (
            np.stack([[x[:, 4 * i + 2 * j : 4 * i + 2 * j + 2] for j in (0, 1)] for i in (0, 1)])
            .transpose(2, 3, 4, 0, 5, 1)
            .reshape(2, 2, 8, 12)
        ),
        x=PICTURE,
    ),
    case(
        "space_to_depth",
        lambda mb, x: mb.space_to_depth(x=x, block_size=2),
        lambda x: np.concatenate([x[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)], 1),
        x=PICTURE,
    ),
    case(
        "pixel_shuffle",
        lambda mb, x: mb.pixel_shuffle(x=x, upscale_factor=2),
        lambda x: x.reshape(2, 2, 2, 2, 4, 6).transpose(0, 1, 4, 2, 5, 3).reshape(2, 2, 8, 12),
        x=PICTURE,
    ),
    case(
        "pixel_unshuffle",
        lambda mb, x: mb.pixel_unshuffle(x=x, downscale_factor=np.uint32(2)),
        lambda x: np.stack([x[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)], 2).reshape(2, 32, 2, 3),
        x=PICTURE,
    ),
    case("band_part", lambda mb, x: mb.band_part(x=x, lower=1, upper=2), x=SQUARE),
    case("band_part", lambda mb, x: mb.band_part(x=x, lower=0), x=SQUARE, label="upper"),
    case("band_part", lambda mb, x: mb.band_part(x=x, upper=0), x=SQUARE, label="lower"),
    case("fill", lambda mb, s: mb.fill(shape=s, value=2.5), lambda s: np.full(s, 2.5), s=ints(2, 3)),
    case("fill_like", lambda mb, x: mb.fill_like(ref_tensor=x, value=7), lambda x: np.full(x.shape, 7), x=X),
    case(
        "range_1d",
        lambda mb, n: mb.range_1d(start=2, end=mb.squeeze(x=n), step=3),
        lambda n: np.arange(2, n[0], 3),
        label="int",
        n=ints(12),
    ),
    case(
        "range_1d",
        lambda mb, x: mb.range_1d(start=0.5, end=mb.squeeze(x=x), step=0.25),
        lambda x: np.arange(0.5, x[0], 0.25),
        label="float",
        x=np.array([2.1], np.float32),
    ),
    case(
        "one_hot", lambda mb, i: mb.one_hot(indices=i, one_hot_vector_size=4), lambda i: np.eye(4)[i], i=ints(3, 0, 2)
    ),
    case(
        "one_hot",
        lambda mb, i: mb.one_hot(indices=i, one_hot_vector_size=4, axis=0, on_value=5.0, off_value=-1.0),
        lambda i: (np.eye(4)[i] * 6 - 1).T,
        label="values",
        i=ints(3, 0, 2),
    ),
    case("identity", lambda mb, x: mb.identity(x=x), lambda x: x, x=X),
]

TOKENS = RANDOM.integers(0, 5, size=(2, 3)).astype(np.int32)
PLACES = RANDOM.integers(0, 4, size=(2, 3, 4)).astype(np.int32)
PAIRS = np.array([[[0, 2], [1, 0]], [[1, 1], [0, 0]]], np.int32)


def scattered(mode: str, data: np.ndarray, index: Any, updates: np.ndarray) -> np.ndarray:
    functions = {
        "add": np.add,
        "sub": np.subtract,
        "mul": np.multiply,
        "div": np.divide,
        "max": np.maximum,
        "min": np.minimum,
    }
    out = data.copy()
    if mode == "update":
        out[index] = updates
    else:
        functions[mode].at(out, index, updates)
    return out


def scatter_nd(mode: str, opset: str) -> dict[str, Any]:
    indices = np.array([[0], [3], [0]] if mode != "update" else [[0], [3], [1]], np.int32)
    return case(
        "scatter_nd",
        lambda mb, d, i, u: mb.scatter_nd(data=d, indices=i, updates=u, mode=mode),
        lambda d, i, u: scattered(mode, d, i[:, 0], u),
        opset=opset,
        label=f"{mode}-{opset}",
        d=TABLE,
        i=indices,
        u=RANDOM.uniform(0.5, 2, size=(3, 3)).astype(np.float32),
    )


def along(mode: str) -> dict[str, Any]:
    grid = np.indices((2, 3, 4))
    indices = np.stack([RANDOM.permutation(4) for _ in range(6)]).reshape(2, 3, 4).astype(np.int32)
    return case(
        "scatter_along_axis",
        lambda mb, d, i, u: mb.scatter_along_axis(data=d, indices=i, updates=u, axis=-1, mode=mode),
        lambda d, i, u: scattered(mode, d, (grid[0], grid[1], i), u),
        label=mode,
        d=X,
        i=indices,
        u=Y + 3,
    )


INDEXING = [
    case("slice_by_index", lambda mb, x: mb.slice_by_index(x=x, begin=[0, 1, 0], end=[2, 3, 4], stride=[1, 1, 2]), x=X),
    case(
        "slice_by_index",
        lambda mb, x: mb.slice_by_index(
            x=x,
            begin=[0, -1, 3],
            end=[0, 0, 0],
            stride=[1, -1, -2],
            begin_mask=[True, False, False],
            end_mask=[True, True, False],
        ),
        lambda x: x[:, ::-1, 3:0:-2],
        label="backwards",
        x=X,
    ),
    case(
        "slice_by_index",
        lambda mb, x: mb.slice_by_index(
            x=x,
            begin=[1, 0, -2],
            end=[2, 0, -1],
            begin_mask=[False, True, False],
            end_mask=[False, True, False],
            squeeze_mask=[True, False, True],
        ),
        lambda x: x[1, :, -2],
        label="squeeze",
        x=X,
    ),
    case(
        "slice_by_index",
        lambda mb, x: mb.slice_by_index(x=x, begin=[0, 0, -1], end=[2, 3, 0], end_mask=[False, False, True]),
        lambda x: x[:, :, -1:],
        label="last",
        x=X,
    ),
    case(
        "slice_by_index",
        lambda mb, x, b, e: mb.slice_by_index(x=x, begin=b, end=e),
        lambda x, b, e: x[:1, 1:, 2:4],
        label="runtime-bounds",
        x=X,
        b=ints(0, 1, 2),
        e=ints(1, 9, 4),
    ),
    case("slice_by_size", lambda mb, x: mb.slice_by_size(x=x, begin=[1, 0, 1], size=[1, -1, 2]), x=X),
    case(
        "slice_update",
        lambda mb, x, u: mb.slice_update(x=x, update=u, begin=[0, 1, 0], end=[2, 3, 4], stride=[1, 1, 2]),
        lambda x, u: scattered("update", x, np.s_[:, 1:3, ::2], u),
        opset="iOS18",
        x=X,
        u=Y[:, :2, :2],
    ),
    case(
        "slice_update",
        lambda mb, x, u: mb.slice_update(
            x=x, update=u, begin=[1, 0, 3], end=[2, 3, 0], stride=[1, 1, -1], squeeze_mask=[True, False, False]
        ),
        lambda x, u: scattered("update", x, np.s_[1, :, 3:0:-1], u),
        opset="iOS18",
        label="squeeze-backwards",
        x=X,
        u=Y[0, :, :3],
    ),
    case("gather", lambda mb, x, i: mb.gather(x=x, indices=i, axis=0), lambda x, i: x[i], x=TABLE, i=TOKENS),
    case(
        "gather",
        lambda mb, x, i: mb.gather(x=x, indices=mb.cast(x=i, dtype="uint16"), axis=1),
        lambda x, i: x[:, i],
        label="uint16-axis1",
        x=SQUARE,
        i=TOKENS,
    ),
    case(
        "gather",
        lambda mb, x, i: mb.gather(x=x, indices=i, axis=-1),
        lambda x, i: x[..., i],
        opset="iOS15",
        label="negative-ios15",
        x=TABLE,
        i=ints(-1, 0, -3),
    ),
    case(
        "gather",
        lambda mb, x, i: mb.gather(x=x, indices=mb.squeeze(x=i), axis=1),
        lambda x, i: x[:, i[0]],
        label="scalar",
        x=SQUARE,
        i=ints(3),
    ),
    case(
        "gather",
        lambda mb, x, i: mb.gather(x=x, indices=i, axis=1, batch_dims=1),
        lambda x, i: np.stack([x[0, i[0]], x[1, i[1]]]),
        label="batch",
        x=SQUARE,
        i=TOKENS,
    ),
    case(
        "gather_along_axis",
        lambda mb, x, i: mb.gather_along_axis(x=x, indices=i, axis=2),
        lambda x, i: np.take_along_axis(x, i, 2),
        x=X,
        i=PLACES,
    ),
    case(
        "gather_nd", lambda mb, x, i: mb.gather_nd(x=x, indices=i), lambda x, i: x[i[..., 0], i[..., 1]], x=X, i=PAIRS
    ),
    case(
        "gather_nd",
        lambda mb, x, i: mb.gather_nd(x=x, indices=i, batch_dims=1),
        lambda x, i: np.stack([x[b][i[b, :, 0], i[b, :, 1]] for b in (0, 1)]),
        label="batch",
        x=SQUARE,
        i=PAIRS,
    ),
    case("non_zero", lambda mb, x: mb.non_zero(x=x), lambda x: np.argwhere(x != 0), x=np.maximum(X, 0)),
    *(scatter_nd(mode, "iOS17") for mode in ("update", "add", "sub", "mul", "div", "max", "min")),
    scatter_nd("add", "iOS15"),
    case(
        "scatter",
        lambda mb, d, i, u: mb.scatter(data=d, indices=i, updates=u, axis=1, mode="add"),
        lambda d, i, u: scattered("add", d, np.s_[:, i], u),
        d=TABLE,
        i=ints(2, 0, 2),
        u=RANDOM.normal(size=(5, 3)).astype(np.float32),
    ),
    case(
        "scatter",
        lambda mb, d, i, u: mb.scatter(data=d, indices=i, updates=u, axis=0, mode="update"),
        lambda d, i, u: scattered("update", d, i, u),
        label="update",
        opset="iOS15",
        d=TABLE,
        i=ints(-1, 0),
        u=TABLE[2:4],
    ),
    *(along(mode) for mode in ("update", "add", "max")),
]
CASES = LAYOUT + INDEXING


def name_of(fields: dict[str, Any]) -> str:
    return f"{fields['operator']}-{fields['label']}" if fields["label"] else fields["operator"]


@pytest.fixture(scope="module")
def outcomes(run_cases: Any) -> Any:
    return run_cases(CASES)


@pytest.mark.parametrize("name", [name_of(fields) for fields in CASES])
def test_operator(name: str, outcomes: Any) -> None:
    outcome = outcomes[name]
    for got, expected in zip(outcome.got, outcome.expected, strict=True):
        assert got.shape == expected.shape
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)


def test_every_operator_has_a_case() -> None:
    assert {fields["operator"] for fields in LAYOUT} == set(layout.OPERATORS)
    assert {fields["operator"] for fields in INDEXING} == set(indexing.OPERATORS)


@pytest.mark.parametrize("index", [-1, 5])
def test_an_index_without_defined_result_is_refused(index: int) -> None:
    """iOS 17 leaves the result of such an index open, so no evidence may rest on one."""
    places = torch.tensor([0, index])
    with pytest.raises(IndexError, match="outside its axis"):
        indexing.gather(torch.zeros(5, 3), places, validate_indices=False)
    with pytest.raises(IndexError, match="outside its axis"):
        indexing.scatter(torch.zeros(5, 3), places, torch.zeros(2, 3), validate_indices=False)
