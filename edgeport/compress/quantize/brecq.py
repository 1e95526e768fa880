"""Block reconstruction: learn rounding and scales of one block, so that it gives what the float block gave.

BRECQ (Li et al. 2021, https://arxiv.org/abs/2102.05426) found that the block is the unit to tune: its layers
make up for each other's errors, and few samples still determine it. Whether a weight goes up or down is learned
straight through (`straight.py`), as in SignRound (Cheng et al. 2023, https://arxiv.org/abs/2309.05516), from the codes
that a quantizing step chose; scales are learned with it.

The block is given its inputs as the blocks before it, already quantized and tuned, make them, and is to give what the
float block gives on the float model's inputs: it also makes up for some of what was lost before it. (On the inputs
that it sees, the float block would repeat those errors.) The loss is

    mean over vectors of |y - y'|^2 / |y'|^2        y, y' the block's and the float block's outputs

with a vector a token's hidden state: what follows normalises each, so that a few tokens with very large states, which
decoders have, must not decide alone.

A held-out fifth of the samples decides. The state that is best on them is kept, and nothing is changed when none is
better than the start. GPTQ has seen them, which makes its codes look a little better than they are on other data (3% of
the loss in MiniLM's last block, on 64 samples): the choice errs on the side of the start.

Memory: for each weight of one block the master, two moments, its gradient and its present value; the hidden states of
both models, one a sample; the activations of one sample inside the block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from edgeport.compress.quantize.held import in_turns, split
from edgeport.compress.quantize.straight import TrainedWeight
from edgeport.errors import BadInputError
from edgeport.quantized import QuantizedTensor, dequantize
from edgeport.recipe import Brecq

FINER = 0.1
"""Learning rate of scales, relative to their size, to that of weights in steps of the grid."""

CHECKS = 5
"""How many times in a run the held-out loss is measured."""

Forward = Callable[[int, Mapping[str, torch.Tensor]], torch.Tensor]
"""(sample, the block's weights by name) -> the block's output."""


@dataclass(frozen=True)
class Reconstructed:
    """What tuning made of a block.

    Attributes:
        quantized: its weights, by name; those that came in when nothing was better.
        loss_before, loss_after: mean loss on the held-out samples.
    """

    quantized: dict[str, QuantizedTensor]
    loss_before: float
    loss_after: float


def block_loss(output: torch.Tensor, wanted: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Mean squared error of vectors relative to their squared norm, a scalar.

    Args:
        output, wanted: (batch, sequence, channels), a vector each token; of any other shape a vector each.
        mask: (batch, sequence), positions with 0 do not count.
    """
    if wanted.ndim == 3:
        if mask is not None and mask.shape == wanted.shape[:2]:
            output, wanted = output[mask.bool()], wanted[mask.bool()]
        output, wanted = output.reshape(-1, output.shape[-1]), wanted.reshape(-1, wanted.shape[-1])
    else:
        output, wanted = output.reshape(1, -1), wanted.reshape(1, -1)
    energy = wanted.square().sum(1)
    # A vector of zeros counts as one of the mean size: dividing by it would make it count alone.
    return ((output - wanted).square().sum(1) / torch.where(energy > 0, energy, energy.mean().clamp_min(1e-12))).mean()


@torch.enable_grad()
def reconstruct(
    forward: Forward,
    wanted: Sequence[torch.Tensor],
    masks: Sequence[torch.Tensor | None],
    start: Mapping[str, QuantizedTensor],
    weights: Mapping[str, torch.Tensor],
    settings: Brecq,
    *,
    progress: Callable[[int, float], None] | None = None,
) -> Reconstructed:
    """Tune the weights of one block.

    Args:
        forward: runs the block on a sample's inputs; differentiable by the weights.
        wanted: what it should give for each sample.
        masks: see `block_loss`; None for no padding.
        start: the block's quantized weights, by name. Palettes stay as they are.
        weights: the float weights that they stand for.
        progress: called with (steps done, mean loss of the last step).

    Raises:
        BadInputError: there are fewer than two samples, or the block's outputs are not finite on them.
    """
    held, used = split(len(wanted), settings.seed)
    trained = {name: TrainedWeight(tensor, weights[name]) for name, tensor in start.items() if tensor.palette is None}
    values = {name: dequantize(tensor) for name, tensor in start.items()}

    def refresh() -> None:
        with torch.no_grad():
            values.update({name: weight.value().requires_grad_() for name, weight in trained.items()})

    def loss_of(index: int) -> torch.Tensor:
        return block_loss(forward(index, values), wanted[index], masks[index])

    def judge() -> float:
        with torch.no_grad():
            return sum(float(loss_of(index)) for index in held) / len(held)

    before = judge()
    if not math.isfinite(before):
        raise BadInputError(
            "The calibration data makes values that are not finite.",
            where="[calibration]",
            next_step="Check the checkpoint and its preprocessing.",
        )
    best = Reconstructed(dict(start), before, before)
    if not trained:
        return best
    optimizer = torch.optim.Adam(
        [
            {"params": [weight.master for weight in trained.values()], "lr": settings.learning_rate},
            {"params": [weight.log_ratio for weight in trained.values()], "lr": settings.learning_rate * FINER},
        ],
        foreach=False,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / settings.steps)
    following, every = in_turns(used, settings.seed), max(1, settings.steps // CHECKS)
    refresh()
    for step in range(1, settings.steps + 1):
        total = 0.0
        for _ in range(settings.batch):
            loss = loss_of(following()) / settings.batch
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        if not math.isfinite(total):
            break  # diverged: nothing better can follow
        for name, weight in trained.items():
            gradient = values[name].grad
            if gradient is not None:
                weight.value().backward(gradient)  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        for weight in trained.values():
            weight.stay_on_grid()
        refresh()
        if progress is not None:
            progress(step, total)
        if (step % every == 0 or step == settings.steps) and (after := judge()) < best.loss_after:
            quantized = dict(start) | {name: weight.tensor() for name, weight in trained.items()}
            best = Reconstructed(quantized, before, after)
    return best
