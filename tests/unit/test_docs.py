"""Pages that are made from the code are those that the code makes."""

import runpy
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_table_of_targets_and_methods_is_fresh():
    made = runpy.run_path(str(ROOT / "scripts" / "target_table.py"))["document"]()
    written = (ROOT / "docs" / "targets.md").read_text()
    assert written == made, "run `python scripts/target_table.py --write`"
    assert "| gptq | symmetric integers |" in written
