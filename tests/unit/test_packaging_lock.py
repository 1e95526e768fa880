"""The lock file, and the table that scripts/matrix.py writes into the README."""

from __future__ import annotations

import importlib.util
import re
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]


def _script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"edgeport_scripts_{name}", ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _pins() -> dict[str, str]:
    lines = (ROOT / "scripts" / "requirements.lock").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", pin) for pin in pins)
    return dict(pin.split("==") for pin in pins)


def test_the_lock_satisfies_every_requirement() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(line for group in project["optional-dependencies"].values() for line in group)]
    pins = _pins()
    for requirement in map(Requirement, lines):
        name = canonicalize_name(requirement.name)
        if name != "edgeport":
            assert requirement.specifier.contains(pins[name]), str(requirement)


def test_the_lock_has_every_dependency_of_its_packages() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = project["optional-dependencies"]
    lines = [*project["dependencies"], *groups["executorch"], *groups["coreml"], *groups["lm-eval"], *groups["dev"]]
    closure = _script("lock").closure([Requirement(line) for line in lines])
    assert set(closure) == set(_pins())


def _document(cosines: list[float], **evidence: Any) -> dict[str, Any]:
    parity = [{"cosine": {"mean": value}, "top1_agreement": None, "kl": None} for value in cosines]
    return {
        "evidence": {
            "size": {"bytes": 23_100_000, "ratio": 0.2538},
            "parity": parity,
            "latency": {"ratio": {"mean": 0.431}, "valid": True},
            "memory": {"peak_rss_mb": 98.7},
            "verdict": {"checks": []},
            "measured_at": "2026-11-22T07:00:00Z",
            "machine": {"cpu": "a | b", "cores": 2, "versions": {"torch": "2.13.0"}},
            **evidence,
        }
    }


def test_the_matrix_shows_the_worst_output_and_what_failed() -> None:
    matrix = _script("matrix")
    run = matrix.Run("minilm", "t", "int8", Path("out"), 0, _document([0.99, 0.95, 0.97]))
    assert matrix.row(run)[3:] == ("23.1 MB", "0.254x", "0.9500", "-", "-", "0.43x", "99 MB", "passed")
    checks = [{"metric": "cosine_min", "passed": False}, {"metric": "finite", "passed": True}]
    parity = [{"cosine": None}]
    failed = _document([], parity=parity, latency=None, memory=None, verdict={"checks": checks})
    assert matrix.row(matrix.Run("m", "t", "r", Path("out"), 10, failed))[5:] == (
        *("-", "-", "-", "-", "-"),
        "exit 10: cosine_min",
    )
    refused = matrix.Run("m", "t", "r", Path("out"), 3, {"what": "The target takes no such thing."})
    assert matrix.row(refused)[-1] == "exit 3: The target takes no such thing."


def test_the_matrix_fills_the_readme_and_nothing_else() -> None:
    matrix = _script("matrix")
    once = matrix.fill("a\n<!-- matrix -->\nold\n<!-- /matrix -->\nb\n", "| new |")
    assert once == "a\n<!-- matrix -->\n| new |\n<!-- /matrix -->\nb\n"
    assert matrix.fill(once, "| new |") == once
    with pytest.raises(ValueError, match="<!-- matrix -->"):
        matrix.fill("no marks", "| new |")
    assert matrix.BEGIN in matrix.README.read_text()
    assert matrix.END in matrix.README.read_text()


def test_the_matrix_is_a_markdown_table() -> None:
    matrix = _script("matrix")
    text = matrix.markdown([matrix.Run("mini|lm", "t", "int8", Path("out"), 0, _document([0.99]))])
    table, note = text.split("\n\n")
    widths = {len(re.split(r"(?<!\\)\|", line)) for line in table.splitlines()}
    assert widths == {len(matrix.HEADER) + 2}
    assert "2026-11-22" in note
    assert "torch 2.13.0" in note
