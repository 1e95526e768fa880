"""A training's state in one file, which is never half-written.

A safetensors file: `value.I` and `best.I` of parameter I, `KEY.I` of the optimizer's state for it, `random`; what is no
tensor is JSON in its metadata. Numbers come back with the same bits.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from pydantic import TypeAdapter
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from edgeport.errors import BadInputError


@dataclass(frozen=True)
class Curve:
    """What a training saw.

    Attributes:
        before, after: loss on the held-out inputs, at the start and of the values that are left.
        best: update after which they were reached; 0 for the start.
        steps: updates made.
        held_out: (update, loss on the held-out inputs) of every check.
        training: (update, mean training loss since the last check) of every check.
        ended: "all steps", "no better" (patience), or "diverged".
    """

    before: float
    after: float
    best: int = 0
    steps: int = 0
    held_out: tuple[tuple[int, float], ...] = ()
    training: tuple[tuple[int, float], ...] = ()
    ended: str = "all steps"


@dataclass
class State:
    """What a run is at; with it, and the same inputs, the rest of the run is decided.

    Attributes:
        parameters: what is trained, in the optimizer's order.
        best: their values at the best check.
        since: sum of the training losses since the last check.
    """

    parameters: list[torch.nn.Parameter]
    optimizer: torch.optim.Optimizer
    generator: torch.Generator
    best: list[torch.Tensor]
    curve: Curve
    since: float = 0.0
    rates: list[float] = field(default_factory=list)


def write_checkpoint(path: Path, identity: str, state: State) -> None:
    """Write the state under a temporary name, then rename it.

    Raises:
        BadInputError: it can't be written.
    """
    tensors = {"random": state.generator.get_state()}
    newest_is_best = state.curve.best == state.curve.steps
    for index, parameter in enumerate(state.parameters):
        tensors[f"value.{index}"] = parameter.detach()
        if not newest_is_best:
            tensors[f"best.{index}"] = state.best[index]
        for key, value in state.optimizer.state[parameter].items():
            tensors[f"{key}.{index}"] = value
    record = {"identity": identity, "curve": asdict(state.curve), "since": state.since}
    temporary = path.with_name(f".{path.name}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = {name: value.cpu().contiguous() for name, value in tensors.items()}
        save_file(whole, temporary, metadata={"state": json.dumps(record)})
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise BadInputError(
            f"The training's checkpoint can't be written: {error}.",
            where=path,
            next_step="Free some space, or set EDGEPORT_CACHE to a folder on another disk.",
        ) from error


def read_checkpoint(path: Path, identity: str, state: State) -> tuple[Curve, float]:
    """Put a state back into parameters, optimizer, best values and random numbers; what is left is returned: the curve
    and the sum of the losses since the last check.

    Raises:
        BadInputError: the file is damaged, or of another run.
    """
    try:
        with safe_open(path, framework="pt") as file:
            record = json.loads((file.metadata() or {})["state"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
        curve = TypeAdapter(Curve).validate_python(record["curve"])
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise BadInputError(
            f"The training's checkpoint can't be read: {error}.", where=path, next_step="Delete it to start again."
        ) from error
    shapes = [tensors[f"value.{index}"].shape for index in range(sum(name.startswith("value.") for name in tensors))]
    if record["identity"] != identity or shapes != [parameter.shape for parameter in state.parameters]:
        raise BadInputError(
            "The checkpoint is of another training: other settings, data or models.",
            where=path,
            next_step="Delete it to start again.",
        )
    with torch.no_grad():
        for index, parameter in enumerate(state.parameters):
            parameter.copy_(tensors[f"value.{index}"])
            best = tensors.get(f"best.{index}", tensors[f"value.{index}"])
            state.best.append(best.to(parameter.device).clone())
            found = {
                name.rpartition(".")[0]: value
                for name, value in tensors.items()
                if name.endswith(f".{index}") and not name.startswith(("value.", "best."))
            }
            # torch keeps the count of steps where it was made: on the CPU but for fused optimizers on a GPU.
            state.optimizer.state[parameter] = {
                name: value.to(parameter.device).clone() for name, value in found.items()
            }
    state.generator.set_state(tensors["random"])
    return curve, float(record["since"])
