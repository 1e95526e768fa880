"""Folding batch norms: the same function with fewer layers, and only where it is the same function."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from edgeport.model.efficientnet_lite import EfficientNetLite
from edgeport.model.fold import fold_norms, remove_parametrizations
from edgeport.model.mobilenet_v2 import MobileNetV2


def trained(module: nn.Module) -> nn.Module:
    """Statistics as after training: with the defaults, a fold that forgot them would go unseen."""
    torch.manual_seed(0)
    for child in module.modules():
        if isinstance(child, (nn.BatchNorm1d, nn.BatchNorm2d)):
            child.running_mean.normal_()
            child.running_var.uniform_(0.5, 2)
            child.weight.data.uniform_(0.5, 2)
            child.bias.data.normal_()
    return module.eval()


def norms(module: nn.Module) -> int:
    return sum(isinstance(child, (nn.BatchNorm1d, nn.BatchNorm2d)) for child in module.modules())


class TwoReaders(nn.Module):
    """The convolution's output also goes around the batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        return self.norm(y) + y


class CalledTwice(nn.Module):
    """One convolution and norm at two places."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.norm = nn.BatchNorm2d(3)
        self.other = nn.BatchNorm2d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.other(self.conv(self.norm(self.conv(x))))


class Named(nn.Module):
    """Depthwise, strided and biased convolutions, an activation between conv and norm, and a 1-D pair."""

    def __init__(self) -> None:
        super().__init__()
        self.b = nn.ModuleDict({"n": nn.BatchNorm2d(6)})
        self.a = nn.Conv2d(6, 6, 3, stride=2, padding=1, groups=6, bias=True)
        self.c = nn.Conv2d(6, 4, 1, bias=False)
        self.late = nn.BatchNorm2d(4)
        self.line = nn.Sequential(nn.Conv1d(4, 5, 3), nn.BatchNorm1d(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.b["n"](self.a(x))
        y = self.late(torch.relu(self.c(y)))
        return self.line(y.flatten(2))


def test_folds_what_feeds_each_other_whatever_it_is_called() -> None:
    module = trained(Named())
    x = torch.randn(2, 6, 8, 8)
    folded = copy.deepcopy(module)
    assert fold_norms(folded, {"x": x}) == 2
    assert norms(folded) == 1  # the one behind the activation
    with torch.no_grad():
        torch.testing.assert_close(folded(x), module(x), rtol=1e-5, atol=1e-5)


def test_leaves_alone_what_has_another_reader_or_is_called_twice() -> None:
    for module in (TwoReaders(), CalledTwice()):
        module = trained(module)
        before = norms(module)
        assert fold_norms(module, {"x": torch.randn(1, 3, 4, 4)}) == 0
        assert norms(module) == before


@pytest.mark.parametrize(("network", "count"), [(EfficientNetLite, 49), (MobileNetV2, 52)])
def test_a_classifier_folds_whole(network: type[nn.Module], count: int) -> None:
    module = trained(network(classes=10))
    folded = copy.deepcopy(module)
    x = torch.randn(1, 3, 64, 64)
    assert fold_norms(folded, {"pixel_values": x}) == count
    assert norms(folded) == 0
    with torch.no_grad():
        torch.testing.assert_close(folded(x), module(x), rtol=1e-4, atol=1e-5)


def test_a_weight_norm_becomes_a_plain_parameter_with_its_effective_value() -> None:
    torch.manual_seed(0)
    layer = weight_norm(nn.Conv1d(3, 4, 5))
    layer.parametrizations.weight.original0.data.mul_(2)  # magnitudes that are not the direction's own norm
    expected = layer.weight.detach().clone()
    module = nn.Sequential(layer).requires_grad_(False)
    assert remove_parametrizations(module) == 1
    assert dict(module.named_parameters()).keys() == {"0.weight", "0.bias"}
    assert torch.equal(module[0].weight, expected)
