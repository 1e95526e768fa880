"""A conv net with fewer channels as a folder: weights and sizes there, the structure from the code or the config."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from edgeport.bundle.read import read_bundle
from edgeport.compress.restructure import parameter_count
from edgeport.compression import CompressRequest, compress
from edgeport.errors import BadInputError
from edgeport.model.compressed import RECORD, load_compressed
from edgeport.model.load import load_model
from edgeport.pipeline import ExportRequest, export
from edgeport.recipe import Recipe
from edgeport.runtime.session import open_session
from edgeport.runtime.torch import TorchSession
from edgeport.schema import parse_mapping
from edgeport.target import load_target
from edgeport.vectors import load_vectors

CODE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24)
        self.depth, self.point = nn.Conv2d(24, 24, 3, groups=24), nn.Conv2d(24, 40, 1)
        self.head = nn.Linear(40, 5)
    def forward(self, picture):
        x = torch.relu(self.depth(torch.relu(self.norm(self.stem(picture)))))
        return self.head(torch.relu(self.point(x)).mean((2, 3)))

class Other(Net):
    pass

def net():
    torch.manual_seed(3)
    return Net(), torch.randn(1, 3, 16, 16)
"""
CHANNELS = {"method": "prune_channels", "keep": 0.5}
INT8 = {"method": "rtn", "linear": "int8", "conv": "int8", "depthwise_conv": ["int8", "float"]}


@pytest.fixture
def factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "narrow_nets.py").write_text(CODE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return "narrow_nets:net"


def recipe(*steps: dict[str, object]) -> Recipe:
    tables = {"calibration": {"samples": 8}, "gate": {}}
    return parse_mapping(Recipe, {"name": "narrow", "summary": "x", "compress": list(steps), **tables}, "test")


@pytest.mark.parametrize("steps", [(CHANNELS,), (CHANNELS, INT8)], ids=["float", "int8"])
def test_a_narrowed_net_of_a_factory_comes_back_and_is_exported(
    steps: tuple[dict[str, object], ...], factory: str, tmp_path: Path
) -> None:
    result = compress(CompressRequest(factory, recipe(*steps), tmp_path / "folder", samples=8))
    names = {path.name for path in result.folder.iterdir()}
    assert names == {"edgeport.json", "compressed.safetensors", "reference"}
    made = load_compressed(result.folder)
    module = made.module
    # Half of 24 and half of 40 channels, to the nearest multiple of 8 (ties to the even one).
    assert (module.stem.out_channels, module.depth.groups, module.point.in_channels) == (16, 16, 16)
    assert (module.point.out_channels, module.head.in_features) == (16, 16)
    assert parameter_count(made) == result.steps[-1].parameters_after < parameter_count(load_model(factory))
    if len(steps) == 1:
        assert 0 <= result.bytes_after - result.steps[-1].bytes_after < 4096  # the file's header
    bundle = export(
        ExportRequest(str(result.folder), load_target("linux-x86_64-ort"), recipe(*steps), tmp_path / "b", quick=True)
    ).bundle
    found = read_bundle(bundle)
    call = load_vectors(result.folder / "reference" / "inputs.safetensors")[0]
    wanted = TorchSession(made).run(call)
    got = open_session(found.artifact).run(call)
    for name, value in wanted.items():
        np.testing.assert_allclose(got[name], value, atol=1e-5 if len(steps) == 1 else 0.05)
    # What is compared with is the whole net's output.
    original = TorchSession(load_model(factory)).run(call)
    stored = load_vectors(result.folder / "reference" / "outputs.safetensors")[0]
    for name, value in original.items():
        np.testing.assert_allclose(stored[name], value, atol=1e-5)


def test_other_code_and_impossible_sizes_are_refused(factory: str, tmp_path: Path) -> None:
    folder = compress(CompressRequest(factory, recipe(CHANNELS), tmp_path / "folder", samples=8)).folder
    record = json.loads((folder / RECORD).read_text())

    def with_(**changes: object) -> None:
        (folder / RECORD).write_text(json.dumps({**record, **changes}))

    with_(architecture="Other")
    with pytest.raises(BadInputError, match="makes a Net, the weights are of a Other"):
        load_compressed(folder)
    with_(narrowed={**record["narrowed"], "depth": [16, 16, 5]})
    with pytest.raises(BadInputError, match="16 of 16 channels in 5 groups"):
        load_compressed(folder)
    with_(narrowed={"elsewhere": [1, 1, 1]})
    with pytest.raises(BadInputError, match="no layer 'elsewhere'"):
        load_compressed(folder)
    with_(narrowed={})
    with pytest.raises(BadInputError, match="weights don't fit"):
        load_compressed(folder)
    with_(made_by="gone_nets:net")
    with pytest.raises(BadInputError, match="gone_nets"):
        load_compressed(folder)


def test_a_conv_net_of_transformers_keeps_its_config(tmp_path: Path) -> None:
    from transformers import ResNetConfig, ResNetForImageClassification

    sizes = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "layer_type": "basic"}
    torch.manual_seed(0)
    ResNetForImageClassification(ResNetConfig(**sizes, num_labels=5)).save_pretrained(tmp_path / "net")
    result = compress(CompressRequest(str(tmp_path / "net"), recipe(CHANNELS), tmp_path / "folder", samples=8))
    config = json.loads((result.folder / "config.json").read_text())
    # transformers would build the whole net of it: the weights have a name that it does not look for.
    assert config["quantization_config"]["quant_method"] == "edgeport"
    assert not (result.folder / "model.safetensors").exists()
    made = load_compressed(result.folder)
    assert parameter_count(made) == result.steps[-1].parameters_after == result.steps[-1].bytes_after // 4
    call = load_vectors(result.folder / "reference" / "inputs.safetensors")[0]
    with torch.no_grad():
        assert np.isfinite(TorchSession(made).run(call)["logits"]).all()
