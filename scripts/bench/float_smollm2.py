#!/usr/bin/env python
"""An honest float language model: SmolLM2-135M, fine-tuned until its weights have left the 4-bit grid they came on.

    OMP_NUM_THREADS=2 python scripts/bench/float_smollm2.py [--steps 300] [--batch 2] [--tokens 256]

The zoo's SmolLM2 is dequantised Q4_1 (blocks of 32 weights, each on 16 evenly spaced values), so a quantizer that
finds that grid again looks perfect on it. All weights are trained in float32 with AdamW on the calibration excerpts;
the same arguments give the same model on the same machine. A stopped run goes on from its last checkpoint. The
result is a Hugging Face folder in the cache, for `quality.py --models FOLDER`; `grid.json` in it says how far the
weights left the grid, before and after. Plan for 6 x 135M x batch x tokens floating-point operations a step.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from rich.console import Console

from edgeport.compress.assign import compressible
from edgeport.data.cards import load_card
from edgeport.data.samples import CARDS
from edgeport.data.text import open_tokenizer, read_texts
from edgeport.model.load import load_model
from edgeport.model.types import Model
from edgeport.storage import cache_root, new_folder, write_text

BLOCK = 32
LEVELS = 16
BINS = 10
UNIFORM = 12**-0.5
"""The residual, in steps, of weights that know nothing of any grid."""
FOLDER = "smollm2-float"


@dataclass(frozen=True)
class OffGrid:
    """How far weights are from the Q4_1 grid spanned by the least and greatest weight of each block of 32.

    Attributes:
        residual: root mean square distance to the nearest grid value, in steps; 0 on the grid, 0.29 for weights
            that are spread evenly between its values.
        on_grid: share of blocks with no weight further than a hundredth of a step from it.
        distinct: mean number of different values in a block: at most 16 on the grid.
        histogram: share of weights by their distance, in ten bins from 0 to half a step.
    """

    residual: float
    on_grid: float
    distinct: float
    histogram: tuple[float, ...]


def off_grid(weights: list[torch.Tensor]) -> OffGrid:
    """The metric over matrices (N, K) with K divisible by 32."""
    square = blocks_on = distinct = 0.0
    counts = torch.zeros(BINS, dtype=torch.float64)
    blocks = 0
    for weight in weights:
        rows = weight.detach().to(torch.float64).reshape(-1, BLOCK)
        low, high = rows.amin(dim=1, keepdim=True), rows.amax(dim=1, keepdim=True)
        steps = (rows - low) / ((high - low) / (LEVELS - 1)).clamp_min(1e-30)
        distance = (steps - steps.round()).abs()
        square += float(distance.square().sum())
        blocks_on += float((distance.amax(dim=1) < 0.01).sum())
        distinct += float((rows.sort(dim=1).values.diff(dim=1) > 0).sum() + len(rows))
        counts += torch.histc(distance, BINS, 0.0, 0.5)
        blocks += len(rows)
    total = blocks * BLOCK
    histogram = tuple(round(float(count) / total, 4) for count in counts)
    return OffGrid((square / total) ** 0.5, blocks_on / blocks, distinct / blocks, histogram)


def matrices(model: Model) -> list[torch.Tensor]:
    """The weights of the linear layers. The embedding, which is the head too, came in more bits, on no such grid."""
    found = compressible(model.module)
    return [model.module.get_parameter(name) for name, (kinds, _) in found.items() if kinds == ("linear",)]


def tokens(model: Model, split: str) -> torch.Tensor:
    """The excerpts of a split as one row of token ids, each text behind the end-of-text token; int64 (T,)."""
    card = load_card(CARDS["text"])
    tokenizer = open_tokenizer(model.assets["tokenizer.json"], 1 << 20)
    end = int(getattr(model.module.config, "eos_token_id", None) or 0)
    texts = read_texts(card, card.fetch(), split)  # type: ignore[arg-type]
    ids = [number for encoding in tokenizer.encode_batch(texts) for number in (end, *encoding.ids)]
    return torch.tensor(ids)


def batches(ids: torch.Tensor, batch: int, length: int, *, seed: int, first: int) -> Iterator[torch.Tensor]:
    """Random windows, int64 (batch, length); step n gets the same ones however often the run was stopped."""
    step = first
    while True:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        starts = torch.randint(0, len(ids) - length, (batch,), generator=generator)
        yield torch.stack([ids[start : start + length] for start in starts.tolist()])
        step += 1


def perplexity(module: torch.nn.Module, ids: torch.Tensor, length: int, windows: int) -> float:
    """exp of the mean loss over the first `windows` windows."""
    module.eval()
    with torch.inference_mode():
        parts = [ids[start : start + length][None] for start in range(0, windows * length, length)]
        losses = [float(module(input_ids=part, labels=part, use_cache=False).loss) for part in parts]
    return float(torch.tensor(losses).mean().exp())


def train(model: Model, ids: torch.Tensor, state: Path, arguments: argparse.Namespace, console: Console) -> None:
    """Fine-tune `model.module` in place: AdamW, 20 steps of warm-up, then down to a tenth along a line."""
    module = model.module.requires_grad_(True)
    # No weight decay: the aim is another model as good as this one, not a smaller one.
    optimizer = torch.optim.AdamW(module.parameters(), lr=arguments.lr, betas=(0.9, 0.95), weight_decay=0.0)
    first = 0
    if state.is_file():
        stored = torch.load(state, weights_only=True)
        module.load_state_dict(stored["module"])
        optimizer.load_state_dict(stored["optimizer"])
        first = int(stored["step"])
        console.print(f"going on from step {first}")
    module.train()
    source = batches(ids, arguments.batch, arguments.tokens, seed=arguments.seed, first=first)
    last = arguments.steps if arguments.stop_at is None else min(arguments.stop_at, arguments.steps)
    for step in range(first, last):
        rate = min((step + 1) / 20, 1 - 0.9 * step / arguments.steps)
        for group in optimizer.param_groups:
            group["lr"] = arguments.lr * rate
        window = next(source)
        loss = module(input_ids=window, labels=window, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        console.print(f"step {step + 1} of {arguments.steps}: loss {loss.item():.4f}")
        if (step + 1) % arguments.save_every == 0 or step + 1 == last:
            state.parent.mkdir(parents=True, exist_ok=True)
            stored = {"module": module.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            torch.save(stored, state.with_suffix(".part"))
            os.replace(state.with_suffix(".part"), state)
    module.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="zoo:smollm2")
    parser.add_argument("--out", type=Path, default=cache_root() / "bench" / FOLDER)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--stop-at", type=int, help="stop after this many steps; a later run goes on")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=25)
    parser.add_argument("--windows", type=int, default=32, help="held-apart windows for the perplexity")
    arguments = parser.parse_args()
    console = Console(stderr=True)
    torch.manual_seed(arguments.seed)
    model = load_model(arguments.model)
    held_apart = tokens(model, "parity")
    before = off_grid(matrices(model))
    console.print(f"before: {before}")
    ppl_before = perplexity(model.module, held_apart, arguments.tokens, arguments.windows)
    state = arguments.out.with_name(arguments.out.name + ".state.pt")
    train(model, tokens(model, "calibration"), state, arguments, console)
    after = off_grid(matrices(model))
    console.print(f"after: {after}")
    ppl_after = perplexity(model.module, held_apart, arguments.tokens, arguments.windows)
    record = {
        "settings": {name: getattr(arguments, name) for name in ("model", "steps", "batch", "tokens", "lr", "seed")},
        "before": asdict(before),
        "after": asdict(after),
        "residual_of_evenly_spread": UNIFORM,
        "perplexity_before": ppl_before,
        "perplexity_after": ppl_after,
    }
    print(json.dumps(record, indent=2))
    if arguments.stop_at is not None and arguments.stop_at < arguments.steps:
        console.print(f"stopped at step {arguments.stop_at}; run again without --stop-at to go on")
        return
    with new_folder(arguments.out, replace=True) as folder:
        model.module.save_pretrained(folder)
        for name, path in model.assets.items():
            if not (folder / name).exists():
                shutil.copyfile(path, folder / name)
        write_text(folder / "grid.json", json.dumps(record, indent=2) + "\n")
    state.unlink(missing_ok=True)
    console.print(f"saved {arguments.out}")


if __name__ == "__main__":
    main()
