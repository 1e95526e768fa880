"""nano-ocr, which reads a word off a picture: a CRNN (Shi et al. 2015, https://arxiv.org/abs/1507.05717).

Convolutions turn the picture into 33 columns, an LSTM reads these both ways, and each column gets scores of a character
or of none (CTC; Graves et al. 2006).
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from edgeport.errors import BadInputError
from edgeport.model.fold import fold_norms
from edgeport.model.inputs import BATCH, make_example, output_specs
from edgeport.model.recurrent import Cell, cell_state
from edgeport.model.types import ImagePreprocessing, Model, Source, TensorSpec
from edgeport.storage import hash_file

SIZE = (32, 128)
CHARACTERS = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.- "
WIDTH = 256
LUMA = (0.299, 0.587, 0.114)
"""ITU-R BT.601: what makes grey of red, green and blue. The network was trained on grey pictures; folded into its first
layer, the weights make it take colours as other picture models do, with the same result."""


class Crnn(nn.Module):
    """The reader."""

    def __init__(self) -> None:
        super().__init__()
        self.columns = nn.Sequential(
            nn.Conv2d(3, 64, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2, 2),
            nn.Conv2d(64, 128, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2, 2),
            nn.Conv2d(128, 256, 3, padding=1),
            nn.BatchNorm2d(256),
            nn.ReLU(),
            nn.Conv2d(256, 256, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d((2, 2), (2, 1), (0, 1)),
            nn.Conv2d(256, 512, 3, padding=1),
            nn.BatchNorm2d(512),
            nn.ReLU(),
            nn.MaxPool2d((2, 2), (2, 1), (0, 1)),
            nn.Conv2d(512, 512, 2),
            nn.BatchNorm2d(512),
            nn.ReLU(),
        )
        self.forwards = Cell(512, WIDTH)
        self.backwards = Cell(512, WIDTH)
        self.head = nn.Linear(2 * WIDTH, len(CHARACTERS) + 1)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Scores (batch, 33, 66) of pictures (batch, 3, 32, 128); class 0 is no character."""
        steps = self.columns(pixel_values).squeeze(2).transpose(1, 2)
        read = torch.cat([self.forwards(steps), self.backwards(steps.flip(1)).flip(1)], dim=-1)
        logits: torch.Tensor = self.head(read)
        return logits


def load_nano_ocr(path: Path, *, name: str, reference: str, hashes: Mapping[str, str] | None = None) -> Model:
    """The published weights, batch norms folded.

    Args:
        path: `nano_ocr_ftr.pth`.
        hashes: sha256 by file name where they are already known.

    Raises:
        BadInputError: the file is damaged or another checkpoint.
    """
    module = Crnn()
    try:
        published = torch.load(path, map_location="cpu", weights_only=True)
        state = {f"columns.{key[4:]}": value for key, value in published.items() if key.startswith("cnn.")}
        state["columns.0.weight"] = state["columns.0.weight"] * torch.tensor(LUMA)[:, None, None]
        for part, suffix in (("forwards", "_l0"), ("backwards", "_l0_reverse")):
            state |= {f"{part}.{key}": value for key, value in cell_state(published, "rnn.", suffix).items()}
        state |= {f"head.{key[3:]}": value for key, value in published.items() if key.startswith("fc.")}
        module.load_state_dict(state)
    except (pickle.UnpicklingError, KeyError, RuntimeError, TypeError, EOFError) as error:
        raise BadInputError("The file is no nano-ocr checkpoint, or is damaged.", where=path) from error
    module.eval().requires_grad_(False)
    inputs = (TensorSpec("pixel_values", "float32", (BATCH, 3, *SIZE)),)
    example = make_example(inputs)
    fold_norms(module, example)
    return Model(
        name=name,
        module=module,
        source=Source("zoo", reference, {path.name: (hashes or {}).get(path.name) or hash_file(path)}),
        task="image-to-text",
        modality="image",
        inputs=inputs,
        outputs=output_specs(module, inputs, default="logits"),
        example=example,
        huggingface=False,
        image=ImagePreprocessing(
            size=SIZE, mean=(0.5,) * 3, std=(0.5,) * 3, scale=1 / 255, crop=1.0, resample="bilinear", stretch=True
        ),
        labels=("", *CHARACTERS),
    )
