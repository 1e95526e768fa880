"""Silero VAD, which says whether somebody speaks, 32 ms at a time (https://github.com/snakers4/silero-vad, MIT).

A short-time Fourier transform as a convolution, four convolutions, and an LSTM whose state goes from frame to frame.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from edgeport.errors import BadInputError
from edgeport.model.inputs import make_example, output_specs
from edgeport.model.recurrent import Cell, cell_state
from edgeport.model.types import Model, Source, TensorSpec
from edgeport.storage import hash_file

FRAME, CONTEXT = 512, 64
"""Samples at 16 kHz that are new in a frame, and those of the frame before that are read again."""
BINS, WIDTH = 129, 128
STATE = (2, 1, WIDTH)


class SileroVad(nn.Module):
    """One frame: how likely it holds speech, and the state for the next one."""

    def __init__(self) -> None:
        super().__init__()
        self.transform = nn.Conv1d(1, 2 * BINS, 256, stride=128, bias=False)
        self.encoder = nn.Sequential(
            nn.Conv1d(BINS, 128, 3, padding=1),
            nn.ReLU(),
            nn.Conv1d(128, 64, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv1d(64, 64, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv1d(64, WIDTH, 3, padding=1),
            nn.ReLU(),
        )
        self.cell = Cell(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, input_values: torch.Tensor, state: torch.Tensor) -> dict[str, torch.Tensor]:
        """The `probability` (1, 1) and the `next_state` (2, 1, 128).

        Args:
            input_values: (1, 576) in [-1, 1]: the last 64 samples of the frame before, then 512 new ones.
            state: hidden state and cell; zeros at the beginning.
        """
        padded = nn.functional.pad(input_values[:, None], (0, 64), mode="reflect")
        real, imaginary = self.transform(padded).split(BINS, dim=1)
        features = self.encoder((real.square() + imaginary.square()).sqrt())
        hidden, cell = self.cell.step(self.cell.input(features.squeeze(-1)), state[0], state[1])
        return {"probability": self.head(hidden.relu()).sigmoid(), "next_state": torch.stack([hidden, cell])}


def load_silero_vad(path: Path, *, name: str, reference: str, hashes: Mapping[str, str] | None = None) -> Model:
    """The published weights for 16 kHz.

    Args:
        path: `silero_vad_16k_op15.onnx`, of which the initializers are read. (The package's safetensors file holds
            the weights of another training, with other results than its JIT and ONNX files.)
        hashes: sha256 by file name where they are already known.

    Raises:
        BadInputError: the file is damaged or another checkpoint.
    """
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from onnx import numpy_helper

    module = SileroVad()
    try:
        tensors = onnx.load(path).graph.initializer
        published = {each.name: torch.from_numpy(numpy_helper.to_array(each).copy()) for each in tensors}
        state = {"transform.weight": published["model.stft.forward_basis_buffer"]}
        for index in range(4):
            for part in ("weight", "bias"):
                state[f"encoder.{2 * index}.{part}"] = published[f"model.encoder.{index}.reparam_conv.{part}"]
        state |= {f"cell.{key}": value for key, value in cell_state(published, "model.decoder.rnn.").items()}
        state["head.weight"] = published["model.decoder.decoder.2.weight"][..., 0]
        state["head.bias"] = published["model.decoder.decoder.2.bias"]
        module.load_state_dict(state)
    except (DecodeError, KeyError, RuntimeError) as error:
        raise BadInputError("The file is no Silero VAD checkpoint, or is damaged.", where=path) from error
    module.eval().requires_grad_(False)
    inputs = (
        TensorSpec("input_values", "float32", (1, CONTEXT + FRAME)),
        TensorSpec("state", "float32", STATE),
    )
    return Model(
        name=name,
        module=module,
        source=Source("zoo", reference, {path.name: (hashes or {}).get(path.name) or hash_file(path)}),
        task="audio-frame-classification",
        modality="audio",
        inputs=inputs,
        outputs=output_specs(module, inputs),
        example=make_example(inputs),
        huggingface=False,
    )
