"""Give every layer its format under a budget of bytes: the multiple-choice knapsack, solved exactly.

    min sum of cost[l][f]   over one format f for each layer l   with   sum of bytes[l][f] <= budget

A mixed-integer program with one binary variable for each layer and format; HiGHS (through SciPy) finds the optimum of
a few hundred layers in well under a second.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from edgeport.errors import BadInputError


@dataclass(frozen=True)
class Choice:
    """What one layer costs in one format.

    Attributes:
        format: the format's name.
        bytes: what it stores.
        cost: what it adds to the loss; any unit that adds up over layers.
    """

    format: str
    bytes: int
    cost: float


def worthwhile(options: Sequence[Choice]) -> list[Choice]:
    """The options that no other one beats in bytes and cost, fewest bytes first."""
    kept: list[Choice] = []
    for choice in sorted(options, key=lambda choice: (choice.bytes, choice.cost, choice.format)):
        if not kept or choice.cost < kept[-1].cost:
            kept.append(choice)
    return kept


def allocate(choices: Mapping[str, Sequence[Choice]], budget: int) -> dict[str, Choice]:
    """The choice of least total cost that fits the budget, by layer name. Bytes that buy nothing are not spent.

    Args:
        choices: at least one for every layer; costs are finite and not negative.
        budget: bytes of all layers together.

    Raises:
        BadInputError: even the smallest formats take more; the message says how much.
    """
    least = sum(min(choice.bytes for choice in options) for options in choices.values())
    if least > budget:
        raise BadInputError(
            f"These formats take {least / 1e6:.2f} MB at least, the budget is {budget / 1e6:.2f} MB.",
            where="bits_per_weight",
            allowed=f"{least} bytes or more",
            next_step="Allow a smaller format, or raise the budget.",
        )
    from scipy.optimize import Bounds, LinearConstraint, milp  # type: ignore[import-untyped]
    from scipy.sparse import csr_matrix  # type: ignore[import-untyped]

    flat = [(layer, choice) for layer, options in choices.items() for choice in worthwhile(options)]
    sizes = np.array([choice.bytes for _, choice in flat], np.float64)
    costs = np.array([choice.cost for _, choice in flat], np.float64)
    # Near 1, so that the solver's tolerances mean the same everywhere.
    objective = costs / max(float(costs.max()), 1e-300)
    rows = {layer: index for index, layer in enumerate(choices)}
    one_each = csr_matrix(
        (np.ones(len(flat)), ([rows[layer] for layer, _ in flat], range(len(flat)))), (len(rows), len(flat))
    )
    result = milp(
        objective,
        integrality=np.ones(len(flat)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(sizes[None] / budget, -np.inf, 1)],
        options={"mip_rel_gap": 0},
    )
    assert result.x is not None, result.message
    return {layer: choice for (layer, choice), taken in zip(flat, result.x, strict=True) if taken > 0.5}
