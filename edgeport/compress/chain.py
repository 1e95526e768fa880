"""Find the blocks of a model that run one after the other, so that calibration can go through it once.

A chain is a ModuleList whose entries each take the hidden states that the one before returned: the layers of a
decoder or encoder, the stages of a conv net. It is found by watching one forward, not by names.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch


def hidden_states(output: Any) -> Any:
    """What a block hands to the next: its output, or the first of several."""
    return output[0] if isinstance(output, tuple | list) else output


def call(module: torch.nn.Module, inputs: Mapping[str, torch.Tensor]) -> Any:
    """Run a model without a cache: blocks that run again must not meet what they stored before."""
    config = getattr(module, "config", None)
    extra = {"use_cache": False} if hasattr(config, "use_cache") else {}
    return module(**inputs, **extra)


def find_chains(module: torch.nn.Module, inputs: Mapping[str, torch.Tensor]) -> list[list[str]]:
    """The names of the blocks of every chain, chains and blocks in the order in which they ran; outermost only.

    Args:
        inputs: one example, as the module takes it.
    """
    lists = {name: layer for name, layer in module.named_modules() if isinstance(layer, torch.nn.ModuleList)}
    watched = {f"{name}.{index}": block for name, entries in lists.items() for index, block in enumerate(entries)}
    seen: dict[str, tuple[Any, Any]] = {}

    def hook(name: str) -> Any:
        def note(_block: torch.nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            # A block that runs twice is no link of a chain.
            seen[name] = (None, None) if name in seen or not arguments else (arguments[0], hidden_states(output))

        return note

    with ExitStack() as stack, torch.no_grad():
        for name, block in watched.items():
            stack.callback(block.register_forward_hook(hook(name)).remove)
        call(module, inputs)
    chains: list[list[str]] = []
    for name, entries in lists.items():
        names = [f"{name}.{index}" for index in range(len(entries))]
        linked = all(
            first in seen and second in seen and seen[first][1] is not None and seen[first][1] is seen[second][0]
            for first, second in itertools.pairwise(names)
        )
        inside = any(name.startswith(f"{block}.") for chain in chains for block in chain)
        if len(names) > 1 and linked and not inside:
            chains.append(names)
    order = list(seen)
    return sorted(chains, key=lambda chain: order.index(chain[0]))
