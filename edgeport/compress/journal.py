"""What a long calibration has done so far, on disk: a run that was killed goes on at the block where it was.

    done-CHAIN-BLOCK.safetensors   the weights that were finished with that block
    hidden-CHAIN-BLOCK.safetensors the hidden states that it handed on, one a sample, and where blocks are tuned those
                                   of the float model; only the last one stays
    journal.json                   the last finished block, and what was noted about each weight

`journal.json` is written last and under a temporary name first, so it never speaks of files that are not whole.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from edgeport.compress.parts import form_of, read_tensor, tensors_of
from edgeport.quantized import QuantizedTensor
from edgeport.storage import canonical_json, read_json, write_text

JOURNAL = "journal.json"
HIDDEN, FLOAT = "hidden.", "float."
"""How the names of a file's hidden states begin."""


@dataclass(frozen=True)
class Note:
    """What a method leaves about one weight.

    Attributes:
        method: its name.
        output_error: relative error of the layer's output over the calibration inputs; None where it saw none.
    """

    method: str
    output_error: float | None


Made = tuple[QuantizedTensor, Note]


@dataclass
class Progressed:
    """How far a run came.

    Attributes:
        made: every finished weight, by name.
        position: chain and block that were finished last; None before the first.
        hidden: what that block handed on, for each sample.
        float_hidden: the same of the float model; empty where nothing asks for it.
    """

    made: dict[str, Made] = field(default_factory=dict)
    position: tuple[int, int] | None = None
    hidden: list[torch.Tensor] = field(default_factory=list)
    float_hidden: list[torch.Tensor] = field(default_factory=list)


class Journal:
    """A folder that belongs to one compression: its name holds the hash of everything that decides the result."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def finished(self) -> int:
        """How many weights a run before this one noted; none are read."""
        return len(read_json(self.folder / JOURNAL)["made"]) if (self.folder / JOURNAL).is_file() else 0

    def read(self) -> Progressed:
        """What was finished; nothing when there is no journal."""
        if not (self.folder / JOURNAL).is_file():
            return Progressed()
        record = read_json(self.folder / JOURNAL)
        found = Progressed(position=tuple(record["position"]))
        for name, entry in record["made"].items():
            with safe_open(self.folder / entry["file"], framework="pt") as file:
                found.made[name] = (read_tensor(file, name, entry["form"]), Note(**entry["note"]))
        hidden = load_file(self.folder / record["hidden"])
        found.hidden, found.float_hidden = (
            [hidden[f"{kind}{index}"] for index in range(sum(name.startswith(kind) for name in hidden))]
            for kind in (HIDDEN, FLOAT)
        )
        return found

    def write(
        self,
        position: tuple[int, int],
        made: dict[str, Made],
        hidden: list[torch.Tensor],
        float_hidden: Sequence[torch.Tensor] = (),
    ) -> None:
        """Note that a block is finished.

        Args:
            made: every weight finished so far.
            hidden, float_hidden: see `Progressed`.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        before = read_json(self.folder / JOURNAL) if (self.folder / JOURNAL).is_file() else {"made": {}, "hidden": None}
        place = f"{position[0]}-{position[1]}.safetensors"
        fresh = {name: value for name, value in made.items() if name not in before["made"]}
        tensors = {key: part for name, (tensor, _) in fresh.items() for key, part in tensors_of(name, tensor).items()}
        save_file(tensors, self.folder / f"done-{place}")
        states = {
            f"{kind}{index}": state.contiguous()
            for kind, some in ((HIDDEN, hidden), (FLOAT, float_hidden))
            for index, state in enumerate(some)
        }
        save_file(states, self.folder / f"hidden-{place}")
        entries = {
            name: {"file": f"done-{place}", "form": form_of(tensor), "note": asdict(note)}
            for name, (tensor, note) in fresh.items()
        }
        record = {"position": list(position), "hidden": f"hidden-{place}", "made": {**before["made"], **entries}}
        write_text(self.folder / JOURNAL, canonical_json(record))
        if before["hidden"]:
            (self.folder / before["hidden"]).unlink(missing_ok=True)

    def close(self) -> None:
        """Forget it: the result is stored."""
        shutil.rmtree(self.folder, ignore_errors=True)
