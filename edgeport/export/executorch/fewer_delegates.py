"""A decoder in forms that XNNPACK takes whole: one delegate a layer, not six.

Between two delegates lie copies, and a call whose fixed cost a single token feels. XNNPACK (executorch 1.4.1) leaves
these of a decoder to the runtime's own kernels; each is written here as something that it takes:

- a mean over the last dimension (norms): a product with a row of 1 / n;
- slices of a tensor with an open size (the halves of a rotation): a product with the matrix that swaps the halves;
- a reshape whose new shape names the open size: the same with -1 in its place;
- a transposition that the next one undoes: nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F

from edgeport.model.types import AttentionLayer


def averaging_row(width: int) -> torch.Tensor:
    """(1, width): a product with it is the mean."""
    return torch.full((1, width), 1.0 / width)


def half_turn(width: int) -> torch.Tensor:
    """(width, width): x times its transpose is (-x2, x1) of x = (x1, x2), Llama's `rotate_half`."""
    half = torch.eye(width // 2)
    none = torch.zeros_like(half)
    return torch.cat([torch.cat([none, -half], 1), torch.cat([half, none], 1)])


@contextmanager
def means_as_products(rows: Mapping[int, torch.Tensor]) -> Iterator[None]:
    """Inside the block `x.mean(-1, keepdim=True)` is a product, for x of a width that `rows` has."""
    original = torch.Tensor.mean

    def mean(x: torch.Tensor, *args: Any, **more: Any) -> torch.Tensor:
        row = rows.get(x.shape[-1]) if isinstance(x.shape[-1], int) else None
        asked = args[0] if args else more.get("dim")
        last = asked in (-1, [-1], (-1,)) and more.get("keepdim") is True and set(more) <= {"dim", "keepdim"}
        return F.linear(x, row) if row is not None and last and len(args) < 2 else original(x, *args, **more)

    setattr(torch.Tensor, "mean", mean)  # noqa: B010  # mypy takes an assignment for a redefinition
    try:
        yield
    finally:
        setattr(torch.Tensor, "mean", original)  # noqa: B010


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    """Rotary positions of (B, heads, S, head_dim), the first `width` of each head: x cos + rotate_half(x) sin.

    Args:
        cos, sin: (B, S, 1, width).
        turn: `half_turn(width)`.
    """
    width = turn.shape[0]
    rows = x.transpose(1, 2)
    turned = rows if rows.shape[-1] == width else rows[..., :width]
    turned = turned * cos + F.linear(turned, turn) * sin
    if rows.shape[-1] != width:
        turned = torch.cat([turned, rows[..., width:]], -1)
    return turned.transpose(1, 2)


def turns_halves(module: torch.nn.Module, layer: AttentionLayer, width: int) -> bool:
    """The model's own `apply_rotary_pos_emb` does what `rotate` does, tried on random numbers."""
    own: Any = getattr(sys.modules[type(module).__module__], "apply_rotary_pos_emb", None)
    if own is None or width % 2:
        return False
    generator = torch.Generator().manual_seed(0)
    head = min(width, layer.head_dim)
    cos, sin = (torch.randn(1, 3, width // 2, generator=generator).repeat(1, 1, 2) for _ in range(2))
    query, key = (torch.randn(1, heads, 3, layer.head_dim, generator=generator) for heads in (2, 1))
    if head < layer.head_dim:
        query, key = query[..., :head], key[..., :head]
    try:
        answers = own(query, key, cos, sin)
    except (TypeError, ValueError, RuntimeError, IndexError):
        return False
    turn = half_turn(width)
    return all(
        torch.allclose(answer, rotate(x, cos.unsqueeze(2), sin.unsqueeze(2), turn), atol=1e-5)
        for answer, x in zip(answers, (query, key), strict=True)
    )


def tidy(program: torch.export.ExportedProgram) -> None:
    """Write reshapes with -1 for the open size, and drop transpositions that undo each other, in place."""
    aten = torch.ops.aten
    for node in program.graph.nodes:
        if node.target in (aten.view.default, aten.reshape.default):
            shape = list(node.meta["val"].shape)
            if sum(not isinstance(size, int) for size in shape) == 1:
                node.args = (node.args[0], [size if isinstance(size, int) else -1 for size in shape])
        elif node.target is aten.transpose.int:
            before = node.args[0]
            if before.target is aten.transpose.int and _transposed(before) == _transposed(node):
                node.replace_all_uses_with(before.args[0])
    program.graph.eliminate_dead_code()


def _transposed(node: torch.fx.Node) -> set[int]:
    dimensions = node.meta["val"].dim()
    return {int(dimension) % dimensions for dimension in node.args[1:3]}  # type: ignore[arg-type]  # of a graph: ints
