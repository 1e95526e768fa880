"""Make a module's weights the ones that a device will hold: fold batch norms, remove weight norms.

Every lowering library folds a batch norm into the convolution before it. Were that left to them, the weights
in the file would not be the ones that were compressed. So it is done once, before anything else.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils import _pytree as pytree


def fold_norms(module: nn.Module, example: Mapping[str, torch.Tensor]) -> int:
    """Fold every batch norm that directly follows a convolution, in place.

    Which convolution feeds which batch norm is seen by running the example once, so that it does not
    matter how the model's author named or nested them. A convolution whose output anything else reads too
    is left alone.

    Args:
        module: in eval mode.
        example: one value for each input.

    Returns:
        How many were folded; each is now an `nn.Identity`.
    """
    pairs = _adjacent_pairs(module, example)
    names = {child: name for name, child in module.named_modules()}
    for convolution, norm in pairs:
        _replace(module, names[convolution], fuse_conv_bn_eval(convolution, norm))  # type: ignore[type-var, arg-type]
        _replace(module, names[norm], nn.Identity())
    return len(pairs)


def remove_parametrizations(module: nn.Module) -> int:
    """Store the effective weight of every parametrized layer (weight norm in wav2vec 2.0), in place."""
    count = 0
    for child in module.modules():
        if parametrize.is_parametrized(child):
            for name in list(child.parametrizations):  # type: ignore[arg-type]
                value = getattr(child, name).detach()
                parametrize.remove_parametrizations(child, name)
                delattr(child, name)  # torch leaves a buffer behind when the weight took no gradient
                child.register_parameter(name, nn.Parameter(value, requires_grad=False))
                count += 1
    return count


def linearize(module: nn.Module) -> int:
    """Replace transformers' `Conv1D` (GPT-2), a Linear layer with a transposed weight (K, N), by Linear, in place."""
    from transformers.pytorch_utils import Conv1D

    names = [name for name, child in module.named_modules() if isinstance(child, Conv1D)]
    for name in names:
        old = module.get_submodule(name)
        weight, bias = old.get_parameter("weight").data, old.get_parameter("bias").data
        layer = nn.Linear(weight.shape[0], weight.shape[1]).requires_grad_(False)
        layer.weight.data, layer.bias.data = weight.T.contiguous(), bias
        _replace(module, name, layer)
    return len(names)


def _replace(module: nn.Module, name: str, child: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(parent), leaf, child)


def _adjacent_pairs(module: nn.Module, example: Mapping[str, torch.Tensor]) -> list[tuple[nn.Module, nn.Module]]:
    """(convolution, batch norm) for each batch norm whose input is a convolution's output and nobody else's.

    `torch.overrides` sees each operation with its arguments: the readers of a tensor are counted there.
    """
    producer: dict[int, nn.Module] = {}
    readers: dict[int, int] = {}
    pairs: list[tuple[nn.Module, nn.Module]] = []
    calls: dict[nn.Module, int] = {}
    kept: list[torch.Tensor] = []  # ids stay unique only while the tensors live

    class CountReaders(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = func(*args, **(kwargs or {}))
            if isinstance(result, (torch.Tensor, tuple, list)) and not isinstance(result, torch.Size):
                for leaf in pytree.tree_leaves((args, kwargs)):
                    if id(leaf) in producer:
                        readers[id(leaf)] = readers.get(id(leaf), 0) + 1
            return result

    def after_convolution(layer: nn.Module, _: object, output: torch.Tensor) -> None:
        calls[layer] = calls.get(layer, 0) + 1
        producer[id(output)] = layer
        kept.append(output)

    def before_norm(layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        calls[layer] = calls.get(layer, 0) + 1
        if id(inputs[0]) in producer:
            pairs.append((producer[id(inputs[0])], layer))

    hooks = []
    for child in module.modules():
        if isinstance(child, (nn.Conv1d, nn.Conv2d)):
            hooks.append(child.register_forward_hook(after_convolution))
        elif isinstance(child, (nn.BatchNorm1d, nn.BatchNorm2d)) and child.track_running_stats:
            hooks.append(child.register_forward_pre_hook(before_norm))
    if not any(isinstance(child, (nn.BatchNorm1d, nn.BatchNorm2d)) for child in module.modules()):
        return []
    try:
        with torch.no_grad(), CountReaders():
            module(**example)
    finally:
        for hook in hooks:
            hook.remove()
    read_by = {producer[key]: count for key, count in readers.items()}
    return [pair for pair in pairs if calls[pair[0]] == 1 and calls[pair[1]] == 1 and read_by.get(pair[0]) == 1]
