"""The places where activations are rounded to fixed grids: what they hold, and what rounding them costs.

A site is the input of a layer, or the output of one whose backend wants integers there too. Layers that follow each
other directly share the site between them (`flow.py`), so that a chain of convolutions stays in integers. A site's
cost is the divergence from the model with float activations that its rounding error e makes, by second order:
1/2 E[(g . e)^2], with the gradient g of `sensitivity.py`. Errors of different sites are taken as independent, so
costs add up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from edgeport.activations import ActivationGrid, fake_quantize
from edgeport.compress.backward import objective
from edgeport.compress.chain import call
from edgeport.compress.flow import Flow
from edgeport.compress.ranges import Histogram
from edgeport.errors import BadInputError

Inputs = Sequence[Mapping[str, torch.Tensor]]

DRAWS = 2
"""Gradients drawn for each of them."""


@dataclass(frozen=True)
class Site:
    """One rounded tensor: what the layer reads, or (`output`) what it gives, behind the clamp that follows."""

    layer: str
    output: bool


Layers = Mapping[str, torch.nn.Module]
Visit = Callable[[Site, torch.Tensor], torch.Tensor | None]


@contextmanager
def _visiting(layers: Layers, sites: Sequence[Site], visit: Visit) -> Iterator[None]:
    """Inside the block `visit` sees the tensor of every site, and may put another one in its place."""

    def before(site: Site) -> Any:
        def hook(_layer: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
            changed = visit(site, inputs[0])
            return None if changed is None else (changed, *inputs[1:])

        return hook

    def after(site: Site) -> Any:
        return lambda _layer, _inputs, output: visit(site, output)

    handles = [
        layers[site.layer].register_forward_hook(after(site))
        if site.output
        else layers[site.layer].register_forward_pre_hook(before(site))
        for site in sites
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _clamped(site: Site, value: torch.Tensor, flow: Flow) -> torch.Tensor:
    """A site's tensor as it is after the clamp that follows it."""
    bounds = flow.bounds.get(site.layer) if site.output else None
    return value if bounds is None else value.clamp(*bounds)


def observe(
    module: torch.nn.Module, layers: Layers, sites: Sequence[Site], flow: Flow, inputs: Inputs, *, counting: bool = True
) -> dict[Site, Histogram]:
    """Histograms of what every site holds over the calibration data; two forwards a sample.

    Args:
        counting: count the values; otherwise one forward a sample finds the ends alone.

    Raises:
        BadInputError: an activation is not finite; the message names the layer.
    """
    ends: dict[Site, tuple[float, float]] = {}

    def measure(site: Site, value: torch.Tensor) -> None:
        low, high = (float(end) for end in _clamped(site, value, flow).aminmax())
        if not (abs(low) < float("inf") and abs(high) < float("inf")):
            raise BadInputError(
                "The calibration data makes values that are not finite.",
                where=f"{'output' if site.output else 'input'} of layer {site.layer}",
                next_step="Check the checkpoint and its preprocessing; the uncompressed model overflows as well.",
            )
        before = ends.get(site, (low, high))
        ends[site] = min(low, before[0]), max(high, before[1])

    def count(site: Site, value: torch.Tensor) -> None:
        histograms[site].add(_clamped(site, value, flow))

    with torch.no_grad():
        with _visiting(layers, sites, measure):
            for sample in inputs:
                call(module, sample)
        histograms = {site: Histogram(*found) for site, found in ends.items()}
        with _visiting(layers, sites, count):
            for sample in inputs if counting else ():
                call(module, sample)
    return histograms


def measure_costs(
    module: torch.nn.Module,
    layers: Layers,
    grids: Mapping[Site, ActivationGrid],
    flow: Flow,
    inputs: Inputs,
    outputs: Sequence[str],
    *,
    seed: int = 0,
) -> dict[Site, float]:
    """What rounding each site alone adds to the divergence, in the units of `sensitivity.py`.

    Args:
        module: in eval mode. Its parameters' `requires_grad` is put back.
        inputs: samples as the module takes them.
        outputs: names of the outputs that count.
        seed: of the gradients drawn.
    """
    generator = torch.Generator().manual_seed(seed)
    costs = dict.fromkeys(grids, 0.0)

    def visit(site: Site, value: torch.Tensor) -> torch.Tensor:
        clamped = _clamped(site, value.detach(), flow)
        error = fake_quantize(clamped, grids[site]) - clamped
        # A tensor of its own: its gradient comes through this layer alone.
        own = value.view_as(value) if value.requires_grad else value.detach().requires_grad_()

        def note(gradient: torch.Tensor) -> None:
            costs[site] += 0.5 * float((gradient * error).sum(dtype=torch.float64)) ** 2

        own.register_hook(note)  # type: ignore[no-untyped-call]
        return own

    needed = [parameter.requires_grad for parameter in module.parameters()]
    module.requires_grad_(False)
    try:
        with _visiting(layers, list(grids), visit), torch.enable_grad():
            for sample in inputs:
                result = call(module, sample)
                for draw in range(DRAWS):
                    drawn = objective(result, outputs, generator)
                    drawn.backward(retain_graph=draw + 1 < DRAWS)  # type: ignore[no-untyped-call]
    finally:
        for parameter, value in zip(module.parameters(), needed, strict=True):
            parameter.requires_grad_(value)
    return {site: cost / (len(inputs) * DRAWS) for site, cost in costs.items()}
