"""Low rank: the rank's formula, what whitening promises, and factored layers in the place of Linear ones."""

from __future__ import annotations

import pytest
import torch

from edgeport.compress.lowrank.svd import choose_ranks, factorize, factorize_layers, rank_for, whitening
from edgeport.compress.statistics import Moments
from edgeport.errors import BadInputError
from edgeport.model.factored import FactoredLinear, factor_ranks
from edgeport.model.types import Model, Source, TensorSpec
from edgeport.restructuring import LowRank


def test_the_rank_keeps_the_share() -> None:
    for rows, columns, keep in ((384, 1536, 0.5), (64, 64, 0.9), (30, 500, 0.25)):
        rank = rank_for(rows, columns, keep)
        assert rank * (rows + columns) <= keep * rows * columns < (rank + 1) * (rows + columns)
    assert rank_for(384, 1536, 0.5) == 153  # 0.5 * 384 * 1536 / 1920 = 153.6
    assert rank_for(384, 1536, 0.5, multiple=32) == 128
    assert rank_for(64, 64, 0.5, multiple=32) == 16  # below the multiple: as it is


def inputs(columns: int, count: int = 200) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(count, columns) @ torch.randn(columns, columns) * torch.linspace(0.5, 3, columns)


def test_whitening_whitens_and_what_is_lost_is_the_tail() -> None:
    x = inputs(24)
    weight = torch.randn(40, 24)
    moment = x.T @ x / len(x)
    scale = whitening(moment)
    white = torch.linalg.solve_triangular(scale, x.double().T, upper=False)
    assert torch.allclose(white @ white.T / len(x), torch.eye(24, dtype=torch.float64), atol=2e-2)
    rank = 9
    down, up = factorize(weight, scale, rank)
    assert (down.shape, up.shape) == ((9, 24), (40, 9))
    lost = float(((weight - up @ down).double() @ x.double().T).square().sum() / len(x))
    tail = torch.linalg.svdvals(weight.double() @ scale)[rank:].square().sum()
    assert lost == pytest.approx(float(tail), rel=1e-3)
    # Eckart-Young in the whitened space: the plain SVD of the weight loses more on these inputs.
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    plain = (left[:, :rank] * values[:rank]) @ right[:rank]
    assert lost < float(((weight - plain) @ x.T).square().sum() / len(x))


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(32, 96), torch.nn.Linear(96, 16, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).relu())


def net() -> Model:
    torch.manual_seed(1)
    spec = (TensorSpec("x", "float32", (5, 32)),), (TensorSpec("output", "float32", (5, 16)),)
    module = Net().eval().requires_grad_(False)
    source = Source("factory", "net", {})
    return Model("net", module, source, "other", "other", *spec, {"x": torch.randn(5, 32)}, huggingface=False)


@pytest.mark.parametrize("scaling", ["whiten", "mean_abs"])
def test_layers_are_replaced_and_a_full_rank_changes_nothing(scaling: str) -> None:
    model = net()
    samples = [{"x": inputs(32, 40)} for _ in range(4)]
    step = LowRank(method="lowrank", keep=0.5, scaling=scaling, multiple=1)
    made, errors = factorize_layers(model, step, samples)
    assert factor_ranks(made.module) == choose_ranks(model, step) == {"first": 12, "second": 6}
    assert isinstance(made.module.first, FactoredLinear)
    assert torch.equal(made.module.first.factor_up.bias, model.module.first.bias)
    assert made.module.second.factor_up.bias is None
    assert sum(p.numel() for p in made.module.parameters()) < 0.55 * sum(p.numel() for p in model.module.parameters())
    hidden = torch.cat([sample["x"] for sample in samples])
    weight, bias = model.module.first.weight, model.module.first.bias
    before, after = hidden @ weight.T, made.module.first(hidden) - bias
    assert errors["first"] == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-3)
    assert isinstance(model.module.first, torch.nn.Linear)  # the given model is as it was
    scale = whitening(Moments(hidden.T @ hidden, hidden.abs().sum(0), hidden.abs().amax(0), len(hidden)).second)
    down, up = factorize(weight, scale, 32)
    assert torch.allclose(up @ down, weight, atol=1e-4)


def test_what_can_not_be_kept() -> None:
    with pytest.raises(BadInputError, match="not even rank 1"):
        choose_ranks(net(), LowRank(method="lowrank", keep=0.01))
    with pytest.raises(BadInputError, match="matches no weight"):
        choose_ranks(net(), LowRank(method="lowrank", keep=0.5, exclude=("third.*",)))
    assert list(choose_ranks(net(), LowRank(method="lowrank", keep=0.5, exclude=("first.*",)))) == ["second"]
