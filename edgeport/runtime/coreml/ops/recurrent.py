"""Recurrent layers (coremltools `recurrent.py`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from edgeport.runtime.coreml.ops.arguments import Operators, Tensor, flag

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda x: x,
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}


def lstm(
    x: Tensor,
    initial_h: Tensor,
    initial_c: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None = None,
    peephole: Tensor | None = None,
    weight_ih_back: Tensor | None = None,
    weight_hh_back: Tensor | None = None,
    bias_back: Tensor | None = None,
    peephole_back: Tensor | None = None,
    direction: str = "forward",
    output_sequence: Tensor | bool = False,
    recurrent_activation: str = "sigmoid",
    cell_activation: str = "tanh",
    activation: str = "tanh",
    clip: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Long short-term memory: x (s, b, I) -> h of every step (s, b, H) or of the last (1, b, H); h, c (b, H).

    Weights stand in the order input, forget, output, cell gate. Bidirectional results have 2H columns.
    """
    if peephole is not None or peephole_back is not None or clip is not None:
        raise NotImplementedError("lstm with peepholes or clipping")
    gates = (ACTIVATIONS[recurrent_activation], ACTIVATIONS[cell_activation], ACTIVATIONS[activation])
    if direction != "bidirectional":
        sequence, h, c = _lstm(x, initial_h, initial_c, weight_ih, weight_hh, bias, gates, direction == "reverse")
        return (sequence if flag(output_sequence) else h.unsqueeze(0)), h, c
    if weight_ih_back is None or weight_hh_back is None:
        raise ValueError("a bidirectional lstm without backward weights")
    size = initial_h.shape[-1] // 2
    ahead = _lstm(x, initial_h[:, :size], initial_c[:, :size], weight_ih, weight_hh, bias, gates, False)
    back = _lstm(x, initial_h[:, size:], initial_c[:, size:], weight_ih_back, weight_hh_back, bias_back, gates, True)
    sequence, h, c = (torch.cat(pair, -1) for pair in zip(ahead, back, strict=True))
    return (sequence if flag(output_sequence) else h.unsqueeze(0)), h, c


def _lstm(
    x: Tensor,
    h: Tensor,
    c: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None,
    activations: tuple[Callable[[Tensor], Tensor], ...],
    backward: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    recurrent, cell, final = activations
    steps = torch.flip(x, [0]) if backward else x
    projected = steps @ weight_ih.T + (0.0 if bias is None else bias)
    outputs = []
    for step in projected:
        i, f, o, z = (step + h @ weight_hh.T).chunk(4, dim=-1)
        c = recurrent(f) * c + recurrent(i) * cell(z)
        h = recurrent(o) * final(c)
        outputs.append(h)
    sequence = torch.stack(outputs)
    return (torch.flip(sequence, [0]) if backward else sequence), h, c


OPERATORS: Operators = {"lstm": lstm}
