"""One training loop, plain and restartable; distillation and quantization-aware training are what it runs.

AdamW under a short linear rise and half a cosine down to 0. The loss on held-out inputs is measured some times in the
run; the values that are best on them are what is left at the end, the start's where nothing was better.

Everything that decides what follows (values, moments, the best so far, how many inputs were drawn, the state of the
random numbers) goes into a checkpoint at each of these checks, every few minutes, and when the user interrupts. A run
that goes on there ends with the same bits as one that was never stopped.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from edgeport.compress.distill.checkpoint import Curve, State, read_checkpoint, write_checkpoint
from edgeport.compress.quantize.held import in_turns

BETWEEN = 300.0
"""Seconds after which a checkpoint is written between two checks, so that a killed run loses no more."""

Progress = Callable[[int, int, float], None]
"""(updates done, updates in all, mean loss of the last update)."""


@dataclass(frozen=True)
class Schedule:
    """How long and how fast.

    Attributes:
        steps: updates.
        batch: inputs that run together.
        accumulate: batches whose gradients make one update.
        warm_up: share of the steps in which the learning rate rises.
        checks: times in all that the held-out loss is measured after the start.
        patience: checks in a row without a better loss after which the run ends; None for all steps.
        clip: largest norm of all gradients together.
    """

    steps: int
    batch: int = 1
    accumulate: int = 1
    weight_decay: float = 0.0
    warm_up: float = 0.05
    checks: int = 10
    patience: int | None = None
    clip: float = 1.0
    seed: int = 0


class Trainee(Protocol):
    """What is trained."""

    def groups(self) -> list[dict[str, Any]]:
        """Parameters with their highest learning rates, as torch's optimizers take them."""

    def loss(self, indices: Sequence[int], generator: torch.Generator) -> torch.Tensor:
        """Mean loss of some inputs, a scalar with a gradient."""

    def judge(self) -> float:
        """Mean loss on the held-out inputs."""

    def before_update(self) -> None:
        """All gradients of an update are there."""

    def after_update(self) -> None:
        """The parameters have new values."""


def rate_factor(steps: int, warm_up: float) -> Callable[[int], float]:
    """Learning rate of a step relative to the highest: a short linear rise, then half a cosine down to 0."""
    rise = max(1, round(steps * warm_up))

    def factor(step: int) -> float:
        if step < rise:
            return (step + 1) / rise
        return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))

    return factor


@contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets; the second is the ordinary one. Where Ctrl-C is ignored it stays so."""
    asked = threading.Event()
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN or threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def note(_number: int, _frame: Any) -> None:
        asked.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, note)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


def train(
    trainee: Trainee,
    used: Sequence[int],
    schedule: Schedule,
    *,
    checkpoint: Path | None = None,
    identity: str = "",
    progress: Progress | None = None,
) -> Curve:
    """Train, and leave the best values in the trainee's parameters.

    Args:
        used: indices of the inputs that are learned from.
        checkpoint: a file to go on from, where it is there, and to write to; removed when the run is at its end.
        identity: hash of everything else that decides the run; a checkpoint of another is refused.

    Raises:
        KeyboardInterrupt: the user interrupted; the checkpoint is written.
        BadInputError: the checkpoint is damaged, or of another run.
    """
    groups = trainee.groups()
    optimizer = torch.optim.AdamW(groups, weight_decay=schedule.weight_decay, fused=True)
    parameters = [value for group in optimizer.param_groups for value in group["params"]]
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    state = State(
        parameters, optimizer, torch.Generator().manual_seed(schedule.seed), [], Curve(math.inf, math.inf), rates=rates
    )
    if checkpoint is not None and checkpoint.is_file():
        state.curve, state.since = read_checkpoint(checkpoint, identity, state)
        trainee.after_update()
    else:
        first = trainee.judge()
        state.curve = Curve(first, first)
        state.best = [value.detach().clone() for value in parameters]
    if math.isfinite(state.curve.before):
        _run(trainee, used, schedule, state, checkpoint, identity, progress)
    with torch.no_grad():
        for value, best in zip(parameters, state.best, strict=True):
            value.copy_(best)
    trainee.after_update()
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)
    return state.curve


def _run(
    trainee: Trainee,
    used: Sequence[int],
    schedule: Schedule,
    state: State,
    checkpoint: Path | None,
    identity: str,
    progress: Progress | None,
) -> None:
    """The updates that are left."""
    factor, every = rate_factor(schedule.steps, schedule.warm_up), max(1, schedule.steps // schedule.checks)
    following = in_turns(used, schedule.seed)
    for _ in range(state.curve.steps * schedule.accumulate * schedule.batch):
        following()
    written = time.monotonic()
    with _interrupts() as asked:
        while state.curve.steps < schedule.steps and state.curve.ended == "all steps":
            step = state.curve.steps + 1
            total = _update(trainee, following, schedule, state, factor(step - 1))
            if not math.isfinite(total):
                state.curve = replace(state.curve, ended="diverged")  # nothing better can follow
                break
            state.since += total
            state.curve = replace(state.curve, steps=step)
            if progress is not None:
                progress(step, schedule.steps, total)
            checked = step % every == 0 or step == schedule.steps
            if checked:
                _check(trainee, schedule, state)
            due = checked or asked.is_set() or time.monotonic() - written >= BETWEEN
            if checkpoint is not None and due:
                write_checkpoint(checkpoint, identity, state)
                written = time.monotonic()
            if asked.is_set():
                raise KeyboardInterrupt


def _update(trainee: Trainee, following: Callable[[], int], schedule: Schedule, state: State, factor: float) -> float:
    """One step of the optimizer; the mean loss, which is not finite where the step was not made."""
    total = 0.0
    for _ in range(schedule.accumulate):
        indices = [following() for _ in range(schedule.batch)]
        loss = trainee.loss(indices, state.generator) / schedule.accumulate
        loss.backward()  # type: ignore[no-untyped-call]
        total += float(loss.detach())
    if not math.isfinite(total):
        return total
    trainee.before_update()
    torch.nn.utils.clip_grad_norm_(state.parameters, schedule.clip, foreach=False)
    for group, rate in zip(state.optimizer.param_groups, state.rates, strict=True):
        group["lr"] = rate * factor
    state.optimizer.step()
    state.optimizer.zero_grad()
    trainee.after_update()
    return total


def _check(trainee: Trainee, schedule: Schedule, state: State) -> None:
    """Measure the held-out loss, keep the best, and see whether to go on."""
    curve = state.curve
    now = trainee.judge()
    last = curve.held_out[-1][0] if curve.held_out else 0
    curve = replace(
        curve,
        held_out=(*curve.held_out, (curve.steps, now)),
        training=(*curve.training, (curve.steps, state.since / (curve.steps - last))),
    )
    state.since = 0.0
    if now < curve.after:
        curve = replace(curve, after=now, best=curve.steps)
        for kept, value in zip(state.best, state.parameters, strict=True):
            kept.copy_(value.detach())
    elif schedule.patience is not None and _worse_in_a_row(curve) >= schedule.patience:
        curve = replace(curve, ended="no better")
    state.curve = curve


def _worse_in_a_row(curve: Curve) -> int:
    """Checks since the best one."""
    return sum(step > curve.best for step, _ in curve.held_out)
