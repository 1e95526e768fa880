#!/usr/bin/env python
"""Structured compression on real models, through shipped files: pruned, healed, and beside the simple alternatives.

    OMP_NUM_THREADS=1 python scripts/bench/structured.py --docs docs/pruning.md

Every row is a recipe (structured_rows.py) that edgeport runs for each of the row's targets, and every number is of the
file that came out: bytes, operations of its products with weights, time beside the original's file in the same runtime
(calls in turn, processor time), outputs beside the original's in torch, and the suites' questions. Encoders get a
classifier on their own embeddings, so that a smaller model is not judged by how well it imitates. Core ML files are
converted and run in edgeport's reference evaluator: no Apple hardware, no time.

Rows are kept as JSON in --out and made once. What `edgeport compress` makes of a row (training included) is kept beside
it, and inside a step edgeport's own cache and checkpoints are, so that a stopped run goes on where it was. `--rows
'minilm*'` takes some rows, `--list` names them, `--fresh` measures them again, `--retime` only their times: on a
machine that does nothing else, as times of a long run have other work beside them.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
from scipy.special import log_softmax
from structured_published import published_folder
from structured_rows import CALIBRATION, COREML, ORIGINAL, PUBLISHED_L3, ROWS, SUITES, Row
from structured_table import document

from edgeport.bundle.read import Bundle, read_bundle
from edgeport.model.load import load_model
from edgeport.runtime.session import Session
from edgeport.storage import cache_root, write_text
from edgeport.validate.evidence import TaskScore
from edgeport.validate.intervals import mean_interval
from edgeport.validate.latency import measure_latency
from edgeport.validate.suites.definition import load_suite
from edgeport.validate.suites.evaluate import evaluate
from edgeport.validate.suites.rows import load_rows
from edgeport.validate.suites.subject import Subject, of_artifact, of_model

ROOT = Path(__file__).resolve().parents[2]
MARK = "<!-- structured -->"
SAMPLES = 48
LANGUAGE_SAMPLES = 8
"""Inputs whose outputs are compared; of language models few, as the passages are compared anyway."""
QUERIES, SECONDS = 48, 20.0
TEXTS, TOKENS = 24, 64
"""Passages, and tokens of each, that language models are asked."""
CUTS = ("prune_depth", "prune_width", "prune_channels", "lowrank")


def slug(text: str) -> str:
    """A label as a folder's name."""
    return re.sub(r"[^a-z0-9.+]+", "-", text.lower()).strip("-")


def recipe_file(row: Row, folder: Path) -> Path:
    """The row's recipe as a file. Its gate lets everything pass: the table is what judges."""

    def value(item: Any) -> str:
        if isinstance(item, Mapping):
            return "{ " + ", ".join(f"{key} = {value(each)}" for key, each in item.items()) + " }"
        return json.dumps(item)

    lines = ["schema_version = 1", f"name = {value(slug(row.name))}", f"summary = {value(row.name)}"]
    for step in row.steps:
        lines += ["", "[[compress]]", *(f"{key} = {value(item)}" for key, item in step.items())]
    if row.model in CALIBRATION and any(step["method"] in CUTS for step in row.steps):
        lines += ["", "[calibration]", *(f"{key} = {value(item)}" for key, item in CALIBRATION[row.model].items())]
    lines += ["", "[gate]", "size_ratio_max = 2"]
    path = folder / "recipe.toml"
    write_text(path, "\n".join(lines) + "\n")
    return path


def edgeport(log: Path, *arguments: str | Path) -> None:
    """Run the command line in a process of its own; what it says goes into a file.

    Raises:
        SystemExit: it could not finish. A gate that fails is no failure.
    """
    command = [sys.executable, "-m", "edgeport", *map(str, arguments)]
    with log.open("w") as file:
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False)
    if done.returncode in (1, 2, 3, 70):
        raise SystemExit(f"edgeport {arguments[0]} stopped with {done.returncode}: see {log}")


def source_of(row: Row, folder: Path) -> tuple[str, bool]:
    """What `edgeport export` is given, and whether the row's steps are done already.

    The folder of a pruned (and trained) model is kept, so that later versions of the code go on from it.
    """
    if row.source == PUBLISHED_L3:
        return str(published_folder()), True
    start = f"zoo:{row.model}" if row.source is None else str(plain_folder(row, folder))
    methods = {step["method"] for step in row.steps}
    if not methods & {*CUTS, "distill"}:
        return start, False
    place = folder / "compressed"
    if not (place / "edgeport.json").is_file():
        recipe = recipe_file(row, folder)
        edgeport(folder / "compress.log", "compress", start, "-r", recipe, "-o", place, "--force")
    return str(place), True


def plain_folder(row: Row, folder: Path) -> Path:
    """What another row's steps left, as transformers loads it: without the record of where it came from."""
    made = folder.parent / slug(f"{row.model} {row.source}") / "compressed"
    if not (made / "model.safetensors").is_file():
        raise SystemExit(f"{row.label} goes on from the row {row.source!r}, which is to be made first")
    plain = folder / "start"
    plain.mkdir(exist_ok=True)
    for path in made.iterdir():
        if path.is_file() and path.name != "edgeport.json" and not (plain / path.name).exists():
            os.link(path, plain / path.name)
    return plain


def make_bundle(row: Row, target: str, folder: Path) -> Bundle:
    """Export a row for a target."""
    out = folder / target
    source, done = source_of(row, folder)
    recipe: tuple[str | Path, ...] = ("-r", recipe_file(replace(row, steps=()) if done else row, folder))
    if (Path(source) / "edgeport.json").is_file():
        recipe = ()
    samples = LANGUAGE_SAMPLES if "language" in SUITES[row.model] else SAMPLES
    options = ("-t", target, "-o", out, "--samples", str(samples), "--quick", "--force")
    edgeport(folder / f"{target}.log", "export", source, *recipe, *options)
    return read_bundle(out)


def main_output(bundle: Bundle) -> tuple[str, Mapping[str, float] | None]:
    """How near the file's outputs are to the original's: divergence of scores, else cosine of the embedding."""
    assert bundle.evidence is not None
    last = bundle.evidence.parity[-1]
    found, name = (last.kl, "KL, nats") if last.kl is not None else (last.cosine, "cosine")
    return name, None if found is None else found.model_dump()


def cell_of(row: Row, target: str, folder: Path, original: Bundle | None) -> dict[str, Any]:
    """What the table says of a row's file for one target."""
    bundle = make_bundle(row, target, folder)
    evidence = bundle.evidence
    assert evidence is not None
    likeness, parity = main_output(bundle)
    return {
        "bytes": evidence.size.bytes,
        "predicted_bytes": evidence.size.predicted_bytes,
        "likeness": likeness,
        # Another checkpoint is compared with itself there.
        "parity": parity if row.source is None else None,
        "time_ratio": None if target == COREML or original is None else time_ratio(bundle, original),
        "products": None if evidence.products is None else evidence.products.model_dump(mode="json"),
        "steps": [
            {key: value for key, value in asdict_of(step).items() if key != "parts"} for step in bundle.manifest.steps
        ],
        "statement": evidence.states.statement,
    }


def time_ratio(bundle: Bundle, original: Bundle) -> dict[str, Any] | None:
    """Time of a file relative to the original's in the same runtime: calls in turn, one thread, processor time."""
    inputs = max(bundle.golden().inputs, key=lambda call: sum(value.size for value in call.values()))
    names = {spec.name for spec in original.artifact.inputs} & {spec.name for spec in bundle.artifact.inputs}
    inputs = {name: value for name, value in inputs.items() if name in names} or inputs
    latency = measure_latency(
        bundle.artifact,
        original.artifact,
        inputs,
        threads=1,
        queries=QUERIES,
        warmup=3,
        seconds=0.0,
        limit_seconds=SECONDS,
    )
    ratio = latency.cpu_ratio or latency.ratio
    return None if ratio is None else ratio.model_dump()


def time_again(row: Row, out: Path, known: dict[str, Any]) -> None:
    """Put new times into a row's record."""
    for target, cell in known["cells"].items():
        original = out / slug(f"{row.model} {ORIGINAL}") / target
        if target != COREML and row.name != ORIGINAL and original.is_dir():
            cell["time_ratio"] = time_ratio(read_bundle(out / slug(row.label) / target), read_bundle(original))
    known["load"] = round(os.getloadavg()[0], 1)


def asdict_of(step: Any) -> dict[str, Any]:
    """A step's record, whatever holds it."""
    return dict(step) if isinstance(step, Mapping) else dict(step.model_dump(mode="json"))


class Remembering:
    """A session that answers the same inputs once: suites ask a file as its own original, too."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.name, self.vendor_kernels = session.name, session.vendor_kernels
        self.answers: dict[bytes, dict[str, np.ndarray]] = {}

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """See `Session.run`."""
        key = b"".join(value.tobytes() for value in inputs.values())
        if key not in self.answers:
            self.answers[key] = self.session.run(inputs)
        return self.answers[key]


def ask(row: Row, bundle: Bundle, *, quick: bool) -> dict[str, Any]:
    """The suites' questions to a row's file, a classifier on embeddings being its own."""
    original = of_model(load_model(f"zoo:{row.model}"))
    subject: Subject = of_artifact(bundle.artifact, original.traits)
    if subject.session is None:
        return language(original, subject)
    subject = replace(subject, session=Remembering(subject.session))
    return {suite: record_of(evaluate(suite, subject, subject, quick=quick)) for suite in SUITES[row.model]}


def record_of(task: TaskScore) -> dict[str, Any]:
    """What is kept of a suite's answers: the file's."""
    return {
        "unit": task.unit,
        "n": task.n,
        "higher_is_better": task.higher_is_better,
        "score": None if task.artifact is None else task.artifact.model_dump(),
        "scores": task.artifact_scores,
        "weights": task.weights,
    }


def language(original: Subject, file: Subject) -> dict[str, Any]:
    """Loss a token and divergence from the original over the passages of the suite `language`, one number a passage.

    The file is fed token by token through its cache, the original reads a passage at once.
    """
    suite, place = load_suite("language")
    tokenizer = original.tokenizer(TOKENS)
    found: dict[str, list[float]] = {"language": [], "KL, nats": []}
    weights = []
    for row in load_rows(suite, place, quick=False).evaluation[:TEXTS]:
        ids = tokenizer.encode(row["text"]).ids
        logs = [
            log_softmax(each.continuations(ids[:1], [ids[1:]])[0].astype(np.float64), axis=1)
            for each in (original, file)
        ]
        weights.append(float(len(ids) - 1))
        found["language"].append(float(-logs[1][np.arange(len(ids) - 1), ids[1:]].mean()))
        found["KL, nats"].append(float((np.exp(logs[0]) * (logs[0] - logs[1])).sum(1).mean()))
    return {
        name: {
            "unit": "nats",
            "n": len(scores),
            "higher_is_better": False,
            "score": mean_interval(np.array(scores) * np.array(weights), weights).model_dump(),
            "scores": scores,
            "weights": weights,
        }
        for name, scores in found.items()
    }


def parameters_of(row: Row, cells: Mapping[str, Any], out: Path) -> int:
    """Values of all parameters, after the row's steps."""
    steps = next(iter(cells.values()))["steps"]
    if steps:
        return int(steps[-1]["parameters_after"])
    if row.source not in (None, PUBLISHED_L3):
        return int(json.loads((out / slug(f"{row.model} {row.source}") / "row.json").read_text())["parameters"])
    reference = str(published_folder()) if row.source == PUBLISHED_L3 else f"zoo:{row.model}"
    return sum(parameter.numel() for parameter in load_model(reference).module.parameters())


def make_row(row: Row, out: Path, known: Mapping[str, Any], targets: Sequence[str], *, quick: bool) -> dict[str, Any]:
    """Export, time and ask a row's files, but for those that are known."""
    start = time.perf_counter()
    folder = out / slug(row.label)
    folder.mkdir(parents=True, exist_ok=True)
    cells = dict(known.get("cells", {}))
    for target in targets:
        if target not in cells:
            place = out / slug(f"{row.model} {ORIGINAL}") / target
            cells[target] = cell_of(row, target, folder, read_bundle(place) if row.name != ORIGINAL else None)
    tasks = known.get("tasks")
    if tasks is None and row.targets[0] in cells:
        tasks = ask(row, read_bundle(folder / row.targets[0]), quick=quick)
    git = ["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"]
    return {
        "label": row.label,
        "row": asdict(row),
        "parameters": parameters_of(row, cells, out),
        "cells": {target: cells[target] for target in row.targets if target in cells},
        "tasks": tasks,
        "seconds": round(known.get("seconds", 0) + time.perf_counter() - start, 1),
        "load": round(os.getloadavg()[0], 1),
        "commit": subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="*", help="patterns of 'model name', with commas (? for a comma in a name)")
    parser.add_argument("--out", type=Path, default=cache_root() / "bench" / "structured" / "rows")
    parser.add_argument("--targets", default="*", help="pattern of the targets to make files for")
    parser.add_argument("--list", action="store_true", help="name the rows and say which are there; make none")
    parser.add_argument("--fresh", action="store_true", help="make the rows again")
    parser.add_argument("--retime", action="store_true", help="time the files that are there again, make none")
    parser.add_argument("--quick", action="store_true", help="few questions of each suite")
    parser.add_argument("--docs", type=Path, help=f"a page with the mark {MARK} around the tables' place")
    arguments = parser.parse_args()
    wanted = [row for row in ROWS if any(fnmatch.fnmatch(row.label, each) for each in arguments.rows.split(","))]
    for row in wanted:
        path = arguments.out / slug(row.label) / "row.json"
        known = json.loads(path.read_text()) if path.is_file() and not arguments.fresh else {}
        targets = [target for target in row.targets if fnmatch.fnmatch(target, arguments.targets)]
        missing = [target for target in targets if target not in known.get("cells", {})]
        if arguments.list:
            print(row.label + (f" (not made: {', '.join(missing)})" if missing else ""))
        elif arguments.retime and known:
            time_again(row, arguments.out, known)
            write_text(path, json.dumps(known, indent=1) + "\n")
        elif missing or known.get("tasks") is None:
            made = make_row(row, arguments.out, known, missing, quick=arguments.quick)
            write_text(path, json.dumps(made, indent=1) + "\n")
            print(f"{row.label}: {made['seconds']:.0f} s", file=sys.stderr, flush=True)
    if arguments.list:
        return
    paths = [(row, arguments.out / slug(row.label) / "row.json") for row in ROWS]
    text = document([(row, json.loads(path.read_text())) for row, path in paths if path.is_file()])
    print(text)
    if arguments.docs:
        before, _, after = arguments.docs.read_text().split(MARK)
        write_text(arguments.docs, f"{before}{MARK}\n\n{text}\n\n{MARK}{after}")


if __name__ == "__main__":
    main()
