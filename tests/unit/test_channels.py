"""Channels of conv nets: what hangs together is found, and the narrow net is the original with the rest masked."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from edgeport.compress.prune.channels import bundle_scores, find_bundles
from edgeport.compress.prune.narrow import choose_channels, cut_channels
from edgeport.compress.prune.repair import RIDGE, repair_channels
from edgeport.errors import BadInputError
from edgeport.model.types import Model, Source, TensorSpec
from edgeport.restructuring import PruneChannels


def conv(inputs: int, outputs: int, size: int = 1, groups: int = 1, *, norm: bool = True) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(inputs, outputs, size, padding=size // 2, groups=groups, bias=not norm)]
    return nn.Sequential(*layers, *([nn.BatchNorm2d(outputs)] if norm else []), nn.ReLU6())


class Squeeze(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(channels, 8, 1), nn.Conv2d(8, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.up(self.down(x.mean((2, 3), keepdim=True)).relu()).sigmoid()


class Residual(nn.Module):
    """Inverted residuals with squeeze and excitation, as MobileNets and EfficientNets have them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 16, 3)
        self.grow, self.depth, self.squeeze = conv(16, 32), conv(32, 32, 3, 32), Squeeze(32)
        self.project = nn.Conv2d(32, 16, 1)
        self.head = conv(16, 24)
        self.classifier = nn.Linear(24, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = x + self.project(self.squeeze(self.depth(self.grow(x))))
        return self.classifier(self.head(x).mean((2, 3)))


class Dense(nn.Module):
    """Concatenation, and a flattened picture in front of a Linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = conv(3, 8, 3, norm=False), conv(8, 8, 3)
        self.third = conv(16, 12, 3)
        self.inner, self.classifier = nn.Linear(12 * 16, 16), nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.max_pool2d(self.first(x), 2)
        x = torch.cat([x, self.second(x)], 1)
        return self.classifier(self.inner(self.third(x).flatten(1)).relu())


class Shared(nn.Module):
    """One layer that runs twice, and a softmax over channels: neither can be cut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.twice = conv(3, 8, 3), conv(8, 8, 3)
        self.mixed, self.free, self.classifier = conv(8, 8), conv(8, 16), nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.twice(self.twice(self.stem(x)))
        return self.classifier(self.free(self.mixed(x).softmax(1)).mean((2, 3)))


def model_of(module: nn.Module) -> Model:
    with torch.no_grad():
        for layer in module.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.running_mean.normal_()
                layer.running_var.uniform_(0.5, 2)
                layer.weight.uniform_(0.5, 2)
                layer.bias.normal_()
    spec = (TensorSpec("x", "float32", (1, 3, 8, 8)),), (TensorSpec("output", "float32", (1, 5)),)
    source = Source("factory", "net", {})
    example = {"x": torch.randn(1, 3, 8, 8)}
    frozen = module.eval().requires_grad_(False)
    return Model("net", frozen, source, "image-classification", "image", *spec, example, huggingface=False)


@pytest.fixture
def residual() -> Model:
    torch.manual_seed(0)
    return model_of(Residual())


def pictures(count: int = 3) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"x": torch.randn(1, 3, 8, 8, generator=generator)} for _ in range(count)]


def test_what_is_added_and_multiplied_goes_together(residual: Model) -> None:
    found = find_bundles(residual)
    groups = {bundle.layers for bundle in found}
    assert groups == {("stem.0", "project"), ("grow.0", "squeeze.up"), ("squeeze.down",), ("head.0",)}
    stream = next(bundle for bundle in found if ("stem.0", 3) in bundle.writers)
    assert set(stream.writers) == {("stem.0", 3), ("project", 3)}
    assert set(stream.readers) == {("grow.0", 3), ("head.0", 3)}
    assert set(stream.carriers) == {("stem.1", 3)}
    inner = next(bundle for bundle in found if ("grow.0", 7) in bundle.writers)
    assert set(inner.readers) == {("squeeze.down", 7), ("project", 7)}
    assert set(inner.carriers) == {("grow.1", 7), ("depth.0", 7), ("depth.1", 7)}


def _masked(model: Model, kept: dict[str, tuple[int, ...]]) -> nn.Module:
    """The original whose readers see zeros in the removed channels."""
    module = copy.deepcopy(model.module)
    for key, channels in kept.items():
        kind, _, name = key.partition(".")
        if kind == "in":
            with torch.no_grad():
                weight = module.get_submodule(name).weight
                mask = torch.zeros(weight.shape[1])
                mask[list(channels)] = 1
                weight.mul_(mask.reshape(1, -1, *[1] * (weight.ndim - 2)))
    return module


@pytest.mark.parametrize("make", [Residual, Dense])
def test_the_narrow_net_is_the_original_with_the_rest_masked(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = model_of(make())
    step = PruneChannels(method="prune_channels", keep=0.5, multiple=2)
    kept, lost = choose_channels(model, step, pictures())
    narrow = cut_channels(model, kept)
    masked = _masked(model, kept)
    for sample in pictures():
        assert torch.allclose(narrow.module(**sample), masked(**sample), atol=1e-5)
    assert sum(p.numel() for p in narrow.module.parameters()) < 0.5 * sum(p.numel() for p in model.module.parameters())
    assert all(0 <= value < 0.5 for value in lost.values())
    assert max(lost.values()) > 0
    assert isinstance(model.module.get_submodule("classifier"), nn.Linear)
    # Without data the shapes are the same.
    shapes = [tuple(p.shape) for p in cut_channels(model, choose_channels(model, step, ())[0]).module.parameters()]
    assert shapes == [tuple(p.shape) for p in narrow.module.parameters()]
    for layer in narrow.module.modules():
        if isinstance(layer, nn.Conv2d):
            assert layer.weight.shape[:2] == (layer.out_channels, layer.in_channels // layer.groups)


def test_a_flattened_channel_takes_all_its_features(residual: Model) -> None:
    torch.manual_seed(0)
    found = find_bundles(model_of(Dense()))
    third = next(bundle for bundle in found if ("third.0", 2) in bundle.writers)
    assert set(third.readers) == {("inner", feature) for feature in range(2 * 16, 3 * 16)}
    first = next(bundle for bundle in found if ("first.0", 5) in bundle.writers)
    assert set(first.readers) == {("second.0", 5), ("third.0", 5)}
    second = next(bundle for bundle in found if ("second.0", 5) in bundle.writers)
    assert set(second.readers) == {("third.0", 8 + 5)}


class InPlace(nn.Module):
    """A residual branch that is added into the very output of a convolution, as ResNets of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.grow, self.back = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 1), nn.Conv2d(16, 8, 1)
        self.classifier = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        y = self.back(self.grow(x).relu_())
        y += x
        return self.classifier(y.relu_().mean((2, 3)))


def test_what_is_written_in_place_goes_together() -> None:
    torch.manual_seed(0)
    groups = {bundle.layers for bundle in find_bundles(model_of(InPlace()))}
    assert groups == {("stem", "back"), ("grow",)}


def test_what_can_not_be_cut_stays_whole() -> None:
    torch.manual_seed(0)
    assert {bundle.layers for bundle in find_bundles(model_of(Shared()))} == {("free.0",)}


def test_scores_are_the_energy_that_readers_get(residual: Model) -> None:
    bundles = find_bundles(residual)
    index = next(i for i, bundle in enumerate(bundles) if ("head.0", 4) in bundle.writers)
    value = bundle_scores(residual, bundles, pictures())[index]
    seen: list[float] = []
    handle = residual.module.classifier.register_forward_pre_hook(lambda _l, args: seen.append(float(args[0][0, 4])))
    for sample in pictures():
        residual.module(**sample)
    handle.remove()
    weight = residual.module.classifier.weight[:, 4].double()
    assert value == pytest.approx(sum(x * x for x in seen) / 3 * float(weight.square().sum()), rel=1e-5)


def test_excluded_layers_and_nothing_left(residual: Model) -> None:
    step = PruneChannels(method="prune_channels", keep=0.5, multiple=2, exclude=("stem.*", "head.*"))
    kept, _ = choose_channels(residual, step, pictures())
    assert {key for key in kept if key.startswith("out.")} == {"out.grow.0", "out.squeeze.up", "out.squeeze.down"}
    with pytest.raises(BadInputError, match="matches no convolution"):
        choose_channels(residual, PruneChannels(method="prune_channels", keep=0.5, exclude=("nothing",)), ())
    with pytest.raises(BadInputError, match="No channel"):
        choose_channels(residual, PruneChannels(method="prune_channels", keep=0.5, multiple=64), ())


@pytest.mark.parametrize("name", ["project", "depth.0", "classifier"])
def test_a_solved_layer_is_the_least_squares_solution(name: str, residual: Model) -> None:
    kept, _ = choose_channels(residual, PruneChannels(method="prune_channels", keep=0.5, multiple=2), pictures(20))
    cut = cut_channels(residual, kept)
    solved = repair_channels(cut, residual, kept, pictures(20))
    layer, before = solved.module.get_submodule(name), cut.module.get_submodule(name)
    systems, targets = [], []
    for sample in pictures(20):
        given, _ = seen(solved.module, name, sample)
        _, wanted = seen(residual.module, name, sample)
        wanted = wanted[:, list(kept.get(f"out.{name}", kept.get(f"through.{name}", range(wanted.shape[1]))))]
        if isinstance(layer, nn.Linear):
            systems.append(given)
        else:
            systems.append(nn.functional.unfold(given, layer.kernel_size, padding=layer.padding)[0].T)
            wanted = wanted.flatten(2)[0].T
        targets.append(wanted)
    x, y = torch.cat(systems).double(), torch.cat(targets).double()
    groups = getattr(layer, "groups", 1)
    for group in range(groups):
        width, rows = x.shape[1] // groups, y.shape[1] // groups
        part = x[:, group * width : (group + 1) * width]
        if layer.bias is not None:
            part = torch.cat([part, torch.ones(len(part), 1)], 1)
        own = slice(group * rows, (group + 1) * rows)
        start, found = (
            torch.cat([one.weight[own].flatten(1), *([] if one.bias is None else [one.bias[own, None]])], 1).double()
            for one in (before, layer)
        )
        # Minimise ||y - W x||^2 + r ||W - start||^2, as one system with further rows for the second term.
        root = (RIDGE * part.square().sum(0).mean()).sqrt()
        if root == 0:
            assert torch.equal(found, start), "a channel that is always 0 says nothing of its weights"
            continue
        stacked = torch.cat([part, root * torch.eye(part.shape[1], dtype=torch.float64)])
        wanted_rows = torch.cat([y[:, own], root * start.T])
        assert torch.allclose(found, torch.linalg.lstsq(stacked, wanted_rows).solution.T, atol=1e-4)


def test_a_layer_with_fewer_inputs_than_weights_stays_as_it_is(residual: Model) -> None:
    kept, _ = choose_channels(residual, PruneChannels(method="prune_channels", keep=0.5, multiple=2), pictures())
    cut = cut_channels(residual, kept)
    before, few, enough = (
        model.module.get_submodule("classifier").weight
        for model in (cut, *(repair_channels(cut, residual, kept, pictures(count)) for count in (2, 20)))
    )
    assert torch.equal(few, before)
    assert not torch.allclose(enough, before)


def seen(module: nn.Module, name: str, sample: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    handle = module.get_submodule(name).register_forward_hook(lambda _l, args, out: found.append((args[0], out)))
    module(**sample)
    handle.remove()
    return found[0]


def test_solving_again_brings_the_outputs_nearer(residual: Model) -> None:
    kept, _ = choose_channels(residual, PruneChannels(method="prune_channels", keep=0.5, multiple=2), pictures())
    cut = cut_channels(residual, kept)
    solved = repair_channels(cut, residual, kept, pictures())

    def distance(model: Model) -> float:
        pairs = [(model.module(**sample), residual.module(**sample)) for sample in pictures()]
        return sum(float((one - other).square().sum()) for one, other in pairs)

    assert distance(solved) < 0.5 * distance(cut)
    same = repair_channels(residual, residual, {}, pictures())
    for one, other in zip(same.module.parameters(), residual.module.parameters(), strict=True):
        assert torch.equal(one, other), "a net that lost nothing stays as it is"
