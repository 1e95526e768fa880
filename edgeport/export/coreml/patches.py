"""Reversible changes to what a model calls while it is traced, so that the graph is one that Core ML runs well."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Set an attribute of a module or class for a while."""
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


@contextlib.contextmanager
def forward_replaced(module: torch.nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Give one module another `forward` for a while. Names of parameters and submodules stay as they are."""
    before = vars(module).get("forward")
    object.__setattr__(module, "forward", forward)
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            object.__setattr__(module, "forward", before)


@contextlib.contextmanager
def plain_attention() -> Iterator[None]:
    """Write scaled_dot_product_attention in the form that coremltools takes.

    coremltools ignores `enable_gqa`, and an explicit `scale` keeps it from using iOS 18's fused operator even
    when it is the default one, 1 / sqrt(head size).
    """
    original = F.scaled_dot_product_attention

    def attention(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        if enable_gqa and key.shape[-3] != query.shape[-3]:
            repeats = query.shape[-3] // key.shape[-3]
            key, value = key.repeat_interleave(repeats, -3), value.repeat_interleave(repeats, -3)
        if scale is not None and math.isclose(scale, query.shape[-1] ** -0.5, rel_tol=1e-6):
            scale = None
        return original(query, key, value, attn_mask, dropout_p, is_causal, scale=scale)

    with replaced(F, "scaled_dot_product_attention", attention):
        yield


@contextlib.contextmanager
def plain_masks(*, positions_given: bool) -> Iterator[None]:
    """Let transformers build attention masks by broadcasting instead of by indexing.

    Stock code reads `mask[batch, key]` with index tensors (gather_nd in Core ML, with tiled indices when shapes
    vary), and looks for several sequences packed into one row, which can only be where the caller numbers the
    positions.
    """
    from transformers import masking_utils

    def padding(mask: torch.Tensor) -> Callable[..., torch.Tensor]:
        def inner(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            if key.ndim == 4 and key.shape[-1] == mask.shape[-1]:
                return mask[:, None, None, :]
            return mask[batch, key]

        return inner

    with contextlib.ExitStack() as stack:
        stack.enter_context(replaced(masking_utils, "padding_mask_function", padding))
        if not positions_given:
            stack.enter_context(replaced(masking_utils, "find_packed_sequence_indices", lambda position_ids: None))
        yield
