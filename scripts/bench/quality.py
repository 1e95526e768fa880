#!/usr/bin/env python
"""Compression quality: edgeport's methods against other tools', measured on the file that each of them ships.

    scripts/bench/peer_env.py build/peers
    OMP_NUM_THREADS=1 python scripts/bench/quality.py --peers-venv build/peers --docs docs/quality.md

Every row is a file made from the same float model and run on the same real inputs, which no method was calibrated on;
the reference is the float model in PyTorch. Methods that calibrate, ours and the others', see the same inputs of the
calibration slice. Rows are kept in --out and made once: a stopped run goes on where it was. `--models minilm
--rows 'edgeport*int8*'` takes some of them, `--list` names them, `--fresh` makes them again, and `--latency` times the
ONNX files against the float file. The tools that need an environment of their own are left out without `--peers-venv`.
`smollm2-float` is made by float_smollm2.py. `--simulate` takes our rows from PyTorch, which saves minutes of lowering
for large models; a run without it makes them again.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import logging
import os
import re
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from quality_bench import FILE, ROOT, SAMPLES, Bench, console, cpu_ratio, measure, prepare, provenance
from quality_docs import write_docs
from quality_other import other_peers
from quality_peers import Peer, peers
from quality_rows import Ours, make_ours, our_rows
from quality_table import OURS, Result, duel_table, read_row, result_table

from edgeport.storage import cache_root, write_text

logger = logging.getLogger(__name__)

MODELS = ("minilm", "efficientnet-lite0", "mobilenetv2", "whisper-tiny.en", "smollm2-float")


def make_row(bench: Bench, row: Ours | Peer, folder: Path, *, simulate: bool) -> Result:
    """Make a row's files in an empty folder, and measure them."""
    start = time.perf_counter()
    if isinstance(row, Ours):
        made, facts = make_ours(bench, row, folder, simulate=simulate)
        tool = OURS
    else:
        made, tool = row.make(bench, folder), row.tool
        calibration = f"{min(len(bench.calibration), SAMPLES)} samples" if row.calibrated else "none"
        facts = {"activations": row.activations, "calibration": calibration, "seconds": time.perf_counter() - start}
    commit, versions = provenance()
    return Result(
        model=bench.model.name,
        tool=tool,
        name=row.name,
        weights=row.weights,
        bits=made.bits,
        bytes=made.bytes,
        simulated=made.simulated,
        runtime=made.runtime,
        cpu_ratio=made.cpu_ratio,
        load=None if made.cpu_ratio is None else round(os.getloadavg()[0], 1),
        commit=commit,
        versions=versions,
        **facts,
        **measure(bench, made.outputs),
    )


def slug(text: str) -> str:
    """A label as a folder's name."""
    return re.sub(r"[^a-z0-9.+]+", "-", text.lower()).strip("-")


def run_row(bench: Bench, label: str, row: Ours | Peer, arguments: argparse.Namespace) -> Result:
    """The row from its folder, or made anew."""
    folder = bench.folder / slug(label)
    record = folder / "row.json"
    result = read_row(record) if record.is_file() and not arguments.fresh else None
    if result is None or (result.ours and result.simulated and not arguments.simulate):
        folder.mkdir(parents=True, exist_ok=True)
        empty(folder)
        result = make_row(bench, row, folder, simulate=arguments.simulate)
    if arguments.latency and result.cpu_ratio is None and (folder / FILE).is_file() and not result.simulated:
        load = round(os.getloadavg()[0], 1)
        result = replace(result, cpu_ratio=cpu_ratio(bench, folder / FILE, arguments.rounds), load=load)
    write_text(record, json.dumps(asdict(result), indent=2) + "\n")
    return result


def empty(folder: Path) -> None:
    """Remove what an earlier try left."""
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()


def place(name: str) -> str:
    """A model as `prepare` takes it: folders made by the bench's own scripts lie in the cache."""
    made = cache_root() / "bench" / name
    return str(made) if made.is_dir() else name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS), help="zoo names or folders, with commas")
    parser.add_argument(
        "--rows", default="*", help="pattern of 'tool name' (? for a comma in it), several with commas, in this order"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "quality")
    parser.add_argument("--docs", type=Path, help="write the tables of all rows in --out here")
    parser.add_argument("--list", action="store_true", help="name the rows, make none")
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--latency", action="store_true")
    parser.add_argument("--simulate", action="store_true", help="our rows without their files, for a first look")
    parser.add_argument("--rounds", type=int, default=30, help="timed runs of each file")
    parser.add_argument("--peers-venv", type=Path, help="the folder that peer_env.py filled")
    arguments = parser.parse_args()
    for name in filter(None, arguments.models.split(",")):
        bench = prepare(place(name), arguments.out)
        rows: dict[str, Ours | Peer] = {f"{OURS} {row.name}": row for row in our_rows(bench.model)}
        rows |= {f"{peer.tool} {peer.name}": peer for peer in peers(bench.model)}
        rows |= {f"{peer.tool} {peer.name}": peer for peer in other_peers(bench, arguments.peers_venv)}
        wanted = [label for pattern in arguments.rows.split(",") for label in fnmatch.filter(rows, pattern)]
        if arguments.list:
            print("\n".join(f"{bench.model.name}: {label}" for label in dict.fromkeys(wanted)))
            continue
        results, failed = [], []
        for label in dict.fromkeys(wanted):
            try:
                result = run_row(bench, label, rows[label], arguments)
            except Exception:  # a tool that fails is no reason to measure none of the others
                failed.append(label)
                logger.exception("%s  %s: failed", bench.model.name, label)
                continue
            results.append(result)
            console.print(
                f"{bench.model.name}  {label}: {result.bits:.2f} bits, {result.bytes / 1e6:.2f} MB, "
                f"{result.metric} {result.error:.5f}, {result.seconds:.0f} s"
            )
        print(f"## {bench.model.name}\n\n{result_table(results)}\n\n{duel_table(results)}\n")
        if failed:
            console.print(f"{bench.model.name}: not measured: {', '.join(failed)}")
    if arguments.docs:
        write_docs([read_row(path) for path in sorted(arguments.out.glob("*/*/row.json"))], arguments.docs)


if __name__ == "__main__":
    main()
