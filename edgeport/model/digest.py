"""A hash of a module's values."""

from __future__ import annotations

import hashlib

import torch


def state_digest(module: torch.nn.Module) -> str:
    """sha256 over the names and bytes of a module's parameters and buffers."""
    state = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        state.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        data = tensor.detach().cpu().contiguous()
        state.update(data.reshape(-1).view(torch.uint8).numpy() if data.numel() else b"")
    return state.hexdigest()
