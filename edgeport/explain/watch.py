"""Which values inside a shipped file are the layers' outputs and inputs, and how they are compared."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from edgeport.explain.document import LayerError, LayerErrors, Missing
from edgeport.explain.errors import Sums, aligned
from edgeport.explain.reference import Call, bias_of, run_original, watched
from edgeport.explain.shipped import Shipped, module_of

if TYPE_CHECKING:
    import numpy as np

    from edgeport.model.types import Model

    Arrays = Mapping[str, np.ndarray]

Watch = Callable[[int, int, str], None]
"""Told (steps done, steps in all, what)."""

SIDE_BRANCHES = " What the recipe's qera added beside a layer is not in the layer's own value."
RESCALED = 0.5
"""A scale for each channel that takes away more than this share of an error was put there by the recipe."""


@dataclass(frozen=True)
class Value:
    """A value in the file.

    Attributes:
        name: of the tensor.
        columns: first and one past the last of the layer's own, where the file computes several layers at once.
        scale, zero: the tensor holds codes, and (codes - zero) * scale is the value.
        low, high: the file clamps the value to them.
    """

    name: str
    columns: tuple[int, int] | None = None
    scale: float | None = None
    zero: int = 0
    low: float = float("-inf")
    high: float = float("inf")

    def read(self, values: Arrays) -> np.ndarray:
        """The value as float32."""
        import numpy as np

        array = values[self.name]
        if self.scale is not None:
            array = (array.astype(np.float32) - np.float32(self.zero)) * np.float32(self.scale)
        return array if self.columns is None else array[..., self.columns[0] : self.columns[1]]


@dataclass(frozen=True)
class Place:
    """One layer in the file.

    Attributes:
        layer: the module; parameter: its weight.
        call: which of the module's calls it is, from 0.
        input: what it reads; None where the file holds no such value.
        reads_floats: False for a lookup of rows, in which an error begins anew.
    """

    layer: str
    parameter: str
    call: int
    output: Value
    input: Value | None
    reads_floats: bool = True


@dataclass(frozen=True)
class Watched:
    """A shipped file whose inner values can be seen.

    Attributes:
        source, statement: how the values come about (`edgeport.explain.document.LayerErrors`).
        places: in the order in which the file computes them.
        missing: layers that were not found.
        run: the values of all places for one golden input, by name.
        output_change: how far watching changed the file's own outputs so far; None for a logical form.
    """

    source: Literal["shipped graph", "logical form"]
    statement: str
    places: tuple[Place, ...]
    missing: tuple[Missing, ...]
    run: Callable[[Arrays], Arrays]
    output_change: Callable[[], float] | None


def compare_layers(shipped: Shipped, model: Model, file: Watched, watch: Watch) -> LayerErrors:
    """Every layer of the file against the original's, over the golden inputs."""
    modules = {name for name, _ in model.module.named_modules()}
    places = [place for place in file.places if place.layer in modules]
    layers = sorted({place.layer for place in places})
    outputs, inputs = ({place: Sums() for place in places} for _ in range(2))
    rescales = any(step.method in ("awq", "smooth") for step in shipped.recipe.prepare)
    scaled = {place: Sums() for place in places} if rescales else {}
    biases = {layer: bias_of(model, layer) for layer in layers}
    added = dict.fromkeys(place.layer for place in file.places if place.layer not in modules)
    missing = [*file.missing, *(Missing(layer=layer, why="the recipe added it") for layer in added)]
    for index, sample in enumerate(shipped.samples):
        watch(index, len(shipped.samples), f"sample {index + 1} of {len(shipped.samples)}")
        with watched(model, layers) as calls:
            run_original(model, sample, cached=shipped.artifact.context is not None)
        values = file.run(sample)
        mask = sample.get("attention_mask")
        for place in list(outputs):
            why = _add(place, calls[place.layer], values, mask, biases[place.layer], outputs, inputs, scaled)
            if why is not None:
                missing.append(Missing(layer=place.layer, why=why))
                del outputs[place]
    rows: list[LayerError] = []
    for place, sums in outputs.items():
        if rescales and scaled[place].relative < RESCALED * sums.relative:
            why = "the recipe rescaled its channels, and the layers behind it take that back"
            missing.append(Missing(layer=place.layer, why=why))
            continue
        rows.append(_row(place, sums, inputs[place], rows[-1].relative_error if rows else 0.0, shipped))
    watch(len(shipped.samples), len(shipped.samples), "compared")
    return LayerErrors(
        source=file.source,
        statement=file.statement + (SIDE_BRANCHES if shipped.recipe.correct is not None else ""),
        samples=len(shipped.samples),
        output_change=None if file.output_change is None else file.output_change(),
        rows=tuple(rows),
        grows_most=grows_most(rows),
        missing=tuple(missing),
    )


def grows_most(rows: Iterable[LayerError]) -> str | None:
    """The layer at which the error grows most, the first of equals."""
    found = max(rows, key=lambda row: row.growth, default=None)
    return None if found is None else found.layer


def _add(
    place: Place,
    calls: list[Call],
    values: Arrays,
    mask: np.ndarray | None,
    bias: np.ndarray | None,
    outputs: dict[Place, Sums],
    inputs: dict[Place, Sums],
    scaled: dict[Place, Sums],
) -> str | None:
    """Add one sample of one layer to its sums; what is wrong, in words, where it can't be."""
    import numpy as np

    if place.call >= len(calls):
        return f"the original calls it {len(calls)} times, the file more often"
    call = calls[place.call]
    found = place.output.read(values)
    best: tuple[np.ndarray, np.ndarray] | None = None
    for reference in [call.output] if bias is None else [call.output, call.output - _spread(bias, call.output)]:
        # The file may add a layer's bias later, together with something else.
        clamped = np.clip(reference, place.output.low, place.output.high)
        pair = aligned(found, clamped, mask)
        if pair is not None and (best is None or _distance(pair) < _distance(best)):
            best = pair
    if best is None:
        return f"the file's value has the shape {found.shape}, the original's {call.output.shape}"
    outputs[place].add(*best)
    if place in scaled:
        scaled[place].add(_without_scale(*best), best[1])
    if place.input is not None and call.input is not None:
        reference = np.clip(call.input, place.input.low, place.input.high)
        pair = aligned(place.input.read(values), reference, mask)
        if pair is not None:
            inputs[place].add(*pair)
    return None


def _spread(bias: np.ndarray, output: np.ndarray) -> np.ndarray:
    """A bias in a shape that can be taken off an output: channels are second in pictures, else last."""
    return (
        bias.reshape(-1, *[1] * (output.ndim - 2))
        if output.ndim in (3, 4) and output.shape[1] == bias.size and (output.shape[-1] != bias.size)
        else bias
    )


def _distance(pair: tuple[np.ndarray, np.ndarray]) -> float:
    sums = Sums()
    sums.add(*pair)
    return sums.difference


def _without_scale(found: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """The value with each channel on the scale that brings it closest to the reference."""
    import numpy as np

    axes = (0, 2, 3) if found.ndim == 4 else (0,)
    square = (found.astype(np.float64) ** 2).sum(axis=axes, keepdims=True)
    product = (found.astype(np.float64) * reference).sum(axis=axes, keepdims=True)
    scale = np.divide(product, square, out=np.ones_like(product), where=square > 0)
    closest: np.ndarray = (found * scale).astype(np.float32)
    return closest


def _row(place: Place, sums: Sums, given: Sums, before: float, shipped: Shipped) -> LayerError:
    record = shipped.records.get(place.parameter)
    input_error = given.relative if given.reference > 0 else None
    return LayerError(
        layer=place.layer,
        parameter=place.parameter,
        place=place.output.name,
        group=shipped.groups.get(place.parameter, "other"),
        format="float" if record is None else record.format,
        activation="float" if record is None else record.activation,
        relative_error=sums.relative,
        snr_db=sums.snr_db,
        cosine=sums.cosine,
        worst=sums.worst,
        input_error=input_error,
        growth=sums.relative - (input_error if input_error is not None else before if place.reads_floats else 0.0),
    )


def layers_of(shipped: Shipped) -> dict[str, tuple[str, ...]]:
    """The layers that use each weight, by its parameter's name: several where it is tied."""
    return {
        record.name: tuple(module_of(name) for name in (record.tied or (record.name,))) for record in shipped.layers
    }


def of_kind(layers: Sequence[str], kinds: Sequence[str], *, lookup: bool) -> list[str]:
    """Of the layers that share a weight those that look it up, or those that multiply by it.

    A tied weight's record has its names in the model's order, embeddings first.
    """
    if "embedding" not in kinds:
        return [] if lookup else list(layers)
    if len(kinds) == 1:
        return list(layers) if lookup else []
    return list(layers[:-1]) if lookup else list(layers[-1:])
