"""Find the pairs of a module between which scales may move, and prove each of them on the example.

Candidates come from what feeds what (`trace.py`), never from names. Every candidate is then tried: random
factors are folded across it and the module's outputs must not change. Pairs of unknown architectures are thus as
safe as those of known ones. What it finds (GPT-2's transposed Conv1D layers are left out, as compression does not
touch them):

============================ ========================================================================
pre-norm decoders, ViT       norm -> q, k, v; norm -> gate, up or fc1; value -> output; up -> down
Phi, GPT-J                   one norm -> q, k, v and fc1
BERT, MiniLM (post-norm)     value -> output only: a norm's output also goes to the residual sum
ReLU networks (OPT)          also fc1 -> fc2, for positive factors
============================ ========================================================================
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from edgeport.compress.prepare.fold import mix_heads, scale_pair
from edgeport.compress.prepare.hadamard import flat_orthogonal
from edgeport.compress.prepare.pair import Pair, PairKind
from edgeport.compress.prepare.trace import Norm, Trace, trace
from edgeport.errors import BadInputError

TOLERANCE = 1e-5
"""Largest change of an output, relative to its largest value, that counts as rounding. Everything runs in float64
but for the norms of most models, which compute in float32."""

HEAD_SIZE_NAMES = ("head_dim", "attention_head_size", "head_size")
"""Where attention modules keep the size of a head. A wrong one fails the proof."""


@dataclass(frozen=True)
class Graph:
    """What was found in a module.

    Attributes:
        pairs: proven, in the order of their producers' parameters.
        sources, norms: see `Trace`.
    """

    pairs: tuple[Pair, ...]
    sources: Mapping[str, tuple[str, ...]]
    norms: Mapping[str, Norm]


def working_copy(module: nn.Module) -> nn.Module:
    """A float64 copy in eval mode whose parameters require gradients: twice the module's memory."""
    work = copy.deepcopy(module).to(torch.float64).eval()
    for parameter in work.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return work


def in_float64(example: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """An example whose float inputs are float64."""
    return {name: value.to(torch.float64) if value.is_floating_point() else value for name, value in example.items()}


def outputs_of(
    module: nn.Module, example: Mapping[str, torch.Tensor], names: Sequence[str] = ()
) -> tuple[torch.Tensor, ...]:
    """The float tensors that a call returns, in order; caches of keys and values are left out.

    Args:
        names: of the outputs that count, where the module names them; all when empty.

    Raises:
        BadInputError: there is no such output.
    """

    def tensors(value: object) -> Iterator[torch.Tensor]:
        if isinstance(value, torch.Tensor):
            if value.is_floating_point():
                yield value
        elif isinstance(value, (Mapping, tuple, list)):
            for item in value.values() if isinstance(value, Mapping) else value:
                yield from tensors(item)

    with torch.no_grad():
        result = module(**example)
    if names and isinstance(result, Mapping):
        result = {name: result[name] for name in names if name in result}
    found = tuple(tensors(result))
    if not found:
        raise BadInputError("The module gives no such output tensor.", where=", ".join(names) or None)
    return found


def largest_change(before: Sequence[torch.Tensor], after: Sequence[torch.Tensor]) -> float:
    """Largest difference of any output, relative to that output's largest value. NaN counts as infinite."""
    changes = [float((a - b).abs().max() / b.abs().max().clamp_min(1e-30)) for b, a in zip(before, after, strict=True)]
    return max((c if c == c else float("inf") for c in changes), default=0.0)


def _norm_candidates(found: Trace, module: nn.Module) -> Iterator[Pair]:
    """Each norm with the Linears that read it; none whose weight something else uses as well (a tied head)."""
    uses = Counter(id(parameter) for _, parameter in module.named_parameters(remove_duplicate=False))
    for name, norm in found.norms.items():
        consumers = tuple(
            f"{reader}.weight"
            for reader, sources in found.sources.items()
            if sources == (name,) and isinstance(module.get_submodule(reader), nn.Linear)
        )
        if consumers and all(uses[id(module.get_parameter(consumer))] == 1 for consumer in consumers):
            channels = found.calls[name][0].output.shape[-1]
            yield Pair("norm", norm.weight, norm.bias, consumers, (0, channels), offset=norm.offset)


def _head_size(module: nn.Module, producer: str, consumer: str) -> int | None:
    """The size of a head that a module around the producer, but not around the whole model, names."""
    parts, other = producer.split("."), consumer.split(".")
    shared = 0
    while shared < min(len(parts), len(other)) and parts[shared] == other[shared]:
        shared += 1
    for depth in range(len(parts) - 1, shared - 1, -1):
        around = module.get_submodule(".".join(parts[:depth]))
        for attribute in HEAD_SIZE_NAMES:
            size = getattr(around, attribute, None)
            if isinstance(size, int):
                return size
    return None


def _layouts(outputs: int, columns: int, head: int | None) -> Iterator[tuple[tuple[int, int], int, int | None]]:
    """(rows, repeats, head size) of a producer with `outputs` channels that a consumer with `columns` may read."""
    ranges = [(0, outputs)]
    if outputs > columns:
        # Fused projections end with the part that is read linearly: gate, up; and q, k, v with fewer k and v.
        ranges = [((outputs + columns) // 2, outputs), (outputs - columns, outputs)]
    for first, last in ranges:
        channels = last - first
        if head is not None and columns % channels == 0 and channels % head == 0:
            yield (first, last), columns // channels, head
    for first, last in ranges:
        if last - first == columns:
            yield (first, last), 1, None


def _reads_linearly(
    output: torch.Tensor, gradient: torch.Tensor, read: torch.Tensor, probe: torch.Tensor, size: int, repeats: int
) -> bool:
    """Scaling (or mixing) a block of `size` channels of `output` does the same to the block of `read`.

    Euler's identity, for the scalar <probe, read>: the sum over tokens of output_i * gradient_j equals that of
    read_i * probe_j, for all i, j of a block. It is necessary, and cheap: one backward pass over a few operations.
    """
    a, g = (value.reshape(-1, value.shape[-1] // size, size) for value in (output, gradient))
    b, u = (value.reshape(-1, a.shape[1], repeats, size) for value in (read, probe))
    left = torch.einsum("tki,tkj->kij", a, g)
    right = torch.einsum("tkni,tknj->kij", b, u)
    return bool((left - right).abs().max() <= 1e-6 * right.abs().max())


def _linear_candidates(found: Trace, module: nn.Module) -> Iterator[Pair]:
    linears = {n for n in found.calls if isinstance(module.get_submodule(n), nn.Linear) and len(found.calls[n]) == 1}
    readers: dict[str, list[str]] = {}
    for reader in found.calls:
        for source in found.sources[reader]:
            readers.setdefault(source, []).append(reader)
    generator = torch.Generator().manual_seed(0)
    for consumer in sorted(linears):
        producers = [name for name in found.sources[consumer] if name in linears and readers[name] == [consumer]]
        if not producers:
            continue
        read = found.calls[consumer][0].input
        probe = torch.randn(read.shape, generator=generator, dtype=read.dtype)
        outputs = [found.calls[name][0].output for name in producers]
        gradients = torch.autograd.grad(read, outputs, probe, retain_graph=True)
        for producer, output, gradient in zip(producers, outputs, gradients, strict=True):
            columns = read.shape[-1]
            for rows, repeats, head in _layouts(output.shape[-1], columns, _head_size(module, producer, consumer)):
                part = (output[..., slice(*rows)], gradient[..., slice(*rows)])
                if _reads_linearly(*part, read, probe, head or 1, repeats):
                    bias = f"{producer}.bias" if module.get_submodule(producer).bias is not None else None
                    kind: PairKind = "linear" if head is None else "heads"
                    yield Pair(kind, f"{producer}.weight", bias, (f"{consumer}.weight",), rows, repeats, head)
                    break


def _proven(
    work: nn.Module, example: Mapping[str, torch.Tensor], names: Sequence[str], candidates: Sequence[Pair]
) -> list[Pair]:
    """The candidates across which random factors fold without a change: all tried at once, then halves."""
    before = outputs_of(work, example, names)
    generator = torch.Generator().manual_seed(0)

    def holds(pairs: Sequence[Pair]) -> bool:
        scales = [torch.exp(torch.empty(pair.channels).uniform_(-1, 1, generator=generator)) for pair in pairs]
        for pair, scale in zip(pairs, scales, strict=True):
            scale_pair(work, pair, scale)
            if pair.head_dim is not None:
                mix_heads(work, pair, flat_orthogonal(pair.head_dim))
        change = largest_change(before, outputs_of(work, example, names))
        for pair, scale in reversed(list(zip(pairs, scales, strict=True))):
            if pair.head_dim is not None:
                mix_heads(work, pair, flat_orthogonal(pair.head_dim).T)
            scale_pair(work, pair, 1 / scale.to(torch.float64))
        return change <= TOLERANCE

    def keep(pairs: Sequence[Pair]) -> list[Pair]:
        if not pairs or holds(pairs):
            return list(pairs)
        middle = len(pairs) // 2
        return [] if len(pairs) == 1 else keep(pairs[:middle]) + keep(pairs[middle:])

    return keep(candidates)


def read_graph(module: nn.Module, example: Mapping[str, torch.Tensor], outputs: Sequence[str] = ()) -> Graph:
    """Find the pairs of a module. The module is not changed.

    Args:
        module: takes `example` as keyword arguments.
        example: one value for each input; a few tokens are enough, all of them attended to.
        outputs: names of the outputs that must be kept (`Model.outputs`); all when empty.
    """
    work, inputs = working_copy(module), in_float64(example)
    found = trace(work, inputs)
    candidates = [*_norm_candidates(found, work), *_linear_candidates(found, work)]
    order = {name: index for index, (name, _) in enumerate(work.named_parameters(remove_duplicate=False))}
    candidates.sort(key=lambda pair: order[pair.weight])
    return Graph(tuple(_proven(work, inputs, outputs, candidates)), found.sources, found.norms)
