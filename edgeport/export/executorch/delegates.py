"""Lowering many delegates in reasonable time."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def delegates_built_once() -> Iterator[None]:
    """Inside the block a delegate's module is built once, not at every pass.

    ExecuTorch's passes learn the shape of a delegate's outputs by running the program that was delegated
    (`call_delegate_cpu` in torch/_higher_order_ops/executorch_call_delegate.py), and build its module anew
    each time. SmolLM2 with fixed shapes has 94 delegates, and every pass visits each of them. A program
    that was delegated does not change any more, so its module can be kept.
    """
    import torch
    import torch._higher_order_ops.executorch_call_delegate
    from torch.utils import _pytree as pytree

    # The package's attribute of the module's name is the operator: the module itself is only found so.
    delegates: Any = sys.modules["torch._higher_order_ops.executorch_call_delegate"]
    built: dict[int, tuple[Any, Any]] = {}

    def run(lowered: Any, *arguments: Any) -> Any:
        program = lowered.original_module
        # The program is kept beside its module: its id stays its own as long as it lives.
        _, module = built.get(id(program)) or built.setdefault(id(program), (program, program.module()))
        # torch.fx wraps lists in immutable kinds, which a module's guards do not take for lists.
        plain = pytree.tree_map_only(
            torch.fx.immutable_collections.immutable_list,
            list,
            arguments,
            lambda value: isinstance(value, torch.fx.immutable_collections.immutable_list),
        )
        return module(*plain)

    original = delegates.call_delegate_cpu
    delegates.call_delegate_cpu = run
    try:
        yield
    finally:
        delegates.call_delegate_cpu = original
