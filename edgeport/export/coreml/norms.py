"""RMSNorm that survives float16.

RMSNorm squares its input, and a residual stream of a few hundred squares past float16's 65504: the norm is
then infinite and the output garbage (SmolLM2: KL 9.0 against float32). Dividing first underflows instead.
Core ML's layer_norm does not leave the safe range, and on [x, -x], whose mean is zero,

    layer_norm([x, -x]) = [x, -x] / sqrt(mean(x**2) + eps),

so its first half is the RMSNorm of x (Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467, eq. 4).
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from edgeport.export.coreml.patches import forward_replaced

EPSILON_NAMES = ("variance_epsilon", "eps", "epsilon", "norm_eps", "layer_norm_eps")
TOLERANCE = 1e-5
"""Largest relative difference from the module's own answer, float32."""


def rms_norm(x: torch.Tensor, gain: torch.Tensor | None, epsilon: float) -> torch.Tensor:
    """gain * x / sqrt(mean(x**2) + epsilon) over the last dimension, without squaring x in sight of float16.

    Args:
        x: float, shape (..., n).
        gain: shape (n,), or None for 1.
    """
    size = x.shape[-1]
    normalised = F.layer_norm(torch.cat([x, -x], -1), (2 * size,), eps=epsilon)[..., :size]
    return normalised if gain is None else gain * normalised


def _epsilon(module: torch.nn.Module) -> float | None:
    for name in EPSILON_NAMES:
        value = getattr(module, name, None)
        if isinstance(value, float):
            return value
    # torch.nn.RMSNorm: "None" stands for the least step above 1 of the input's type.
    return float(torch.finfo(torch.float32).eps) if isinstance(module, torch.nn.RMSNorm) else None


def _takes_one_tensor(module: torch.nn.Module) -> bool:
    parameters = inspect.signature(module.forward).parameters.values()
    return len(parameters) == 1 and next(iter(parameters)).kind is inspect.Parameter.POSITIONAL_OR_KEYWORD


def _same(module: torch.nn.Module, forward: Callable[[torch.Tensor], torch.Tensor], size: int) -> bool:
    """Both give the same on probes that a wrong gain, a wrong epsilon or a subtracted mean would tell apart."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 3, size, generator=generator)
    for probe in (noise, noise * 1e-3, noise * 300.0 + 50.0):
        expected = module(probe)
        if not isinstance(expected, torch.Tensor) or expected.shape != probe.shape:
            return False
        largest = float(expected.abs().max())
        if not float((forward(probe) - expected).abs().max()) <= TOLERANCE * max(largest, 1e-30):
            return False
    return True


def safe_form(module: torch.nn.Module) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """The module's forward without squares, when the module behaves as an RMSNorm; else None.

    What it is called does not matter: it has one vector of weights, knows an epsilon, and answers probes as
    `weight * norm(x)` (Llama, Qwen, T5, torch.nn.RMSNorm) or `(1 + weight) * norm(x)` (Gemma) would.
    """
    weight, epsilon = getattr(module, "weight", None), _epsilon(module)
    if not isinstance(weight, torch.Tensor) or weight.ndim != 1 or epsilon is None or list(module.children()):
        return None
    if isinstance(module, torch.nn.LayerNorm | torch.nn.modules.batchnorm._NormBase | torch.nn.GroupNorm):
        return None
    if not _takes_one_tensor(module):
        return None
    with torch.no_grad():
        for shift in (0.0, 1.0):

            def forward(x: torch.Tensor, shift: float = shift) -> torch.Tensor:
                return rms_norm(x, weight + shift if shift else weight, epsilon)

            try:
                same = _same(module, forward, weight.numel())
            except (RuntimeError, ValueError, TypeError):
                return None  # takes no (2, 3, n) tensor: no norm of this kind
            if same:
                return forward
    return None


@contextlib.contextmanager
def safe_norms(module: torch.nn.Module) -> Iterator[list[str]]:
    """Give every RMSNorm below `module` its safe form for a while; yields their names."""
    with contextlib.ExitStack() as stack:
        replaced = []
        for name, child in module.named_modules():
            forward = safe_form(child)
            if forward is not None:
                stack.enter_context(forward_replaced(child, forward))
                replaced.append(name)
        yield replaced
