"""Layers of the evaluator (products, convolutions, pools, norms, reductions, resizing, recurrence) against torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from edgeport.runtime.coreml.ops import conv, image, linear, normalization, recurrent, reduction

RANDOM = np.random.default_rng(3)


def floats(*shape: int) -> np.ndarray:
    return RANDOM.normal(size=shape).astype(np.float32)


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


def by_torch(function: Callable[..., Any]) -> Callable[..., Any]:
    def reference(*arrays: np.ndarray) -> Any:
        result = function(*(torch.from_numpy(array) for array in arrays))
        return tuple(item.numpy() for item in result) if isinstance(result, tuple) else result.numpy()

    return reference


SEQUENCE, PICTURE, VOLUME = floats(2, 4, 9), floats(2, 4, 7, 8), floats(1, 2, 5, 6, 4)
MATRIX, BIAS = floats(6, 4), floats(6)
Q, K, V = floats(2, 3, 5, 8), floats(2, 3, 7, 8), floats(2, 3, 7, 4)
MASK = floats(1, 1, 5, 7)
ALLOWED = (RANDOM.random((1, 1, 5, 7)) > 0.3).astype(np.int32)
ALLOWED[..., 0] = 1

LINEAR = [
    case(
        "linear",
        lambda mb, x: mb.linear(x=x, weight=MATRIX, bias=BIAS),
        lambda x: x @ MATRIX.T + BIAS,
        x=floats(2, 3, 4),
    ),
    case(
        "linear", lambda mb, x: mb.linear(x=x, weight=MATRIX), lambda x: x @ MATRIX.T, label="no-bias", x=floats(3, 4)
    ),
    case("matmul", lambda mb, x, y: mb.matmul(x=x, y=y), np.matmul, x=floats(2, 1, 3, 4), y=floats(5, 4, 6)),
    case(
        "matmul",
        lambda mb, x, y: mb.matmul(x=x, y=y, transpose_x=True, transpose_y=True),
        lambda x, y: np.matmul(x.swapaxes(1, 2), y.T),
        label="transposed",
        x=floats(2, 4, 3),
        y=floats(6, 4),
    ),
    case(
        "einsum",
        lambda mb, x, y: mb.einsum(values=[x, y], equation="nchw,nwhu->nchu"),
        lambda x, y: np.einsum("nchw,nwhu->nchu", x, y),
        x=floats(2, 3, 4, 5),
        y=floats(2, 5, 4, 6),
    ),
    case(
        "scaled_dot_product_attention",
        lambda mb, q, k, v: mb.scaled_dot_product_attention(query=q, key=k, value=v),
        by_torch(lambda q, k, v: torch.softmax(q @ k.transpose(-1, -2) / 8**0.5, -1) @ v),
        opset="iOS18",
        q=Q,
        k=K,
        v=V,
    ),
    case(
        "scaled_dot_product_attention",
        lambda mb, q, k, v, m: mb.scaled_dot_product_attention(query=q, key=k, value=v, attn_mask=m),
        by_torch(lambda q, k, v, m: torch.softmax(q @ k.transpose(-1, -2) / 8**0.5 + m, -1) @ v),
        opset="iOS18",
        label="mask",
        q=Q,
        k=K,
        v=V,
        m=MASK,
    ),
    case(
        "scaled_dot_product_attention",
        lambda mb, q, k, v, m: mb.scaled_dot_product_attention(
            query=q, key=k, value=v, attn_mask=mb.cast(x=m, dtype="bool")
        ),
        by_torch(
            lambda q, k, v, m: torch.softmax((q @ k.transpose(-1, -2) / 8**0.5).masked_fill(m == 0, -torch.inf), -1) @ v
        ),
        opset="iOS18",
        label="bool-mask",
        q=Q,
        k=K,
        v=V,
        m=ALLOWED,
    ),
]


def convolution(label: str, x: np.ndarray, weight: np.ndarray, reference: Callable[..., Any], **options: Any) -> Any:
    return case(
        "conv",
        lambda mb, x: mb.conv(x=x, weight=weight, **options),
        by_torch(lambda x: reference(x, torch.from_numpy(weight))),
        label=label,
        x=x,
    )


def transposed(label: str, x: np.ndarray, weight: np.ndarray, reference: Callable[..., Any], **options: Any) -> Any:
    return case(
        "conv_transpose",
        lambda mb, x: mb.conv_transpose(x=x, weight=weight, **options),
        by_torch(lambda x: reference(x, torch.from_numpy(weight))),
        label=label,
        x=x,
    )


def pooling(operator: str, label: str, x: np.ndarray, reference: Callable[..., Any], **options: Any) -> Any:
    return case(operator, lambda mb, x: getattr(mb, operator)(x=x, **options), by_torch(reference), label=label, x=x)


W1, W2, W3, DEPTHWISE, GROUPED = (
    floats(6, 4, 3),
    floats(6, 4, 3, 2),
    floats(3, 2, 2, 3, 2),
    floats(4, 1, 3, 3),
    floats(6, 2, 3, 3),
)
T2 = floats(4, 3, 3, 2)
TB = floats(3)

CONV = [
    convolution("1d", SEQUENCE, W1, lambda x, w: functional.conv1d(x, w), pad_type="valid"),
    convolution(
        "2d-bias",
        PICTURE,
        W2,
        lambda x, w: functional.conv2d(x, w, torch.from_numpy(BIAS), stride=(2, 1)),
        bias=BIAS,
        strides=[2, 1],
        pad_type="valid",
    ),
    convolution("3d", VOLUME, W3, lambda x, w: functional.conv3d(x, w), pad_type="valid"),
    convolution(
        "custom-pad",
        PICTURE,
        W2,
        lambda x, w: functional.conv2d(functional.pad(x, (2, 1, 0, 3)), w, dilation=2),
        pad_type="custom",
        pad=[0, 3, 2, 1],
        dilations=[2, 2],
    ),
    convolution(
        "same",
        PICTURE,
        W2,  # 7 -> ceil(7/2) rows, 8 -> 8 columns: pads 1+1 and 0+1
        lambda x, w: functional.conv2d(functional.pad(x, (0, 1, 1, 1)), w, stride=(2, 1)),
        pad_type="same",
        strides=[2, 1],
    ),
    convolution(
        "same-lower",
        PICTURE,
        W2,
        lambda x, w: functional.conv2d(functional.pad(x, (1, 0, 1, 1)), w, stride=(2, 1)),
        pad_type="same_lower",
        strides=[2, 1],
    ),
    convolution(
        "depthwise",
        PICTURE,
        DEPTHWISE,
        lambda x, w: functional.conv2d(x, w, padding=1, groups=4),
        pad_type="custom",
        pad=[1, 1, 1, 1],
        groups=4,
    ),
    convolution("groups", PICTURE, GROUPED, lambda x, w: functional.conv2d(x, w, groups=2), pad_type="valid", groups=2),
    transposed("1d", SEQUENCE, floats(4, 3, 3), lambda x, w: functional.conv_transpose1d(x, w, stride=2), strides=[2]),
    transposed(
        "2d-pad",
        PICTURE,
        T2,
        lambda x, w: functional.conv_transpose2d(x, w, torch.from_numpy(TB), stride=2)[:, :, 1:-2, 0:-1],
        bias=TB,
        strides=[2, 2],
        pad_type="custom",
        pad=[1, 2, 0, 1],
    ),
    transposed(
        "output-shape",
        PICTURE,
        T2,
        lambda x, w: functional.conv_transpose2d(x, w, stride=2, padding=1, output_padding=1),
        strides=[2, 2],
        pad_type="custom",
        pad=[1, 1, 1, 1],
        output_shape=[2, 3, 14, 15],
    ),
    transposed(
        "groups",
        PICTURE,
        floats(4, 2, 2, 2),
        lambda x, w: functional.conv_transpose2d(x, w, groups=2, dilation=2),
        dilations=[2, 2],
        groups=2,
    ),
    transposed(
        "same",
        PICTURE,
        floats(4, 3, 3, 3),
        lambda x, w: functional.conv_transpose2d(x, w, stride=2)[:, :, :14, :16],
        strides=[2, 2],
        pad_type="same",
    ),
    pooling(
        "max_pool",
        "valid",
        PICTURE,
        lambda x: functional.max_pool2d(x, 3, 2),
        kernel_sizes=[3, 3],
        strides=[2, 2],
        pad_type="valid",
    ),
    pooling(
        "max_pool",
        "pad-ceil",
        PICTURE - 5,
        lambda x: functional.max_pool2d(x, 3, 2, 1, ceil_mode=True),
        kernel_sizes=[3, 3],
        strides=[2, 2],
        pad_type="custom",
        pad=[1, 1, 1, 1],
        ceil_mode=True,
    ),
    pooling(
        "max_pool",
        "1d",
        SEQUENCE,
        lambda x: functional.max_pool1d(x, 2),
        kernel_sizes=[2],
        strides=[2],
        pad_type="valid",
    ),
    pooling(
        "avg_pool",
        "include",
        PICTURE,
        lambda x: functional.avg_pool2d(x, 3, 2, 1),
        kernel_sizes=[3, 3],
        strides=[2, 2],
        pad_type="custom",
        pad=[1, 1, 1, 1],
    ),
    pooling(
        "avg_pool",
        "exclude",
        PICTURE,
        lambda x: functional.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
        kernel_sizes=[3, 3],
        strides=[2, 2],
        pad_type="custom",
        pad=[1, 1, 1, 1],
        exclude_padding_from_average=True,
    ),
    pooling(
        "avg_pool",
        "ceil",
        PICTURE,
        lambda x: functional.avg_pool2d(x, 3, 2, 1, ceil_mode=True),
        kernel_sizes=[3, 3],
        strides=[2, 2],
        pad_type="custom",
        pad=[1, 1, 1, 1],
        ceil_mode=True,
    ),
    pooling(
        "avg_pool", "3d", VOLUME, lambda x: functional.avg_pool3d(x, 2, 1), kernel_sizes=[2, 2, 2], pad_type="valid"
    ),
    pooling(
        "avg_pool",
        "same",
        PICTURE,
        lambda x: functional.avg_pool2d(functional.pad(x, (0, 1, 0, 1)), 2, 1, divisor_override=4),
        kernel_sizes=[2, 2],
        pad_type="same",
    ),
    pooling(
        "l2_pool",
        "",
        PICTURE,
        lambda x: torch.sqrt(functional.avg_pool2d(x * x, 2, 1) * 4),
        kernel_sizes=[2, 2],
        pad_type="valid",
    ),
]

MEAN, VARIANCE, GAMMA, BETA = floats(4), np.abs(floats(4)) + 0.1, floats(4), floats(4)
G2, B2 = floats(7, 8), floats(7, 8)


def tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array)


NORMALIZATION = [
    case(
        "batch_norm",
        lambda mb, x: mb.batch_norm(x=x, mean=MEAN, variance=VARIANCE, gamma=GAMMA, beta=BETA, epsilon=1e-3),
        by_torch(
            lambda x: functional.batch_norm(x, tensor(MEAN), tensor(VARIANCE), tensor(GAMMA), tensor(BETA), eps=1e-3)
        ),
        x=PICTURE,
    ),
    case(
        "instance_norm",
        lambda mb, x: mb.instance_norm(x=x, gamma=GAMMA, beta=BETA, epsilon=1e-3),
        by_torch(lambda x: functional.instance_norm(x, weight=tensor(GAMMA), bias=tensor(BETA), eps=1e-3)),
        x=PICTURE,
    ),
    case(
        "instance_norm",
        lambda mb, x: mb.instance_norm(x=x),
        by_torch(lambda x: functional.instance_norm(x)),
        label="1d",
        x=SEQUENCE,
    ),
    case(
        "layer_norm",
        lambda mb, x: mb.layer_norm(x=x, axes=[-2, -1], gamma=G2, beta=B2, epsilon=1e-3),
        by_torch(lambda x: functional.layer_norm(x, (7, 8), tensor(G2), tensor(B2), 1e-3)),
        x=PICTURE,
    ),
    case(
        "layer_norm",
        lambda mb, x: mb.layer_norm(x=x, axes=[1], gamma=GAMMA),
        by_torch(lambda x: functional.layer_norm(x.movedim(1, -1), (4,), tensor(GAMMA)).movedim(-1, 1)),
        label="axis1",
        x=PICTURE,
    ),
    case(
        "l2_norm",
        lambda mb, x: mb.l2_norm(x=x, epsilon=0.5),
        lambda x: x / np.sqrt((x**2).sum((1, 2, 3), keepdims=True) + 0.5),
        x=PICTURE,
    ),
]


def reduced(operator: str, x: np.ndarray, **options: Any) -> dict[str, Any]:
    label = "-".join(str(value) for value in options.values())
    return case(operator, lambda mb, x: getattr(mb, operator)(x=x, **options), label=label, x=x)


X = floats(2, 3, 4)
REDUCTION = [
    *(
        reduced(name, X, axes=[0, -1])
        for name in (
            "reduce_l1_norm",
            "reduce_l2_norm",
            "reduce_max",
            "reduce_mean",
            "reduce_min",
            "reduce_prod",
            "reduce_sum",
            "reduce_sum_square",
            "reduce_log_sum_exp",
        )
    ),
    reduced("reduce_log_sum", np.abs(X) + 0.1, axes=[1]),
    reduced("reduce_sum", X, axes=[1], keep_dims=True),
    reduced("reduce_prod", X, axes=[0, 2], keep_dims=True),
    case("reduce_mean", lambda mb, x: mb.reduce_mean(x=x), lambda x: x.mean(), label="all", x=X),
    case("reduce_argmax", lambda mb, x: mb.reduce_argmax(x=x, axis=1), lambda x: x.argmax(1), x=X),
    case(
        "reduce_argmin",
        lambda mb, x: mb.reduce_argmin(x=x, axis=-1, keep_dims=True),
        lambda x: x.argmin(-1)[..., None],
        x=X,
    ),
    case("argsort", lambda mb, x: mb.argsort(x=x, axis=1), lambda x: np.argsort(-x, 1), x=X),
    case("argsort", lambda mb, x: mb.argsort(x=x, ascending=True), lambda x: np.argsort(x, -1), label="ascending", x=X),
    case(
        "topk",
        lambda mb, x: mb.topk(x=x, k=2, axis=1),
        lambda x: (-np.sort(-x, 1)[:, :2], np.argsort(-x, 1)[:, :2]),
        x=X,
    ),
    case(
        "topk",
        lambda mb, x: mb.topk(x=x, k=3, ascending=True, return_indices=False),
        lambda x: np.sort(x, -1)[..., :3],
        label="ascending",
        x=X,
    ),
    case("cumsum", lambda mb, x: mb.cumsum(x=x, axis=1), lambda x: np.cumsum(x, 1), x=X),
    case(
        "cumsum",
        lambda mb, x: mb.cumsum(x=x, axis=2, exclusive=True, reverse=True),
        lambda x: np.stack([x[..., 1:].sum(-1), x[..., 2:].sum(-1), x[..., 3], 0 * x[..., 0]], -1),
        label="exclusive-reverse",
        x=X,
    ),
]


def bilinear(mode: str, corners: bool) -> dict[str, Any]:
    return case(
        "resize_bilinear",
        lambda mb, x: mb.resize_bilinear(x=x, target_size_height=10, target_size_width=5, sampling_mode=mode),
        by_torch(lambda x: functional.interpolate(x, (10, 5), mode="bilinear", align_corners=corners)),
        label=mode,
        x=PICTURE,
    )


GRID = np.clip(floats(2, 3, 5, 2), -1.4, 1.4)
# The example of coremltools' documentation: two pixels, values 0 and 1, sampled at six places.
PAIR = np.array([[[[0.0, 1.0]]]], np.float32)
IMAGE = [
    bilinear("STRICT_ALIGN_CORNERS", True),
    bilinear("UNALIGN_CORNERS", False),
    *(
        case(
            "resize_bilinear",
            lambda mb, x, mode=mode: mb.resize_bilinear(
                x=x, target_size_height=1, target_size_width=6, sampling_mode=mode
            ),
            lambda x, values=values: np.array(values).reshape(1, 1, 1, 6),
            label=f"documented-{mode}",
            x=PAIR,
        )
        for mode, values in {
            "DEFAULT": [0, 1 / 3, 2 / 3, 1, 1, 1],
            "OFFSET_CORNERS": [1 / 12, 3 / 12, 5 / 12, 7 / 12, 9 / 12, 11 / 12],
            "ALIGN_CORNERS": [0, 0.2, 0.4, 0.6, 0.8, 1],
        }.items()
    ),
    case(
        "resize_nearest_neighbor",
        lambda mb, x: mb.resize_nearest_neighbor(x=x, target_size_height=3, target_size_width=12),
        by_torch(lambda x: functional.interpolate(x, (3, 12), mode="nearest")),
        x=PICTURE,
    ),
    case(
        "upsample_bilinear",
        lambda mb, x: mb.upsample_bilinear(x=x, scale_factor_height=2, scale_factor_width=3, align_corners=False),
        by_torch(lambda x: functional.interpolate(x, (14, 24), mode="bilinear", align_corners=False)),
        x=PICTURE,
    ),
    case(
        "upsample_bilinear",
        lambda mb, x: mb.upsample_bilinear(x=x, scale_factor_height=2, scale_factor_width=2),
        by_torch(lambda x: functional.interpolate(x, (14, 16), mode="bilinear", align_corners=True)),
        label="corners",
        x=PICTURE,
    ),
    case(
        "upsample_nearest_neighbor",
        lambda mb, x: mb.upsample_nearest_neighbor(x=x, scale_factor_height=2, scale_factor_width=3),
        by_torch(lambda x: functional.interpolate(x, (14, 24), mode="nearest")),
        x=PICTURE,
    ),
    case(
        "resize",
        lambda mb, x: mb.resize(x=x, shape=[10, 0], resized_dims=np.uint32(2), sampling_mode="UNALIGN_CORNERS"),
        by_torch(lambda x: functional.interpolate(x, (10, 8), mode="bilinear", align_corners=False)),
        x=PICTURE,
    ),
    case(
        "resize",
        lambda mb, x: mb.resize(x=x, shape=[5, 11], resized_dims=np.uint32(2), interpolation_mode="NEAREST_NEIGHBOR"),
        by_torch(lambda x: functional.interpolate(x, (5, 11), mode="nearest")),
        label="nearest",
        x=PICTURE,
    ),
    case(
        "crop",
        lambda mb, x: mb.crop(x=x, crop_height=[1, 2], crop_width=[0, 3]),
        lambda x: x[:, :, 1:-2, :-3],
        x=PICTURE,
    ),
    *(
        case(
            "resample",
            lambda mb, x, g, mode=mode, padding=padding: mb.resample(
                x=x,
                coordinates=g,
                sampling_mode=mode,
                padding_mode=padding,
                padding_value=0.0,
                coordinates_mode="normalized_minus_one_to_one",
                align_corners=True,
            ),
            by_torch(
                lambda x, g, mode=mode, padding=padding: functional.grid_sample(
                    x, g, mode, {"constant": "zeros"}.get(padding, padding), align_corners=True
                )
            ),
            label=f"{mode}-{padding}",
            x=PICTURE,
            g=GRID,
        )
        for mode, padding in (("bilinear", "constant"), ("bilinear", "border"), ("nearest", "reflection"))
    ),
]


def lstm_case(direction: str, output_sequence: bool) -> dict[str, Any]:
    """torch keeps its gates in the order input, forget, cell, output: MIL's last two change places."""
    both = direction == "bidirectional"
    torch.manual_seed(0)
    layer = torch.nn.LSTM(4, 5, bidirectional=both)
    order = torch.cat([torch.arange(0, 10), torch.arange(15, 20), torch.arange(10, 15)])

    def weights(suffix: str) -> list[np.ndarray]:
        named = dict(layer.named_parameters())
        bias = named[f"bias_ih_l0{suffix}"] + named[f"bias_hh_l0{suffix}"]
        tensors = (named[f"weight_ih_l0{suffix}"], named[f"weight_hh_l0{suffix}"], bias)
        return [value[order].detach().numpy() for value in tensors]

    ih, hh, bias = weights("")
    options: dict[str, Any] = {"weight_ih": ih, "weight_hh": hh, "bias": bias, "direction": direction}
    if both:
        options |= dict(zip(("weight_ih_back", "weight_hh_back", "bias_back"), weights("_reverse"), strict=True))

    def reference(x: torch.Tensor, h: torch.Tensor, c: torch.Tensor) -> tuple[torch.Tensor, ...]:
        size = 2 if both else 1
        split = [value.reshape(3, size, 5).transpose(0, 1).contiguous() for value in (h, c)]
        with torch.no_grad():
            out, (hn, cn) = layer(x.flip(0) if direction == "reverse" else x, tuple(split))
        if direction == "reverse":
            out = out.flip(0)
        hn, cn = (value.transpose(0, 1).reshape(3, -1) for value in (hn, cn))
        return (out if output_sequence else hn[None]), hn, cn

    width = 10 if both else 5
    return case(
        "lstm",
        lambda mb, x, h, c: mb.lstm(x=x, initial_h=h, initial_c=c, output_sequence=output_sequence, **options),
        by_torch(reference),
        label=f"{direction}-{output_sequence}",
        x=floats(6, 3, 4),
        h=floats(3, width),
        c=floats(3, width),
    )


RECURRENT = [
    lstm_case("forward", True),
    lstm_case("forward", False),
    lstm_case("reverse", True),
    lstm_case("bidirectional", True),
]

TOPICS = [
    (LINEAR, linear),
    (CONV, conv),
    (NORMALIZATION, normalization),
    (REDUCTION, reduction),
    (IMAGE, image),
    (RECURRENT, recurrent),
]
CASES = [fields for cases, _ in TOPICS for fields in cases]


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
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("cases", "module"), TOPICS, ids=[module.__name__.rpartition(".")[2] for _, module in TOPICS])
def test_every_operator_has_a_case(cases: list[dict[str, Any]], module: Any) -> None:
    assert {fields["operator"] for fields in cases} == set(module.OPERATORS)


def test_topk_of_minus_one_takes_all() -> None:
    """coremltools 9 can't save such a program; the operator's definition has it."""
    values, indices = reduction.topk(torch.from_numpy(X), k=-1, axis=1)
    np.testing.assert_array_equal(values.numpy(), -np.sort(-X, 1))
    np.testing.assert_array_equal(indices.numpy(), np.argsort(-X, 1))
