"""Zeros: exactly as many as promised, where the papers put them, and SparseGPT makes up for what they cost."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from edgeport.compress.prune.sparse import numbers_left, sparse_layers, sparsegpt, sparsified, sparsify_layers
from edgeport.compress.statistics import Moments
from edgeport.errors import BadInputError
from edgeport.model.types import Model, Source, TensorSpec
from edgeport.restructuring import Sparsify

METHODS = ("magnitude", "wanda", "sparsegpt")


def moments(x: torch.Tensor) -> Moments:
    return Moments(x.T @ x, x.abs().sum(0), x.abs().amax(0), len(x))


def correlated(count: int, columns: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) + 2 * torch.eye(columns)
    return torch.randn(count, columns, generator=generator) @ mixing * torch.linspace(0.1, 2, columns)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("kept", "group"), [(2, 4), (1, 4), (4, 8)])
def test_n_of_every_m_are_left(method: str, kept: int, group: int) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(20, 144), correlated(300, 144, 0)
    found = sparsified(weight, moments(x), Sparsify(method=method, pattern=f"{kept}:{group}"))
    assert ((found.reshape(20, -1, group) != 0).sum(-1) == kept).all()
    assert int((found != 0).sum()) == numbers_left((20, 144), Sparsify(method=method, pattern=f"{kept}:{group}"))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.77])
def test_the_share_of_zeros_is_exact(method: str, sparsity: float) -> None:
    torch.manual_seed(0)
    step = Sparsify(method=method, sparsity=sparsity)
    found = sparsified(torch.randn(20, 150), moments(correlated(300, 150, 0)), step)
    assert int((found != 0).sum()) == numbers_left((20, 150), step)
    assert int((found == 0).sum()) == pytest.approx(sparsity * 3000, abs=20)


def test_wanda_ranks_each_row_by_weight_times_norm_of_the_input() -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(6, 16), correlated(50, 16, 3)
    found = sparsified(weight, moments(x), Sparsify(method="wanda", sparsity=0.5))
    norms = [float(x[:, column].norm()) for column in range(16)]
    for row in range(6):
        scores = [abs(float(weight[row, column])) * norms[column] for column in range(16)]
        kept = sorted(range(16), key=lambda column: -scores[column])[:8]
        assert sorted(kept) == found[row].nonzero().flatten().tolist()
        assert torch.equal(found[row, kept], weight[row, kept])


def slow_sparsegpt(weight: torch.Tensor, hessian: torch.Tensor, kept: int, group: int, damping: float) -> torch.Tensor:
    """Column after column with the inverse of what is left of H, as the paper's equation 4 has it (no Cholesky)."""
    values, columns = weight.double().clone(), weight.shape[1]
    damped = hessian.double() + damping * hessian.double().diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    chosen = torch.zeros_like(values, dtype=torch.bool)
    for column in range(columns):
        if column % group == 0:
            scores = torch.stack(
                [
                    values[:, place] ** 2 / torch.linalg.inv(damped[place:, place:])[0, 0]
                    for place in range(column, column + group)
                ],
                dim=1,
            )
            order = torch.sort(scores, dim=1, stable=True).indices[:, : group - kept]
            chosen[:, column : column + group] = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, True)
        inverse = torch.linalg.inv(damped[column:, column:])
        error = torch.where(chosen[:, column], values[:, column], 0.0) / inverse[0, 0]
        values[:, column:] -= error[:, None] * inverse[0][None]
        values[:, column] = torch.where(chosen[:, column], 0.0, values[:, column])
    return values.float()


def test_sparsegpt_is_the_slow_one() -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(7, 136), correlated(400, 136, 1)
    hessian = x.T @ x / len(x)
    step = Sparsify(method="sparsegpt", pattern="2:4")
    found, wanted = sparsegpt(weight, hessian, step), slow_sparsegpt(weight, hessian, 2, 4, 0.01)
    assert torch.equal(found != 0, wanted != 0)
    assert float((found - wanted).norm()) < 1e-3 * float(wanted.norm())


@pytest.mark.parametrize("how", [{"sparsity": 0.5}, {"pattern": "2:4"}])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_error_falls_from_magnitude_to_wanda_to_sparsegpt(how: dict[str, object], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight, x = torch.randn(64, 128, generator=generator), correlated(512, 128, seed)
    errors = []
    for method in METHODS:
        found = sparsified(weight, moments(x), Sparsify(method=method, **how))
        errors.append(float(((found - weight) @ x.T).norm()))
    assert errors[2] < errors[1] < errors[0]


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(32, 66), torch.nn.Linear(66, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).relu())


def net() -> Model:
    torch.manual_seed(1)
    spec = (TensorSpec("x", "float32", (5, 32)),), (TensorSpec("output", "float32", (5, 16)),)
    source = Source("factory", "net", {})
    module = Net().eval().requires_grad_(False)
    return Model("net", module, source, "other", "other", *spec, {"x": torch.randn(5, 32)}, huggingface=False)


def test_a_model_says_how_many_numbers_are_left() -> None:
    model = net()
    step = Sparsify(method="sparsegpt", sparsity=0.6)
    made, errors = sparsify_layers(model, step, [{"x": correlated(60, 32, 5)}])
    for name in ("first", "second"):
        weight = made.module.get_submodule(name).weight
        assert int((weight != 0).sum()) == made.sparse[f"{name}.weight"]
        assert 0 < errors[name] < 1
    assert bool((model.module.first.weight != 0).all())


def test_impossible_patterns() -> None:
    with pytest.raises(BadInputError, match="Rows of 66 weights"):
        sparse_layers(net(), Sparsify(method="magnitude", pattern="2:4"))
    assert list(sparse_layers(net(), Sparsify(method="magnitude", pattern="2:4", exclude=("second.*",)))) == ["first"]
    for wrong in ({"pattern": "4:4"}, {"pattern": "0:4"}, {"pattern": "2:4", "sparsity": 0.5}, {}, {"sparsity": 1.0}):
        with pytest.raises(ValidationError):
            Sparsify(method="magnitude", **wrong)
