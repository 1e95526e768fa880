"""What the stage cache keeps of a compressed model: tensors that preparation changed, and ones that it added."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from edgeport.compress.saved import load_compressed, save_compressed
from edgeport.model.types import Model, Source


def test_a_bias_that_preparation_added_comes_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 4, bias=False)).requires_grad_(False)
    original = Model("tiny", module, Source("factory", "tiny", {}), "other", "other", (), (), {}, huggingface=False)
    changed = copy.deepcopy(module)
    changed[1].bias = nn.Parameter(torch.randn(4), requires_grad=False)
    changed[0].weight.data *= 2
    save_compressed(tmp_path, original, replace(original, module=changed), ())
    found = load_compressed(tmp_path, original, ()).module
    x = torch.randn(3, 8)
    assert torch.equal(found(x), changed(x))
    assert not torch.equal(found(x), module(x))
    assert module[1].bias is None
