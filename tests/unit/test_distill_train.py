"""The training loop: what it goes on from, when it stops, and what it leaves."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from edgeport.compress.distill import train as loop
from edgeport.compress.distill.train import Curve, Schedule, train
from edgeport.errors import BadInputError


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """A shell's background jobs, and so the tests in one, ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Regression:
    """y = x W + b on noisy points; every loss also draws random numbers, as sampling does."""

    def __init__(self, *, rate: float = 0.1, wanted: float = 1.0) -> None:
        generator = torch.Generator().manual_seed(3)
        self.inputs = torch.randn(24, 5, generator=generator)
        self.targets = self.inputs @ torch.randn(5, 2, generator=generator) * wanted
        self.weight = torch.nn.Parameter(torch.zeros(5, 2))
        self.bias = torch.nn.Parameter(torch.zeros(2))
        self.rate = rate
        self.judged: list[float] | None = None
        self.drawn: list[int] = []

    def groups(self) -> list[dict[str, Any]]:
        return [{"params": [self.weight], "lr": self.rate}, {"params": [self.bias], "lr": self.rate / 2}]

    def error(self, indices: Sequence[int]) -> torch.Tensor:
        rows = torch.tensor(list(indices))
        return (self.inputs[rows] @ self.weight + self.bias - self.targets[rows]).square().mean()

    def loss(self, indices: Sequence[int], generator: torch.Generator) -> torch.Tensor:
        self.drawn += indices
        return self.error(indices) * (1 + torch.rand((), generator=generator))

    def judge(self) -> float:
        if self.judged is not None:
            return self.judged.pop(0)
        with torch.no_grad():
            return float(self.error(range(20, 24)))

    def before_update(self) -> None:
        pass

    def after_update(self) -> None:
        pass

    def values(self) -> list[torch.Tensor]:
        return [self.weight.detach().clone(), self.bias.detach().clone()]


SCHEDULE = Schedule(steps=30, batch=3, accumulate=2, weight_decay=0.01, checks=5)
USED = list(range(20))


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("stops", [(1,), (6,), (11, 12, 25), tuple(range(1, 30))])
def test_a_resumed_run_ends_with_the_same_bits(stops: tuple[int, ...], tmp_path: Path) -> None:
    whole = Regression()
    curve = train(whole, USED, SCHEDULE)
    assert curve.steps == 30
    assert curve.best > 0
    checkpoint = tmp_path / "deep" / "run.safetensors"
    drawn: list[int] = []
    for stop in stops:
        part = Regression()

        def interrupt(step: int, _steps: int, _loss: float, stop: int = stop) -> None:
            if step == stop:
                os.kill(os.getpid(), signal.SIGINT)

        with pytest.raises(KeyboardInterrupt):
            train(part, USED, SCHEDULE, checkpoint=checkpoint, identity="a", progress=interrupt)
        drawn += part.drawn
        assert checkpoint.is_file()
    last = Regression()
    again = train(last, USED, SCHEDULE, checkpoint=checkpoint, identity="a")
    assert again == curve
    assert same(last.values(), whole.values())
    assert drawn + last.drawn == whole.drawn
    assert list(checkpoint.parent.iterdir()) == []
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize(("between", "first"), [(300.0, 13), (0.0, 16)])
def test_a_killed_run_goes_on_at_its_last_checkpoint(
    between: float, first: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "BETWEEN", between)
    whole, checkpoint = Regression(), tmp_path / "run.safetensors"
    curve = train(whole, USED, SCHEDULE)

    class Killed(Exception):
        pass

    def kill(step: int, _steps: int, _loss: float) -> None:
        if step == 16:
            raise Killed

    with pytest.raises(Killed):
        train(Regression(), USED, SCHEDULE, checkpoint=checkpoint, identity="a", progress=kill)
    seen: list[int] = []
    last = Regression()
    assert (
        train(last, USED, SCHEDULE, checkpoint=checkpoint, identity="a", progress=lambda *a: seen.append(a[0])) == curve
    )
    assert seen == list(range(first, 31))  # checks at 6, 12, 18, ...
    assert same(last.values(), whole.values())


def test_where_ctrl_c_is_ignored_it_stays_ignored() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    trainee = Regression()

    def interrupt(*_report: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    assert train(trainee, USED, SCHEDULE, progress=interrupt).steps == 30


def test_checkpoints_of_others_and_damaged_ones_are_refused(tmp_path: Path) -> None:
    checkpoint = tmp_path / "run.safetensors"

    def interrupt(*_report: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(Regression(), USED, SCHEDULE, checkpoint=checkpoint, identity="a", progress=interrupt)
    with pytest.raises(BadInputError, match="another training"):
        train(Regression(), USED, SCHEDULE, checkpoint=checkpoint, identity="b")
    checkpoint.write_bytes(checkpoint.read_bytes()[:-50])
    with pytest.raises(BadInputError, match="can't be read") as error:
        train(Regression(), USED, SCHEDULE, checkpoint=checkpoint, identity="a")
    assert "Delete" in str(error.value.next_step)


def test_adamw_and_the_schedule_by_hand() -> None:
    """Three updates against the formulas of AdamW (Loshchilov & Hutter 2019), rates 1/2, 1, cosine."""
    schedule = Schedule(steps=4, batch=2, weight_decay=0.1, warm_up=0.5, checks=4, clip=1e9)
    trainee = Regression()
    trainee.judged = [5.0, 4.0, 3.0, 2.0, 1.0]
    train(trainee, USED, schedule)
    reference = Regression()
    order = list(trainee.drawn)
    noise = torch.Generator().manual_seed(0)
    moments = [[torch.zeros_like(value), torch.zeros_like(value)] for value in reference.values()]
    for step, factor in enumerate([0.5, 1.0, 1.0, 0.5 * (1 + math.cos(math.pi / 2))], 1):
        loss = reference.error(order[2 * step - 2 : 2 * step]) * (1 + torch.rand((), generator=noise))
        parameters = [reference.weight, reference.bias]
        gradients = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            for value, gradient, state, highest in zip(parameters, gradients, moments, (0.1, 0.05), strict=True):
                rate = highest * factor
                value.mul_(1 - rate * 0.1)
                state[0] = 0.9 * state[0] + 0.1 * gradient
                state[1] = 0.999 * state[1] + 0.001 * gradient**2
                size = (state[1] / (1 - 0.999**step)).sqrt() + 1e-8
                value.sub_(rate * state[0] / (1 - 0.9**step) / size)
    for found, wanted in zip(trainee.values(), reference.values(), strict=True):
        assert torch.allclose(found, wanted, atol=1e-6)


def test_accumulated_batches_are_one_large_batch() -> None:
    large, small = Regression(), Regression()
    for trainee in (large, small):
        trainee.loss = lambda indices, _generator, trainee=trainee: trainee.error(indices)  # type: ignore[method-assign]
    train(large, USED, Schedule(steps=10, batch=6, checks=1))
    train(small, USED, Schedule(steps=10, batch=2, accumulate=3, checks=1))
    for one, other in zip(large.values(), small.values(), strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_the_best_values_stay_and_patience_ends_the_run() -> None:
    trainee = Regression()
    trainee.judged = [9.0, 5.0, 6.0, 5.5, 4.0, 4.5, 4.2, 4.1, 3.0, 2.0, 1.0]
    kept: dict[int, list[torch.Tensor]] = {}

    def note(step: int, _steps: int, _loss: float) -> None:
        kept[step] = trainee.values()

    curve = train(trainee, USED, Schedule(steps=50, batch=2, checks=10, patience=3), progress=note)
    assert curve.ended == "no better"
    assert (curve.before, curve.after, curve.best, curve.steps) == (9.0, 4.0, 20, 35)
    assert curve.held_out == ((5, 5.0), (10, 6.0), (15, 5.5), (20, 4.0), (25, 4.5), (30, 4.2), (35, 4.1))
    assert same(trainee.values(), kept[20])


def test_nothing_better_leaves_the_start() -> None:
    trainee = Regression()
    start = trainee.values()
    trainee.judged = [1.0, 2.0, 3.0]
    curve = train(trainee, USED, Schedule(steps=4, batch=2, checks=2))
    assert (curve.best, curve.after, curve.ended) == (0, 1.0, "all steps")
    assert same(trainee.values(), start)


def test_a_run_that_diverges_stops_at_its_best() -> None:
    trainee = Regression()
    healthy, count = trainee.loss, iter(range(100))
    trainee.loss = lambda indices, generator: healthy(indices, generator) * (math.nan if next(count) == 7 else 1)  # type: ignore[method-assign]
    curve = train(trainee, USED, Schedule(steps=20, batch=2, checks=10))
    assert (curve.ended, curve.steps) == ("diverged", 7)
    assert curve.after < curve.before
    assert all(value.isfinite().all() for value in trainee.values())


def test_outputs_that_are_not_finite_at_the_start_train_nothing() -> None:
    trainee = Regression(wanted=math.inf)
    curve = train(trainee, USED, SCHEDULE)
    assert not math.isfinite(curve.before)
    assert curve == Curve(curve.before, curve.after)
    assert same(trainee.values(), [torch.zeros(5, 2), torch.zeros(2)])
