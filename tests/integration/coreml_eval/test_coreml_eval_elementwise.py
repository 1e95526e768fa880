"""Elementwise operators and activations of the evaluator, against MIL's value inference or plain numpy."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from edgeport.runtime.coreml.ops import activation, elementwise

RANDOM = np.random.default_rng(1)
X = RANDOM.normal(size=(2, 3, 4)).astype(np.float32)
Y = RANDOM.normal(size=(3, 1)).astype(np.float32)
POSITIVE = (np.abs(X) + 0.1).astype(np.float32)
UNIT = np.clip(X / 4, -0.99, 0.99).astype(np.float32)
WHOLE = RANDOM.integers(-9, 9, size=(2, 3, 4)).astype(np.int32)
DIVISOR = np.array([[2], [-3], [5]], np.int32)
HALVES = np.array([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 0.3], np.float32)
PICTURE = RANDOM.normal(size=(2, 3, 4, 5)).astype(np.float32)


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


def unary(operator: str, x: np.ndarray, reference: Callable[..., Any] | None = None, **keys: Any) -> dict[str, Any]:
    return case(operator, lambda mb, x: getattr(mb, operator)(x=x), reference, x=x, **keys)


def binary(operator: str, x: np.ndarray, y: np.ndarray, reference: Any = None, **keys: Any) -> dict[str, Any]:
    return case(operator, lambda mb, x, y: getattr(mb, operator)(x=x, y=y), reference, x=x, y=y, **keys)


def logical(operator: str, reference: Callable[..., Any]) -> dict[str, Any]:
    def build(mb: Any, x: Any, y: Any) -> Any:
        return getattr(mb, operator)(x=mb.cast(x=x, dtype="bool"), y=mb.cast(x=y, dtype="bool"))

    return case(operator, build, lambda x, y: reference(x != 0, y != 0), x=WHOLE % 2, y=DIVISOR % 2)


def cast(x: np.ndarray, dtype: str, label: str) -> dict[str, Any]:
    numpy_dtype = {"fp32": np.float32, "fp16": np.float32}.get(dtype, dtype)
    return case("cast", lambda mb, x: mb.cast(x=x, dtype=dtype), lambda x: x.astype(numpy_dtype), label=label, x=x)


def quantized(x: np.ndarray, scale: np.ndarray, zero: np.ndarray, low: int, high: int) -> np.ndarray:
    shape = (1, -1, 1) if scale.ndim else ()
    return np.clip(np.rint(x / scale.reshape(shape)) + zero.reshape(shape), low, high)


SCALES = np.array([0.01, 0.02, 0.05], np.float32)
ZEROS = np.array([0, 3, -7], np.int8)
LONG = np.array([0, 1, 255, 256, 40000, 65535], np.int32)

ELEMENTWISE = [
    *(
        unary(name, X)
        for name in (
            "abs",
            "atan",
            "ceil",
            "cos",
            "cosh",
            "exp",
            "exp2",
            "floor",
            "sign",
            "sin",
            "sinh",
            "square",
            "tan",
            "tanh",
        )
    ),
    *(unary(name, UNIT) for name in ("acos", "asin", "atanh")),
    unary("erf", X, np.vectorize(math.erf)),
    unary("sqrt", POSITIVE),
    unary("round", HALVES),
    unary("abs", WHOLE, label="int"),
    *(
        binary(name, X, Y)
        for name in (
            "add",
            "sub",
            "mul",
            "real_div",
            "maximum",
            "minimum",
            "floor_div",
            "mod",
            "equal",
            "not_equal",
            "greater",
            "greater_equal",
            "less",
            "less_equal",
        )
    ),
    *(
        binary(name, WHOLE, DIVISOR, label="int")
        for name in ("add", "sub", "mul", "maximum", "minimum", "floor_div", "mod", "equal", "less")
    ),
    binary("pow", POSITIVE, Y),
    logical("logical_and", np.logical_and),
    logical("logical_or", np.logical_or),
    logical("logical_xor", np.logical_xor),
    case("logical_not", lambda mb, x: mb.logical_not(x=mb.cast(x=x, dtype="bool")), lambda x: x == 0, x=WHOLE % 2),
    cast(X * 3, "int32", "truncates"),
    cast(WHOLE, "fp32", "to-float"),
    cast(WHOLE, "bool", "to-bool"),
    cast(WHOLE, "int8", "to-int8"),
    cast(LONG, "uint16", "to-uint16"),
    case("clip", lambda mb, x: mb.clip(x=x, alpha=-0.5, beta=0.7), x=X),
    case("threshold", lambda mb, x: mb.threshold(x=x, alpha=0.2), x=X),
    case("inverse", lambda mb, x: mb.inverse(x=x, epsilon=0.25), x=POSITIVE),
    case("inverse", lambda mb, x: mb.inverse(x=x), lambda x: 1 / (x + 1e-4), label="default", x=POSITIVE),
    case("log", lambda mb, x: mb.log(x=x, epsilon=0.25), x=POSITIVE),
    case("rsqrt", lambda mb, x: mb.rsqrt(x=x, epsilon=0.25), x=POSITIVE),
    case("select", lambda mb, x, y: mb.select(cond=mb.greater(x=x, y=0.0), a=x, b=y), x=X, y=X - 1),
    case(
        "quantize",
        lambda mb, x: mb.quantize(input=x, scale=SCALES, zero_point=ZEROS, output_dtype="int8", axis=1),
        lambda x: quantized(x, SCALES, ZEROS, -128, 127),
        label="axis",
        x=X,
    ),
    case(
        "quantize",
        lambda mb, x: mb.quantize(input=x, scale=np.float32(0.02), output_dtype="uint8"),
        lambda x: quantized(x, np.float32(0.02), np.array(0), 0, 255),
        label="tensor",
        x=X,
    ),
    case(
        "dequantize",
        lambda mb, x: mb.dequantize(input=mb.cast(x=x, dtype="int8"), scale=SCALES, zero_point=ZEROS, axis=1),
        lambda x: (x - ZEROS.reshape(1, -1, 1)) * SCALES.reshape(1, -1, 1),
        x=WHOLE,
    ),
]

ALPHA = np.array([0.1, 0.5, 2.0], np.float32)
BETA = np.array([0.3, 1.5, 1.0], np.float32)


def scaled(operator: str) -> dict[str, Any]:
    return case(operator, lambda mb, x: getattr(mb, operator)(x=x, alpha=0.3, beta=0.6), x=X)


ACTIVATION = [
    *(unary(name, X) for name in ("relu", "sigmoid", "softplus", "softsign")),
    unary("relu6", X * 6),
    unary("silu", X, lambda x: x / (1 + np.exp(-x))),
    *(scaled(name) for name in ("clamped_relu", "linear_activation", "scaled_tanh", "sigmoid_hard")),
    case("elu", lambda mb, x: mb.elu(x=x, alpha=0.7), x=X),
    case("leaky_relu", lambda mb, x: mb.leaky_relu(x=x, alpha=0.1), x=X),
    case(
        "thresholded_relu", lambda mb, x: mb.thresholded_relu(x=x, alpha=0.4), lambda x: np.where(x >= 0.4, x, 0), x=X
    ),
    *(
        case("gelu", lambda mb, x, mode=mode: mb.gelu(x=x, mode=mode), label=mode, x=X)
        for mode in ("EXACT", "TANH_APPROXIMATION", "SIGMOID_APPROXIMATION")
    ),
    case(
        "prelu",
        lambda mb, x: mb.prelu(x=x, alpha=ALPHA),
        lambda x: np.where(x > 0, x, ALPHA.reshape(1, 3, 1, 1) * x),
        x=PICTURE,
    ),
    case(
        "softplus_parametric",
        lambda mb, x: mb.softplus_parametric(x=x, alpha=ALPHA, beta=BETA),
        lambda x: ALPHA.reshape(1, 3, 1, 1) * np.log1p(np.exp(BETA.reshape(1, 3, 1, 1) * x)),
        x=PICTURE,
    ),
    case("softmax", lambda mb, x: mb.softmax(x=x, axis=1), x=X),
    case("softmax", lambda mb, x: mb.softmax(x=x), label="default", x=X),
]
CASES = ELEMENTWISE + ACTIVATION


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
        np.testing.assert_allclose(got, expected, rtol=2e-6, atol=2e-6)


def test_every_operator_has_a_case() -> None:
    assert {fields["operator"] for fields in ELEMENTWISE} == set(elementwise.OPERATORS)
    assert {fields["operator"] for fields in ACTIVATION} == set(activation.OPERATORS)
