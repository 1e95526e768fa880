"""What the watched forward says about small nets whose answer is plain to see."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from edgeport.compress.flow import Flow, read_flow


def flow_of(net: nn.Module, channels: int = 4) -> Flow:
    names = {f"{name}.weight": layer for name, layer in net.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)}
    return read_flow(net.eval(), names, {"x": torch.randn(1, channels, 8, 8)})


class Net(nn.Module):
    """Three convolutions; subclasses say what is between them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))


class Chain(Net):
    """Clamps as functions and in place, padding, pooling: all of it keeps the grid."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.pad(F.relu6(self.a(x)), (0, 1, 0, 1))
        y = F.max_pool2d(F.relu(self.b(y), inplace=True), 2)
        return self.c(y)


def test_a_chain_shares_its_grids() -> None:
    flow = flow_of(Chain())
    assert flow.bounds == {"a.weight": (0.0, 6.0), "b.weight": (0.0, float("inf"))}
    assert flow.source == {"b.weight": "a.weight", "c.weight": "b.weight"}
    assert flow.reached == {"a.weight", "b.weight", "c.weight"}


class Residual(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        return self.c(F.relu(y + self.b(y)))


def test_a_sum_is_nobodys_output() -> None:
    flow = flow_of(Residual())
    assert flow.bounds == {}
    assert flow.source == {"b.weight": "a.weight"}


class Swish(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        y = self.b(y * F.relu6(y + 3) / 6)
        return self.c(F.pad(y, (1, 1, 1, 1), value=0.5))


def test_products_and_padding_with_other_values_make_new_tensors() -> None:
    flow = flow_of(Swish())
    assert flow.bounds == {}
    assert flow.source == {}


class TwoReaders(Net):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.a(x)
        return self.b(F.relu6(y)), self.c(y)


def test_a_clamp_that_not_every_reader_goes_through_is_none() -> None:
    flow = flow_of(TwoReaders())
    assert flow.bounds == {}
    assert flow.source == {"c.weight": "a.weight"}, "6 need not lie on the grid of the unclamped output"


class Returned(Net):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.a(x)
        return y, self.b(y.clamp(min=0))


def test_an_output_of_the_model_is_a_reader() -> None:
    flow = flow_of(Returned())
    assert flow.bounds == {}
    assert flow.reached == {"a.weight", "b.weight"}


class Added(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        y += 1
        return self.b(y)


def test_a_change_in_place_ends_what_was_known() -> None:
    assert flow_of(Added()).source == {}
