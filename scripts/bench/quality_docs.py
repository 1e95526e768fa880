"""docs/quality.md out of the bench's rows: every sentence with a number in it comes from them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from quality_table import SLACK, SPEECH, Result, duel_table, duels, result_table

COMMAND = """scripts/bench/peer_env.py build/peers
    OMP_NUM_THREADS=2 python scripts/bench/float_smollm2.py --lr 1e-3 --steps 300
    OMP_NUM_THREADS=1 python scripts/bench/quality.py --peers-venv build/peers --docs docs/quality.md"""
PEERS = {
    "onnxruntime": "quantize_dynamic, quantize_static, MatMulNBits (round to nearest, HQQ, k-quant, GPTQ)",
    "torchao": "weight-only int8 and int4",
    "nncf": "4-bit weights with AWQ and scale estimation, static int8",
    "onnxruntime-genai": "the model builder's int4 and int8",
    "olive-ai": "its own ONNX passes",
    "ai-edge-quantizer": "dynamic and static int8, int4, on LiteRT",
    "coremltools": "linear and k-means, on the Core ML target",
    "llama.cpp": "Q4_K_M and its like",
}
"""The peers that a whole bench has, and what of each."""
MODELS = {
    "minilm": "all-MiniLM-L6-v2, an encoder of 22.7 M parameters",
    "efficientnet-lite0": "EfficientNet-Lite0, a convolutional classifier of 4.7 M parameters",
    "mobilenetv2": "MobileNetV2, a convolutional classifier of 3.5 M parameters",
    "whisper-tiny.en": "Whisper tiny.en, speech recognition, 37.8 M parameters, the checkpoint in float16",
    "smollm2-float": "SmolLM2-135M, a language model fine-tuned off its 4-bit grid by scripts/bench/float_smollm2.py "
    "(300 steps, which left its perplexity higher than it came)",
}
LIMITS = (
    "ONNX Runtime's GPTQ on language models: it runs the whole model for each matrix and sample, which takes hours.",
    "coremltools' k-means on MiniLM: palettes of 22 M weights were not done after twelve minutes on a busy machine.",
    "NNCF's GPTQ and LoRA correction: nncf 3.4 has them for OpenVINO models, not for ONNX.",
    "llama.cpp's importance matrices: the package with its library has no tool that collects one.",
    "Olive's PyTorch passes (GPTQ, AWQ, QuaRot); its passes for ONNX files are in the tables, except HQQ, whose file "
    "of MiniLM gives a cosine below 0.01 in ONNX Runtime 1.31.1, on either axis.",
    "coremltools' training-time palettization (DKM) and its GPTQ.",
    "NNCF's 4-bit file of Whisper: ONNX Runtime 1.31.1 refuses to run it (a convolution's scales have three axes).",
    "NNCF's `quantize` on Whisper; coremltools' k-means on Whisper and SmolLM2: processor time.",
    "SmolLM2 in NNCF, Olive and LiteRT, and in coremltools' int4: processor time.",
)
"""What was tried or considered and has no row, and why."""
TRIED, LOW_RANK = (Path(__file__).parent / f"quality_{name}.md" for name in ("tried", "lowrank"))
"""Sections whose numbers are of single runs, noted by hand."""
INT8_COSINE, INT8_MB = 0.998, 23.5
INT8_LOSS = 0.002
HEAD = f"""# Compression quality

What is left of a model in the file that ships, edgeport's methods beside other tools'. Made with

    {COMMAND}

Every row is a file made from the same float model and run on the same real inputs, which no method was calibrated on;
the reference is the float model in PyTorch. Methods that calibrate, ours and the others', get the same inputs of
another slice. So few samples rank methods that differ clearly; they don't separate neighbours.

*run by* is what executed the file. "Core ML reference evaluator" is edgeport's own interpreter of Core ML programs, for
coremltools' files and ours alike: no Apple hardware was used. *simulated* rows run in PyTorch with the numbers the tool
chose; their MB is what dense packing would take. llama.cpp's rows run its dequantised weights in PyTorch, and their MB
counts tensors alone. To both a file of ours may add 1% for its graph.

*bits/weight* counts scales and zero points and averages over the weights that are quantized; *MB* is the whole file in
1e6 bytes. "embeddings float" in a row therefore means few bits a weight and a large file. `MatMulNBits` and NNCF leave
a Gemm (MiniLM's pooler, 0.6 MB) in float, which their MB shows. A tied head is a weight of its own in the float ONNX
file that peers start from, because their quantizers leave out one that is the embedding transposed; so it is stored
twice.

Every ONNX file runs in the same session settings; on x86 without VNNI those keep 8-bit products from saturating, for
all tools alike. The *error* that methods are ranked by is 1 - mean cosine for embeddings and mean KL(original || file)
for class scores, for language models over two corpora. *CPU time / float* is the processor time of one run on one
thread relative to the plainly exported float ONNX file, medians of runs that took turns.

**Aim**: at no more bytes and bits a weight (give or take {SLACK}), at most half the error of each peer; in 8 bits a
loss of at most {INT8_LOSS:.1%} of the float model's metric, for MiniLM a cosine of at least {INT8_COSINE} in at most
{INT8_MB} MB. Core ML files stand against Core ML files and ONNX files against other runtimes' files; numbers of tools
that make no file here (llama.cpp, torchao) stand against any of ours.
"""


def encoder_aim(rows: Sequence[Result]) -> list[str]:
    """MiniLM's own aim, by its best 8-bit row that also quantizes activations, and its best one that does not."""
    lines = []
    for words in ("dynamic int8", "float"):
        able = [r for r in rows if r.ours and r.activations == words and 7 < r.bits < 9 and r.bytes <= INT8_MB * 1e6]
        if not able:
            lines.append(f"- 8 bits, {words} activations: not run.")
            continue
        best = min(able, key=lambda row: row.error)
        mean = best.mean or 0.0
        aim = "met" if mean >= INT8_COSINE else f"missed by {INT8_COSINE - mean:.4f}"
        hidden = "" if best.hidden is None else f", {best.hidden:.5f} of hidden states"
        lines.append(
            f"- 8 bits, {words} activations: **{aim}** ({best.name}: cosine {mean:.5f} of sentence embeddings"
            f"{hidden}, {best.bytes / 1e6:.2f} MB)."
        )
    return lines


def int8_aim(rows: Sequence[Result]) -> list[str]:
    """How much of the float model's metric our best 8-bit row loses."""
    able = [row for row in rows if row.ours and 7 < row.bits < 9.1 and row.top1 is not None]
    if not able:
        return []
    best = min(able, key=lambda row: row.error)
    top1 = best.top1 or 0.0
    if best.corpora:
        losses = {name: found.perplexity / found.float_perplexity - 1 for name, found in best.corpora.items()}
        worst = max(losses.values())
        words = ", ".join(
            f"{name} {found.float_perplexity:.3f} to {found.perplexity:.3f}" for name, found in best.corpora.items()
        )
        aim = "met" if worst <= INT8_LOSS else f"missed by {worst - INT8_LOSS:.2%}"
        return [f"- 8 bits, perplexity within {INT8_LOSS:.1%} of float: **{aim}** ({best.name}: {words})."]
    found = f"{best.name}: same most likely class in {top1:.1%} of {best.samples} inputs, KL {best.error:.5f}"
    if best.accuracy is None or best.float_accuracy is None:
        loss, words = 1 - top1, found
    else:
        loss = best.float_accuracy - best.accuracy
        words = f"accuracy {best.float_accuracy:.3f} to {best.accuracy:.3f}; {found}; so few inputs can't show 0.2%"
    aim = "met" if loss <= INT8_LOSS else f"missed by {loss - INT8_LOSS:.2%}"
    return [f"- 8 bits, within {INT8_LOSS:.1%} of the float metric: **{aim}** ({words})."]


def verdict(rows: Sequence[Result]) -> list[str]:
    """How many peers' rows ours halve, and the best peer of each width."""
    found = duels(rows)
    if not found:
        return ["- no peer was run."]
    lines = [
        f"- half the error of a peer's row at no more bytes and bits: {sum(d.met for d in found)} of {len(found)}."
    ]
    for low, high, words in ((7, 33, "8-bit"), (5.2, 7, "6-bit"), (0, 5.2, "4-bit")):
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
    return lines


def slower(rows: Sequence[Result]) -> list[str]:
    """Our files that take longer than the float one, as far as they were timed."""
    timed = [row for row in rows if row.ours and row.cpu_ratio is not None]
    if not timed:
        return []
    slow = [f"{row.name} ({row.cpu_ratio:.2f})" for row in timed if (row.cpu_ratio or 0) > 1.005]
    loads = sorted(row.load for row in timed if row.load is not None)
    load = f" (load average {loads[0]:g} to {loads[-1]:g} on 2 cores while timing)" if loads else ""
    if not slow:
        return [f"- none of our {len(timed)} timed files is slower than the float file{load}."]
    return [f"- slower than the float file{load}: {', '.join(slow)}."]


def section(name: str, rows: Sequence[Result]) -> str:
    """One model."""
    counts = " or ".join(str(count) for count in sorted({row.samples for row in rows}))
    what = f"{MODELS.get(name, name)}. {counts} inputs of the parity slice"
    corpora = next((row.corpora for row in rows if row.corpora), None)
    if corpora and set(corpora) == {SPEECH}:
        found = corpora[SPEECH].float_perplexity
        what += f", windows of 5 seconds that overlap; perplexity of the words spoken, by the float model: {found:.3f}"
    elif corpora:
        words = ", ".join(f"{key} {found.float_perplexity:.2f}" for key, found in corpora.items())
        what += f", windows of 256 tokens, half of them of each corpus; perplexity of the float model: {words}"
    accurate = next((row.float_accuracy for row in rows if row.float_accuracy is not None), None)
    if accurate is not None:
        what += f", photographs and their mirror images; accuracy of the float model: {accurate:.3f}"
    aims = [*(encoder_aim(rows) if name == "minilm" else int8_aim(rows)), *verdict(rows), *slower(rows)]
    return "\n\n".join(
        [
            f"## {name}",
            what + ".",
            "\n".join(aims),
            result_table(rows),
            "Each peer against the best of ours that is no larger:",
            duel_table(rows),
        ]
    )


def document(rows: Sequence[Result]) -> str:
    """The whole page."""
    present = {row.model for row in rows}
    order = [name for name in MODELS if name in present] + sorted(present - set(MODELS))
    parts = [HEAD.rstrip()]
    parts += [section(name, [row for row in rows if row.model == name]) for name in order]
    tools = {row.tool.split()[0] for row in rows}
    missing = [f"- peer {tool}: {what}" for tool, what in PEERS.items() if tool not in tools]
    missing += [f"- model {name}: {what}" for name, what in MODELS.items() if name not in present]
    missing += [f"- {text}" for text in LIMITS]
    if not any(row.cpu_ratio for row in rows):
        missing.append("- processor time: `--latency`. Until then nothing here says what is fast.")
    commits = sorted({row.commit for row in rows if row.commit})
    parts += [TRIED.read_text().rstrip(), "## Not measured", "\n".join(missing), LOW_RANK.read_text().rstrip()]
    if commits:
        parts.append(f"Rows were made at edgeport's commits {', '.join(commits)} (a + marks changes since).")
    return "\n\n".join(parts) + "\n"


def write_docs(rows: Sequence[Result], path: Path) -> None:
    """Write the page."""
    path.write_text(document(rows))
