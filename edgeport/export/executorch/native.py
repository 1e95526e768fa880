"""Compressed weights as torch.export sees them: tensors that turn into the backend's own operators.

`NativeWeight` stands where a compressed parameter stood. It holds the logical codes and scales and
nothing else; every `linear`, `conv` and `embedding` that meets it is written into the graph in the form
that XNNPACK and the runtime recognise:

- linear and conv: activations quantized on the fly to int8 (asymmetric; per row for linear, per sample for
  conv), or on grids fixed beforehand, before the product and behind it; weights dequantised per channel or per
  group right before the product. Weights beside float activations are never written: XNNPACK computes nonsense
  from them (measured, executorch 1.4.1).
- embedding: `embedding_byte` and `embedding_4bit`, kernels of the runtime itself.

Standing in for the parameter rather than for the layer keeps every module of the model as it is, also
those that use their weight in their own way (scaled embeddings, sliced position tables, tied heads).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from edgeport.activations import HIGHEST, LOWEST, ActivationGrid, LayerRange
from edgeport.errors import TargetRefusesError
from edgeport.model.types import Model
from edgeport.quantized import QuantizedTensor

ops = torch.ops.quantized_decomposed


class NativeWeight(torch.Tensor):
    """A compressed weight with the shape and dtype (float32) of the parameter it replaces.

    Attributes:
        codes: int8, in the weight's shape.
        table: the codes as the kernels want them: packed to uint8 (N, K / 2) for the 4-bit embedding,
            (N, C, 1, L) for a 1-D convolution that runs as a 2-D one, otherwise `codes` itself.
        scale: float32, (N,) when one scale serves a channel, else (N, K / group_size).
        zero: zeros in `scale`'s shape: the operators demand them. int64, or int8 when grouped.
        bits, group_size: as in `QuantizedTensor`; group_size 0 means a whole channel.
        swapped: `table` holds every pair of columns the other way round (see `pack_table`).
        layer: the parameter's name, for error messages.
        ranges: grids of the layer's activations, or None where they are quantized on the fly.
    """

    codes: torch.Tensor
    table: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    bits: int
    group_size: int
    swapped: bool
    layer: str
    ranges: LayerRange | None

    @staticmethod
    def __new__(
        cls: type[NativeWeight],
        codes: torch.Tensor,
        table: torch.Tensor,
        scale: torch.Tensor,
        zero: torch.Tensor,
        bits: int,
        group_size: int,
        swapped: bool,
        layer: str,
        ranges: LayerRange | None,
    ) -> NativeWeight:
        """Wrap the tensors; nothing is copied."""
        self = torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32, device=codes.device)
        self.codes, self.table, self.scale, self.zero = codes, table, scale, zero
        self.bits, self.group_size, self.swapped, self.layer = bits, group_size, swapped, layer
        self.ranges = ranges
        return self

    def __tensor_flatten__(self) -> tuple[list[str], dict[str, Any]]:
        """The inner tensors' names and the rest, as torch.export takes subclasses apart."""
        return list(_INNER), {key: getattr(self, key) for key in _REST}

    @staticmethod
    def __tensor_unflatten__(
        tensors: Mapping[str, torch.Tensor], rest: Mapping[str, Any], _size: Any, _stride: Any
    ) -> NativeWeight:
        """Undo `__tensor_flatten__`."""
        codes, table, scale, zero = (tensors[name] for name in _INNER)
        return NativeWeight(codes, table, scale, zero, **rest)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]  # torch's stub has no names
        """Name, shape and format."""
        return f"NativeWeight({self.layer}, {tuple(self.shape)}, bits={self.bits}, group_size={self.group_size})"

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Write a product with this weight in its native form."""
        native = _FORMS.get(func)
        if native is not None and len(args) > 1 and isinstance(args[1], NativeWeight):
            return native(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares it as an instance method
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Pass the wrapper through copies; give any other operator the dequantised values."""
        if func in _COPIES:
            weight = args[0]
            tensors = {name: func(getattr(weight, name)) for name in _INNER}
            return NativeWeight(**tensors, **{name: getattr(weight, name) for name in _REST})
        plain = [arg.dequantized() if isinstance(arg, NativeWeight) else arg for arg in args]
        return func(*plain, **(kwargs or {}))

    def dequantized(self) -> torch.Tensor:
        """The whole weight in float32, (N, K) only, for uses that have no quantized operator.

        Raises:
            TargetRefusesError: the weight is a convolution's kernel.
        """
        if self.codes.dim() != 2:
            raise TargetRefusesError(
                "The model uses a compressed convolution weight outside of its convolution.",
                where=f"layer {self.layer}",
                next_step="Leave the layer uncompressed with the recipe's `exclude`.",
            )
        # A gather of every row: the runtime has a kernel for it and none for a plain dequantisation of groups.
        return _embedding(torch.arange(self.codes.shape[0]), self)


_INNER = ("codes", "table", "scale", "zero")
_REST = ("bits", "group_size", "swapped", "layer", "ranges")
_COPIES = (torch.ops.aten.detach.default, torch.ops.aten.alias.default, torch.ops.aten.clone.default)


def _limits(weight: NativeWeight) -> tuple[int, int]:
    """The full range of the code width; XNNPACK tells 4 bits from 8 by it."""
    return -(2 ** (weight.bits - 1)), 2 ** (weight.bits - 1) - 1


def _beside_product(weight: NativeWeight) -> torch.Tensor:
    """The dequantised weight, as XNNPACK's partitioner expects it beside a dynamically quantized activation."""
    low, high = _limits(weight)
    codes = weight.table if weight.codes.dim() == 3 else weight.codes
    values: torch.Tensor
    if weight.group_size:
        values = ops.dequantize_per_channel_group.default(
            codes, weight.scale, weight.zero, low, high, torch.int8, weight.group_size, torch.float32
        )
    else:
        values = ops.dequantize_per_channel.default(codes, weight.scale, weight.zero, 0, low, high, torch.int8)
    return values


def quantize_rows(x: torch.Tensor) -> torch.Tensor:
    """Round activations to int8 and back, with one asymmetric scale a row of the last dimension."""
    scale, zero = ops.choose_qparams_per_token_asymmetric.default(x, torch.int8)
    codes = ops.quantize_per_token.default(x, scale, zero, -128, 127, torch.int8)
    values: torch.Tensor = ops.dequantize_per_token.default(codes, scale, zero, -128, 127, torch.int8, torch.float32)
    return values


def quantize_tensor(x: torch.Tensor) -> torch.Tensor:
    """Round activations to int8 and back, with one asymmetric scale (XNNPACK takes one scale a sample)."""
    scale, zero = ops.choose_qparams.tensor(x, -128, 127, torch.finfo(torch.float32).eps, torch.int8)
    codes = ops.quantize_per_tensor.tensor(x, scale, zero, -128, 127, torch.int8)
    values: torch.Tensor = ops.dequantize_per_tensor.tensor(codes, scale, zero, -128, 127, torch.int8)
    return values


def round_fixed(x: torch.Tensor, grid: ActivationGrid) -> torch.Tensor:
    """Round activations to int8 and back, on a grid fixed beforehand."""
    codes = ops.quantize_per_tensor.default(x, grid.scale, grid.zero_point, LOWEST, HIGHEST, torch.int8)
    values: torch.Tensor = ops.dequantize_per_tensor.default(
        codes, grid.scale, grid.zero_point, LOWEST, HIGHEST, torch.int8
    )
    return values


def _around(
    x: torch.Tensor,
    weight: NativeWeight,
    on_the_fly: Callable[[torch.Tensor], torch.Tensor],
    product: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """A product between the roundings of its layer."""
    if weight.ranges is None:
        return product(on_the_fly(x))
    result = product(round_fixed(x, weight.ranges.input))
    return result if weight.ranges.output is None else round_fixed(result, weight.ranges.output)


def _linear(x: torch.Tensor, weight: NativeWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    return _around(x, weight, quantize_rows, lambda rounded: F.linear(rounded, _beside_product(weight), bias))


def _embedding(indices: torch.Tensor, weight: NativeWeight, *_args: Any, **_kwargs: Any) -> torch.Tensor:
    """Rows by index. The remaining arguments (padding index, norms, sparsity) matter in training only."""
    kernel = ops.embedding_4bit.dtype if weight.bits == 4 else ops.embedding_byte.dtype
    rows: torch.Tensor = kernel(weight.table, weight.scale, None, *_limits(weight), indices, dtype=torch.float32)
    if not weight.swapped:
        return rows
    pairs = rows.reshape(*rows.shape[:-1], rows.shape[-1] // 2, 2)
    return pairs.flip(-1).reshape(rows.shape)


def _conv2d(
    x: torch.Tensor,
    weight: NativeWeight,
    bias: torch.Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> torch.Tensor:
    return _around(
        x,
        weight,
        quantize_tensor,
        lambda rounded: F.conv2d(rounded, _beside_product(weight), bias, stride, padding, dilation, groups),
    )


def _conv1d(
    x: torch.Tensor,
    weight: NativeWeight,
    bias: torch.Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> torch.Tensor:
    """XNNPACK quantizes activations of 2-D convolutions only: a 1-D one runs as 2-D with height 1."""
    wide = padding if isinstance(padding, str) else (0, _single(padding))
    strides, dilations = (1, _single(stride)), (1, _single(dilation))
    return _around(
        x.unsqueeze(2),
        weight,
        quantize_tensor,
        lambda rounded: F.conv2d(rounded, _beside_product(weight), bias, strides, wide, dilations, groups),
    ).squeeze(2)


def _single(value: Any) -> int:
    return int(value[0]) if isinstance(value, tuple | list) else int(value)


_FORMS: dict[Callable[..., Any], Callable[..., torch.Tensor]] = {
    F.linear: _linear,
    F.embedding: _embedding,
    F.conv2d: _conv2d,
    F.conv1d: _conv1d,
}


def pack_table(codes: torch.Tensor, *, swapped: bool = False) -> torch.Tensor:
    """4-bit codes (N, K) as `embedding_4bit` stores them: uint8 (N, K / 2), code + 8, the even column in the high half.

    XNNPACK stores the even column in the low half. With `swapped` the table is written that way: the bytes are
    then those of a tied head, the file can hold them once, and the rows that the kernel gives must have each
    pair of columns turned round.

    Source: executorch, exir/passes/_quant_patterns_and_replacements.py, `_pack_embedding_weight`.
    """
    shifted = (codes + 8).to(torch.uint8)
    even, odd = shifted[:, 0::2], shifted[:, 1::2]
    return odd << 4 | even if swapped else even << 4 | odd


def native_weight(
    name: str, tensor: QuantizedTensor, *, tied: bool = False, ranges: LayerRange | None = None
) -> NativeWeight:
    """The logical form of a weight as a NativeWeight, without copying the codes.

    Args:
        tied: the weight serves an embedding and a Linear.
        ranges: of the layer's activations where they are static.
    """
    group_size = tensor.group_size if tensor.bits == 4 else 0
    # In order: XNNPACK's serializer writes a tensor's memory as it lies, whatever its strides say.
    scale = (tensor.scale if tensor.bits == 4 else tensor.scale.squeeze(1)).contiguous()
    zero = torch.zeros_like(scale, dtype=torch.int8 if group_size else torch.int64)
    table, swapped = tensor.codes, False
    if tensor.codes.dim() == 3:
        table = tensor.codes.unsqueeze(2)
    elif tensor.bits == 4 and tensor.codes.dim() == 2:
        table, swapped = pack_table(tensor.codes, swapped=tied), tied
    return NativeWeight(tensor.codes.contiguous(), table, scale, zero, tensor.bits, group_size, swapped, name, ranges)


def share_structure(module: torch.nn.Module, replacements: Mapping[int, torch.nn.Parameter]) -> torch.nn.Module:
    """A copy of the module tree around the very data of the original, without gradients.

    Args:
        replacements: parameters to put in the place of others, by the `id` of those.
    """
    stand_ins: dict[int, torch.Tensor] = {id(buffer): buffer for buffer in module.buffers()}
    for parameter in module.parameters():
        stand_ins[id(parameter)] = torch.nn.Parameter(parameter.detach(), requires_grad=False)
    # deepcopy takes what the memo holds for an object, under each of the object's names: ties stay ties.
    return copy.deepcopy(module, memo={**stand_ins, **replacements})


def with_native_weights(model: Model) -> torch.nn.Module:
    """The model's module with every compressed parameter replaced, under all of its names. The model is unchanged."""
    parameters = dict(model.module.named_parameters(remove_duplicate=False))
    kinds: dict[int, set[type]] = {}
    for layer in model.module.modules():
        for kind in (torch.nn.Embedding, torch.nn.Linear):
            if isinstance(layer, kind):
                kinds.setdefault(id(layer.weight), set()).add(kind)
    replacements = {}
    for name, tensor in model.quantized.items():
        key = id(parameters[name])
        weight = native_weight(name, tensor, tied=len(kinds.get(key, ())) > 1, ranges=model.ranges.get(name))
        replacements[key] = torch.nn.Parameter(weight, requires_grad=False)
    return share_structure(model.module, replacements)
