"""docs/quality.md out of the bench's rows: every sentence with a number in it comes from them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from quality_table import Result, duel_table, duels, result_table

COMMAND = "OMP_NUM_THREADS=1 python scripts/bench/quality.py --nncf-python V/bin/python --docs docs/quality.md"
PEERS = {
    "onnxruntime": "quantize_dynamic, quantize_static, MatMulNBits (round to nearest, HQQ, k-quant, GPTQ)",
    "torchao": "weight-only int8 and int4",
    "nncf": "4-bit weights with AWQ and scale estimation; its GPTQ and LoRA correction are not run",
    "onnxruntime-genai": "the model builder's int4",
    "olive": "its quantization passes",
    "litert": "AI Edge Quantizer, dynamic int8 and int4",
    "coremltools": "linear, palettization and GPTQ, on the Core ML target",
    "gguf": "Q4_K and its like",
}
"""The peers that a whole bench has, and what of each."""
MODELS = {
    "minilm": "encoder",
    "efficientnet-lite0": "convolutions",
    "mobilenetv2": "convolutions",
    "whisper-tiny.en": "speech",
    "smollm2-float": "language model, fine-tuned off its 4-bit grid by scripts/bench/float_smollm2.py",
}
LOW_RANK = Path(__file__).parent / "quality_lowrank.md"
"""A paragraph whose numbers are of single runs, noted by hand."""
INT8_COSINE, INT8_MB = 0.998, 23.5
HEAD = f"""# Compression quality

What is left of a model in the file that ships, edgeport's methods beside other tools'. Made with

    {COMMAND}

(`V` is a virtual environment with NNCF.) Every row is a file made from the same float model and run by ONNX Runtime
on the same real inputs, which no method was calibrated on; the reference is the float model in PyTorch. Methods
that calibrate, ours and the others', get the same inputs of another slice. So few samples rank methods that differ
clearly; they don't separate neighbours.

*bits/weight* counts scales and zero points and averages over the weights that are quantized; *MB* is the whole file in
1e6 bytes. "embeddings float" in a row therefore means few bits a weight and a large file. *simulated* rows run in
PyTorch with the numbers the tool chose; their MB is what dense packing would take, and 1% is allowed for the graph.
`MatMulNBits` and NNCF leave a Gemm (MiniLM's pooler, 0.6 MB) in float, which their MB shows. Every file runs in the
same session settings; on x86 without VNNI those keep 8-bit products from saturating, for all tools alike. The *error*
that methods are ranked by is 1 - mean cosine for embeddings and mean KL(original || file) for class scores.

**Aim**: at no more bytes and bits a weight, at most half the error of each peer; for MiniLM in 8 bits a cosine of at
least {INT8_COSINE} in at most {INT8_MB} MB.
"""


def int8_aim(rows: Sequence[Result]) -> str:
    """MiniLM's own aim, by its best 8-bit row that also quantizes activations, and its best one that does not."""
    lines = []
    for words in ("dynamic int8", "float"):
        able = [r for r in rows if r.ours and r.activations == words and 7 < r.bits < 9 and r.bytes <= INT8_MB * 1e6]
        if not able:
            lines.append(f"- 8 bits, {words} activations: not run.")
            continue
        best = min(able, key=lambda row: row.error)
        aim = "met" if best.mean >= INT8_COSINE else f"missed by {INT8_COSINE - best.mean:.4f}"
        hidden = "" if best.hidden is None else f", {best.hidden:.5f} of hidden states"
        lines.append(
            f"- 8 bits, {words} activations: **{aim}** ({best.name}: cosine {best.mean:.5f} of sentence embeddings"
            f"{hidden}, {best.bytes / 1e6:.2f} MB)."
        )
    return "\n".join(lines)


def verdict(rows: Sequence[Result]) -> str:
    """How many peers' rows ours halve, and the best peer of each width."""
    found = duels(rows)
    if not found:
        return "- no peer was run."
    lines = [
        f"- half the error of a peer's row at no more bytes and bits: {sum(d.met for d in found)} of {len(found)}."
    ]
    for low, high, words in ((7, 33, "8-bit"), (0, 7, "4-bit")):
        width = [duel for duel in found if low < duel.peer.bits <= high]
        if not width:
            continue
        duel = width[0]  # the least error
        size = f"{duel.peer.bytes / 1e6:.2f} MB"
        peer = f"best {words} peer, {duel.peer.tool} {duel.peer.name} ({duel.peer.error:.5f}, {size})"
        if duel.ours is None or duel.ratio is None:
            lines.append(f"- {peer}: **missed**, none of ours is as small.")
        else:
            word = "met" if duel.met else "missed"
            ours = (
                f"{duel.ours.name} has {duel.ours.error:.5f} in {duel.ours.bytes / 1e6:.2f} MB, {duel.ratio:.2f} of it"
            )
            lines.append(f"- {peer}: **{word}**, {ours}.")
    return "\n".join(lines)


def document(rows: Sequence[Result]) -> str:
    """The whole page."""
    parts = [HEAD]
    names = sorted({row.model for row in rows})
    for name in names:
        mine = [row for row in rows if row.model == name]
        parts.append(f"## {name}\n")
        counts = sorted({row.samples for row in mine})
        parts.append(f"{' or '.join(str(count) for count in counts)} inputs of the parity slice.\n")
        parts.append((int8_aim(mine) + "\n" if name == "minilm" else "") + verdict(mine) + "\n")
        parts.append(result_table(mine) + "\n")
        parts.append("Each peer against the best of ours that is no larger:\n")
        parts.append(duel_table(mine) + "\n")
    tools = {row.tool.split()[0] for row in rows}
    parts.append("## Not measured yet\n")
    parts += [f"- peer {tool}: {what}" for tool, what in PEERS.items() if tool not in tools]
    parts += [f"- model {name}: {what}" for name, what in MODELS.items() if name not in names]
    if not any(row.cpu_ratio for row in rows):
        parts.append("- processor time: `--latency` on a quiet machine. Until then nothing here says what is fast.")
    parts.append("\n" + LOW_RANK.read_text().rstrip())
    return "\n".join(parts) + "\n"


def write_docs(rows: Sequence[Result], path: Path) -> None:
    path.write_text(document(rows))
