"""Pages that are made from the code are those that the code makes."""

import runpy
from pathlib import Path

from edgeport.budgets import Budgets, load_budgets
from edgeport.distilling import Distill
from edgeport.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[2]


def test_the_table_of_targets_and_methods_is_fresh():
    made = runpy.run_path(str(ROOT / "scripts" / "target_table.py"))["document"]()
    written = (ROOT / "docs" / "targets.md").read_text()
    assert written == made, "run `python scripts/target_table.py --write`"
    assert "| gptq | symmetric integers |" in written


def test_the_recipe_of_distillation_is_a_recipe(tmp_path):
    page = (ROOT / "docs" / "distillation.md").read_text()
    whole, asked = (part.partition("```")[0] for part in page.split("```toml\n")[1:])
    path = tmp_path / "recipe.toml"
    path.write_text(whole)
    assert [step.method for step in load_recipe(str(path)).compress] == ["prune_depth", "distill"]
    path.write_text('name = "x"\nsummary = "x"\n' + asked + "[gate]\n")
    (step,) = load_recipe(str(path)).distill
    assert step.data.teacher.model == "large"
    options = set(Distill.model_fields) - {"method", "weight_decay", "seed", "data", "new_tokens", "relation_heads"}
    assert all(f"`{option}" in page or f"{option} =" in page for option in options), "the page names every option"


def test_the_budgets_of_the_gates_page_are_budgets(tmp_path):
    page = (ROOT / "docs" / "gate.md").read_text()
    text = page.partition("```toml\n")[2].partition("```")[0]
    path = tmp_path / "budgets.toml"
    path.write_text(text)
    budgets = load_budgets(path)
    assert set(budgets.model_fields_set) == set(Budgets.model_fields), "the page shows every key"
    assert budgets.regression == Budgets().regression, "and the defaults that it says"
