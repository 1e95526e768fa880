"""coremltools, imported when needed and without its harmless lines.

Importing it takes some ten seconds and prints that native libraries are missing (they exist on macOS only),
that torch is newer than it was tested with, and progress bars for each pass. Everything else it says is kept:
records of warning level and above are collected, so that a refusal can name the operator they speak of.
"""

from __future__ import annotations

import contextlib
import logging
import re
import warnings
from collections.abc import Iterator
from importlib import import_module
from types import ModuleType
from typing import Any

from edgeport.errors import BadInputError
from edgeport.export.coreml.states import conversions

NOISY_LOGGERS = ("coremltools", "torchao", "torch.utils._pytree", "torch.export", "transformers")


class _Collect(logging.Handler):
    """Keeps the text of each record."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage().strip())


@contextlib.contextmanager
def quiet() -> Iterator[list[str]]:
    """Keep warnings and log lines of the exporters off the terminal; yields the list that collects the log lines."""
    collect = _Collect()
    loggers = [logging.getLogger(name) for name in NOISY_LOGGERS]
    before = [(logger.propagate, list(logger.handlers)) for logger in loggers]
    for logger in loggers:
        logger.propagate = False
        logger.handlers = [collect]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield collect.lines
    finally:
        for logger, (propagate, handlers) in zip(loggers, before, strict=True):
            logger.propagate, logger.handlers = propagate, handlers


@contextlib.contextmanager
def without_progress_bars() -> Iterator[None]:
    """Keep coremltools from drawing a bar for each stage: it gives `tqdm` no way to be told."""
    modules = [
        (import_module("coremltools.converters.mil.mil.passes.pass_pipeline"), "tqdm"),
        (import_module("coremltools.converters.mil.frontend.torch.ops"), "_tqdm"),
    ]
    saved = [(module, name, getattr(module, name)) for module, name in modules]
    try:
        for module, name, _ in saved:
            setattr(module, name, lambda items, **_: items)
        yield
    finally:
        for module, name, original in saved:
            setattr(module, name, original)


@contextlib.contextmanager
def other_outputs_beside_classes() -> Iterator[None]:
    """Let a classifier keep further outputs, such as its logits.

    coremltools 9.0 looks the type of each output up by its position, but `classify` puts two outputs (label and
    probabilities) in the place of one: with a further output the list of types is one short.
    """
    load: Any = import_module("coremltools.converters.mil.backend.mil.load")
    original = load._add_classify_op

    def add_classify(program: Any, config: Any) -> Any:
        names = original(program, config)
        function = program.functions["main"]
        function.output_types = [*function.output_types, function.output_types[-1]]
        return names

    load._add_classify_op = add_classify
    try:
        yield
    finally:
        load._add_classify_op = original


@contextlib.contextmanager
def whole_number_division() -> Iterator[None]:
    """Let `//` of integers give integers.

    coremltools 9.0 casts the quotient to float32, which torch does not, and then refuses a shape computed with it
    (the frames that a speech encoder's convolutions make of samples).
    """
    ops: Any = import_module("coremltools.converters.mil.frontend.torch.ops")
    registry: Any = import_module("coremltools.converters.mil.frontend.torch.torch_op_registry")._TORCH_OPS_REGISTRY

    def floor_divide(context: Any, node: Any) -> None:
        x, y = ops.promote_input_dtypes(ops._get_inputs(context, node, expected=2))
        context.add(ops.mb.floor_div(x=x, y=y, name=node.name))

    names = ("floor_divide", "floordiv")
    originals = {name: registry.name_to_func_mapping[name] for name in names}
    try:
        registry.name_to_func_mapping.update(dict.fromkeys(names, floor_divide))
        yield
    finally:
        registry.name_to_func_mapping.update(originals)


@contextlib.contextmanager
def gelu_as_asked() -> Iterator[None]:
    """Let GELU by a tanh (Gemma, SigLIP) be one: coremltools 9.0 does not read the argument of an exported program."""
    ops: Any = import_module("coremltools.converters.mil.frontend.torch.ops")
    registry: Any = import_module("coremltools.converters.mil.frontend.torch.torch_op_registry")._TORCH_OPS_REGISTRY

    def gelu(context: Any, node: Any) -> None:
        by_tanh = "tanh" in (node.kwinputs or {}).get("approximate", ())
        mode = "TANH_APPROXIMATION" if by_tanh else "EXACT"
        context.add(ops.mb.gelu(x=context[node.inputs[0]], mode=mode, name=node.name))

    original = registry.name_to_func_mapping["gelu"]
    try:
        registry.name_to_func_mapping["gelu"] = gelu
        yield
    finally:
        registry.name_to_func_mapping["gelu"] = original


@contextlib.contextmanager
def converting() -> Iterator[list[str]]:
    """Everything that a conversion needs around it; yields the log lines."""
    with contextlib.ExitStack() as stack:
        lines = stack.enter_context(quiet())
        for context in (
            without_progress_bars(),
            other_outputs_beside_classes(),
            whole_number_division(),
            gelu_as_asked(),
            conversions(),
        ):
            stack.enter_context(context)
        yield lines


def load_coremltools() -> ModuleType:
    """The coremltools package.

    Raises:
        BadInputError: it is not installed.
    """
    with quiet():
        try:
            return import_module("coremltools")
        except ModuleNotFoundError as error:
            raise BadInputError(
                "Lowering for Core ML needs coremltools, which is not installed.",
                next_step="pip install 'edgeport[coreml]'",
            ) from error


def failing_operator(lines: list[str]) -> str | None:
    """The operator that coremltools was converting when it gave up, from what it logged; None when it did not say."""
    for line in reversed(lines):
        match = re.search(r"ERROR - converting '([^']+)' op(?: \(located at: '([^']+)'\))?", line)
        if match:
            return f"{match[1]} (at {match[2]})" if match[2] else match[1]
    return None
