"""Which layer's output a layer reads, and which clamp follows a layer: what fixed activation grids can share.

Between two layers stand operations that keep a rounded tensor on its grid: reshaping, padding with zeros, maxima,
and clamps (ReLU, ReLU6) when the grid ends where they do. The model is run once and every function call watched, so
it does not matter whether its author wrote modules or functions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import _pytree as pytree

from edgeport.compress.chain import call

Bounds = tuple[float, float]

CLAMPS = {"relu", "relu_", "relu6", "hardtanh", "hardtanh_", "clamp", "clamp_", "clip", "clip_"}
KEEPS = {"reshape", "view", "flatten", "squeeze", "unsqueeze", "transpose", "permute", "contiguous", "clone"}
KEEPS |= {"dropout", "dropout2d", "max_pool1d", "max_pool2d", "identity"}


@dataclass(frozen=True)
class Flow:
    """How layers hang together. Layers are known by the name of their weight.

    Attributes:
        bounds: what a layer's output is clamped to before anything else sees it; layers without a clamp are absent.
        source: the layer whose output, clamped to its bounds, a layer reads and nothing else.
        reached: the layers that ran.
    """

    bounds: Mapping[str, Bounds]
    source: Mapping[str, str]
    reached: frozenset[str]


@dataclass
class _State:
    """A tensor that holds a layer's output: which layer's, and the clamp that it went through."""

    layer: str
    clamp: Bounds | None


@dataclass
class _Watch(torch.overrides.TorchFunctionMode):
    """Follows the outputs of layers through every function that is called outside of layers."""

    states: dict[int, _State] = field(default_factory=dict)
    reads: dict[str, set[Bounds | None]] = field(default_factory=dict)
    """What the unclamped output of a layer is read by: clamps, and None for anything else."""
    sources: dict[str, set[tuple[str, Bounds | None] | None]] = field(default_factory=dict)
    kept: list[torch.Tensor] = field(default_factory=list)  # ids stay unique only while the tensors live
    inside: bool = False

    def __post_init__(self) -> None:
        super().__init__()

    def put(self, tensor: torch.Tensor, state: _State) -> None:
        self.kept.append(tensor)
        self.states[id(tensor)] = state

    def read(self, tensor: torch.Tensor, by: Bounds | None) -> _State | None:
        """Note a reader; returns the tensor's state."""
        state = self.states.get(id(tensor))
        if state is not None and state.clamp is None:
            self.reads.setdefault(state.layer, set()).add(by)
        return state

    def enter(self, name: str, value: torch.Tensor) -> None:
        """A layer reads a tensor."""
        state = self.read(value, None)
        found = None if state is None else (state.layer, state.clamp)
        self.sources.setdefault(name, set()).add(found)
        self.inside = True

    def leave(self, name: str, value: torch.Tensor) -> None:
        """A layer gave a tensor."""
        self.inside = False
        self.put(value, _State(name, None))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tracked = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if id(leaf) in self.states]
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if self.inside or not tracked or name == "__get__":  # __get__: shape, dtype, device
            return result
        first = args[0] if args else kwargs.get("input")
        state = self.states.get(id(first))
        if state is not None and isinstance(result, torch.Tensor) and len(tracked) == 1:
            if name in CLAMPS and state.clamp is None:
                bounds = _bounds(func, args[1:], kwargs)
                self.read(first, bounds)
                self.put(result, _State(state.layer, bounds))
                return result
            if name in KEEPS or (name == "pad" and _pads_zeros(args, kwargs)):
                self.put(result, _State(state.layer, state.clamp))
                return result
        for tensor in tracked:
            self.read(tensor, None)
            if tensor is result:  # changed in place
                del self.states[id(tensor)]
        return result


def _bounds(func: Any, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> Bounds:
    """What a clamp makes of the least and the greatest number."""
    ends = torch.tensor([-torch.inf, torch.inf])
    low, high = func(ends, *arguments, **{key: value for key, value in named.items() if key != "input"}).tolist()
    return low, high


def _pads_zeros(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    mode = args[2] if len(args) > 2 else kwargs.get("mode", "constant")
    value = args[3] if len(args) > 3 else kwargs.get("value")
    return mode == "constant" and value in (None, 0)


def read_flow(
    module: torch.nn.Module, layers: Mapping[str, torch.nn.Module], example: Mapping[str, torch.Tensor]
) -> Flow:
    """Run the module once and see what follows what.

    Args:
        layers: by the name of their weight.
        example: one value for each input.
    """
    watch = _Watch()

    def before(name: str) -> Any:
        return lambda _layer, inputs: watch.enter(name, inputs[0])

    def after(name: str) -> Any:
        return lambda _layer, _inputs, output: watch.leave(name, output)

    handles = [layer.register_forward_pre_hook(before(name)) for name, layer in layers.items()]
    handles += [layer.register_forward_hook(after(name)) for name, layer in layers.items()]
    try:
        with torch.no_grad(), watch:
            result = call(module, example)
        for leaf in pytree.tree_leaves(result):
            watch.read(leaf, None)
    finally:
        for handle in handles:
            handle.remove()
    bounds: dict[str, Bounds] = {}
    for name, readers in watch.reads.items():
        clamp = next(iter(readers))
        if len(readers) == 1 and clamp is not None:
            bounds[name] = clamp
    source = {}
    for name, found in watch.sources.items():
        only = next(iter(found))
        # A clamp that other readers go without may end between two values of the output's grid.
        if len(found) == 1 and only is not None and only[1] == bounds.get(only[0]):
            source[name] = only[0]
    return Flow(bounds, source, frozenset(watch.sources))
