"""The explanation as a document: `explain.json`, which lies beside evidence.json and carries the manifest's hash.

A part that could not be made is None or empty, and the field beside it that ends in `absent` says why. Shares and
relative errors are fractions, sizes are bytes.
"""

from __future__ import annotations

from typing import Literal

from edgeport.schema import Strict
from edgeport.units import MetricUnit
from edgeport.validate.evidence import Interval

Group = Literal["embedding", "tied_head", "attention", "feed_forward", "conv", "head", "other", "file"]
"""What a stored tensor is for; `tied_head` is an embedding that the head multiplies by too, `file` no tensor at all."""

Part = Literal["codes", "floats", "scales", "zero_points", "palettes", "masks", "graph", "metadata", "alignment"]
"""What bytes say: `graph` holds operators, names and shapes; `metadata` what only names and describes the file;
`alignment` is padding."""


class StoredTensor(Strict):
    """One run of bytes that the file stores for one tensor.

    Attributes:
        name: in the file.
        parameter: of the model; None where the file does not tell.
        file: below the bundle's `model/`.
    """

    name: str
    parameter: str | None
    group: Group
    part: Part
    bytes: int
    file: str


class Cell(Strict):
    """Bytes of one group in one part."""

    group: Group
    part: Part
    bytes: int


class Step(Strict):
    """One step of the waterfall: a label for people, and by how many bytes it changes what was before."""

    label: str
    change: int


class ModelFile(Strict):
    """A file of the folder `model/`."""

    path: str
    bytes: int


class Bytes(Strict):
    """Where the bytes of what the runtime loads lie; read from the file, not from what lowering meant to write.

    `sum(cell.bytes for cell in cells) == file == original + sum(step.change for step in steps)`, exactly.

    Attributes:
        file: of `files` together, which are all that the runtime loads (a package's files one by one).
        original: of all parameters of the original in float32.
        before: of the groups in float32, after pruning and the like.
        tensors: largest first.
        beside: other files of the folder: the same model in ORT format, settings of generation libraries.
        notes: what the file does not tell.
    """

    file: int
    files: tuple[ModelFile, ...]
    original: int
    before: dict[Group, int]
    steps: tuple[Step, ...]
    cells: tuple[Cell, ...]
    tensors: tuple[StoredTensor, ...]
    beside: tuple[ModelFile, ...] = ()
    notes: tuple[str, ...] = ()


class LayerError(Strict):
    """What one layer gives in the file against what it gives in the original, over all samples.

    Attributes:
        layer: the module's name in the original; place: the value's name in the file.
        relative_error: ||file - original|| / ||original||.
        snr_db: 20 log10 of its inverse, decibels; None where the two are equal.
        worst: the largest relative error of one sample.
        input_error: relative error of what the layer reads; None where the file holds no such value.
        growth: relative_error - input_error; where that is None minus the error of the layer before, and of a lookup
            the whole relative_error.
        format, activation: of its weight, as the manifest has them.
    """

    layer: str
    parameter: str
    place: str
    group: Group
    format: str
    activation: str
    relative_error: float
    snr_db: float | None
    cosine: float
    worst: float
    input_error: float | None
    growth: float


class Missing(Strict):
    """A layer that could not be compared, and why."""

    layer: str
    why: str


class LayerErrors(Strict):
    """Errors layer by layer, in the order in which the graph computes them.

    Attributes:
        source: "shipped graph": values inside the shipped file in its runtime; "logical form": the original in torch
            with the weights that were read back from the file, where the runtime shows no values inside. Rounded
            activations are not in it.
        statement: the same in words.
        samples: golden inputs that were run; positions of padding are left out.
        output_change: largest absolute difference that watching made to the file's own outputs: 0 proves that the
            kernels are those that run without it. None for a logical form.
        grows_most: the layer with the largest growth.
    """

    source: Literal["shipped graph", "logical form"]
    statement: str
    samples: int
    output_change: float | None
    rows: tuple[LayerError, ...]
    grows_most: str | None
    missing: tuple[Missing, ...] = ()


class Slice(Strict):
    """The samples of a suite that have something in common.

    Attributes:
        by: what was sliced by; value: which slice, for people.
        worse, better: samples on which the file scored worse or better than what it is compared with.
        difference: file minus the other, paired, with the two-sided 95% interval of this slice alone; None with a
            single sample.
        low, high: the same interval at the confidence that holds for all slices of the suite together (Bonferroni).
        stands_out: that interval leaves out the difference over the whole suite.
    """

    by: Literal["length", "class", "language", "script", "confidence"]
    value: str
    n: int
    other_score: float
    score: float
    worse: int
    better: int
    difference: Interval | None
    low: float | None
    high: float | None
    stands_out: bool


class Flip(Strict):
    """One input whose score changed.

    Attributes:
        row: of the suite's evaluation slice, from 0.
        shown: the input, cut to a length that a page can hold (`cut` says so); None where it could not be read.
        length: tokens of the text, or None.
        label: the right answer as the suite has it.
        other_answer, answer: of what the file is compared with, and of the file; None where none was recorded.
        confidence: the original's probability of its own answer, 0 to 1.
    """

    row: int
    worse: bool
    shown: str | None
    cut: bool = False
    length: int | None = None
    label: str | None = None
    other_answer: str | None = None
    answer: str | None = None
    other_score: float | None
    score: float | None
    confidence: float | None = None


class SuiteFlips(Strict):
    """One suite: which inputs flipped, and whether they have anything in common.

    Attributes:
        other: what the file is compared with: "the original", or the other bundle's name.
        chance_of_a_false_alarm: that any slice stands out although none differs, at most; each slice's interval is
            widened for that.
        flips: worse first, the largest change first; left_out: how many more there are.
        notes: what could not be sliced, and why.
    """

    suite: str
    metric: str
    unit: MetricUnit
    higher_is_better: bool
    other: str
    n: int
    worse: int
    better: int
    chance_of_a_false_alarm: float = 0.05
    slices: tuple[Slice, ...]
    flips: tuple[Flip, ...]
    left_out: int = 0
    notes: tuple[str, ...] = ()


class Alternative(Strict):
    """Another format that a layer could have had.

    Attributes:
        cost: what it adds to the divergence from the original, nats a sample.
    """

    format: str
    bytes: int
    cost: float


class LayerSensitivity(Strict):
    """What a layer's compression saves and costs.

    Attributes:
        bits: stored bits a weight, with scales.
        bytes_saved: against float32.
        weight_error: relative error of the weight; output_error: of the layer's output over calibration inputs.
        cost: recorded by mixed precision, nats a sample.
        cheaper, dearer: the next formats down and up that mixed precision could have taken.
        effect: relative error of the model's outputs when this layer alone has the file's weights, measured now; kl:
            the same as KL divergence, nats a row, where the outputs score classes.
    """

    layer: str
    parameter: str
    group: Group
    format: str
    bits: float
    bytes: int
    bytes_saved: int
    weight_error: float
    output_error: float | None
    cost: float | None = None
    cheaper: Alternative | None = None
    dearer: Alternative | None = None
    effect: float | None = None
    kl: float | None = None


class Sensitivity(Strict):
    """How much each layer matters, the most first.

    Attributes:
        source: "recorded" when the compression chose formats by cost; "measured": one layer at a time with the
            file's weights, the rest float, in torch; "weights alone": neither, the errors of the weights stand alone.
        statement: the same in words.
        samples: golden inputs that were run; 0 unless measured.
    """

    source: Literal["recorded", "measured", "weights alone"]
    statement: str
    samples: int
    rows: tuple[LayerSensitivity, ...]


class Claim(Strict):
    """One number of the evidence, and how far it can be trusted.

    Attributes:
        metric, output: as the gate names them; budget "allowed" in the same unit, None without a budget.
        half_width: of the interval; None where the number has none.
        state: "decided": the interval lies on one side of the budget; "undecided": it holds the budget; "exact": a
            count or a hash, no sample; "one run": measured without an interval; "no budget": nothing to decide.
        decided_by: distance to the budget over the half width: above 1 is decided.
        needed: samples that would decide, were the value seen the true one; None where it is decided, or none would.
    """

    metric: str
    output: str | None = None
    unit: str = ""
    value: float | None
    n: int | None = None
    low: float | None = None
    high: float | None = None
    half_width: float | None = None
    allowed: float | None = None
    state: Literal["decided", "undecided", "exact", "one run", "no budget", "not measured"]
    decided_by: float | None = None
    needed: int | None = None
    words: str


class CellChange(Strict):
    """Bytes of one group in one part in both bundles."""

    group: Group
    part: Part
    other: int
    this: int


class LayerChange(Strict):
    """One layer in both bundles; an error is None where it was not compared."""

    layer: str
    other_format: str
    format: str
    other_error: float | None
    error: float | None


class Changes(Strict):
    """The same tables as differences from another bundle, `other` always the other one.

    Attributes:
        flips: of this bundle's file against the other's, on the suites that both were measured on.
        notes: what can't be compared, and why.
    """

    other: str
    other_manifest_sha256: str
    other_file: int
    cells: tuple[CellChange, ...]
    layers: tuple[LayerChange, ...]
    flips: tuple[SuiteFlips, ...]
    notes: tuple[str, ...] = ()


class Explanation(Strict):
    """`explain.json`.

    Attributes:
        bundle: the manifest's name for the model.
        original: what the file was compared with; None where it could not be had.
    """

    schema_version: Literal[1] = 1
    bundle: str
    manifest_sha256: str
    original: str | None
    original_absent: str | None = None
    bytes: Bytes
    layers: LayerErrors | None
    layers_absent: str | None = None
    flips: tuple[SuiteFlips, ...]
    flips_absent: str | None = None
    sensitivity: Sensitivity | None
    sensitivity_absent: str | None = None
    claims: tuple[Claim, ...]
    changes: Changes | None = None
