"""Lowering large models in reasonable time: two places where torch and ExecuTorch 1.4.1 do work that nobody reads.

Both change when something is computed, never what: the file is the same, byte for byte.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def code_made_when_run() -> Iterator[None]:
    """Inside the block a graph's Python code is made when the graph is first run, not at every change.

    Passes and the partitioner recompile the whole graph at every change, and ExecuTorch does so for each
    delegate it cuts out, though hardly any of these graphs is ever run: 200 of the 490 processor seconds of
    SmolLM2. torch has the same idea for its own compiler (torch/fx/_lazy_graph_module.py).
    """
    from torch.fx.graph import _PyTreeCodeGen
    from torch.fx.graph_module import GraphModule, _WrappedCall

    original = GraphModule.recompile
    waiting: dict[type, GraphModule] = {}

    def forward(self: Any, *arguments: Any, **named: Any) -> Any:
        waiting.pop(type(self), None)
        original(self)
        return type(self).forward(self, *arguments, **named)

    def call(self: Any, *arguments: Any, **named: Any) -> Any:
        if type(self) in waiting:
            original(waiting.pop(type(self)))
        return type(self)._wrapped_call(self, *arguments, **named)

    def recompile(self: Any) -> None:
        cls = type(self)
        if isinstance(self._graph._codegen, _PyTreeCodeGen):
            self._in_spec = self._graph._codegen.pytree_info.in_spec
            self._out_spec = self._graph._codegen.pytree_info.out_spec
        if not hasattr(self, "_code"):
            self._code = ""  # debug messages print it
        waiting[cls] = self
        cls.forward = forward
        if "_wrapped_call" not in vars(cls):
            cls._wrapped_call = _WrappedCall(cls, vars(cls).get("__call__"))
        cls.__call__ = call

    setattr(GraphModule, "recompile", recompile)  # noqa: B010  # mypy takes an assignment for a redefinition
    try:
        yield
    finally:
        setattr(GraphModule, "recompile", original)  # noqa: B010


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
