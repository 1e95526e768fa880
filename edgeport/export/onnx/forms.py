"""The table of weight forms that ONNX Runtime's CPU provider executes, and the refusal of all others.

What is in the table was executed with onnxruntime 1.31.1 and compared with float64 arithmetic: every width, group
size, with and without zero points, scales of both signs, 1 to 33 rows, odd numbers of groups. With float
activations the kernels are exact to float32 (1e-7); with `dynamic_int8` they round the activations to 8 bits in
blocks of the weight's group size and are exact otherwise. What is not:

- 3, 5, 6 and 7 bits: both operators refuse them when the file is loaded. Stored in the next wider codes they
  would be no smaller than that wider format, so they are refused here.
- groups that are no power of two, or under 16: the operators' definitions leave them out.
- float zero points: exact, but the kernel unpacks the whole weight at every call; with 8 bits it fails.
- palettes: there is no lookup kernel; unpacked to float32 they cost four times the memory of int8 and save no time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from edgeport.errors import TargetRefusesError
from edgeport.formats import LAYER_KINDS, LayerKind
from edgeport.quantized import QuantizedTensor

GROUP_SIZES = {8: (16, 32, 64, 128, 256), 4: (16, 32, 64, 128, 256), 2: (32, 64, 128)}
"""By width. 2 bits in groups of 16 or 256 are right as well, but their kernel unpacks the whole weight at every
call: 25 times slower than float32 at one row."""


@dataclass(frozen=True)
class Form:
    """Weights that are written the same way.

    Attributes:
        bits: of a code.
        zero_points: each scale has one.
        group_sizes: columns that share a scale; empty when one scale serves a channel of any length.
        kinds: the layers that can use it.
        written: `channels` is described in `native.py`, `blocks` in `blocks.py`.
        operators: what executes it.
    """

    bits: int
    zero_points: bool
    group_sizes: tuple[int, ...]
    kinds: tuple[LayerKind, ...]
    written: Literal["channels", "blocks"]
    operators: str

    @property
    def formats(self) -> tuple[str, ...]:
        """The names of its formats (`edgeport.formats`)."""
        stem = f"{'u' if self.zero_points else ''}int{self.bits}"
        return tuple(f"{stem}_g{size}" for size in self.group_sizes) or (stem,)

    def takes(self, tensor: QuantizedTensor) -> bool:
        """The tensor is of this form."""
        fits = tensor.group_size in self.group_sizes if self.group_sizes else tensor.per_channel
        return tensor.bits == self.bits and (tensor.zero_point is not None) == self.zero_points and fits


# In order of preference: int8 in one group a channel has faster kernels than in blocks.
FORMS = (
    Form(8, False, (), LAYER_KINDS, "channels", "MatMulIntegerToFloat; Gather, Cast, Mul"),
    *(
        Form(bits, zero_points, sizes, ("linear", "embedding"), "blocks", "MatMulNBits; GatherBlockQuantized")
        for bits, sizes in GROUP_SIZES.items()
        for zero_points in (False, True)
    ),
)


def formats(kind: LayerKind) -> tuple[str, ...]:
    """Every weight format that this backend can write for a kind of layer."""
    return ("float", *(name for form in FORMS if kind in form.kinds for name in form.formats))


def _described(tensor: QuantizedTensor) -> str:
    if tensor.palette is not None:
        return f"palettes of {tensor.bits}-bit indices"
    groups = "one scale a channel" if tensor.per_channel else f"groups of {tensor.group_size}"
    zero = "" if tensor.zero_point is None else " and zero points"
    return f"{tensor.bits}-bit weights with {groups}{zero}"


def form_of(name: str, tensor: QuantizedTensor) -> Form:
    """How a compressed weight is written.

    Raises:
        TargetRefusesError: ONNX Runtime has no native form for it.
    """
    stored = tensor.palette is None and tensor.axis == 0 and tensor.scale_dtype in ("float32", "float16")
    form = next((form for form in FORMS if form.takes(tensor)), None) if stored else None
    if form is None:
        raise TargetRefusesError(
            f"ONNX Runtime has no native form for {_described(tensor)}.",
            where=name,
            allowed=f"{', '.join(formats('linear')[1:])}; scales in float32 or float16",
            next_step="Choose another format in the recipe, or exclude this weight (`exclude`).",
        )
    return form
