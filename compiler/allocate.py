"""Share a budget among places: how many ranks, bits or parameters each of them gets.

A place has options, each with a cost and the loss it brings; the allocation is the cheapest loss within the budget. The
losses should be measured, as differences between layers are what it is about; and whoever allocates should compare the
result with the uniform choice in one measurement of the whole model, and keep the better.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from compiler.errors import PassError


@dataclass(frozen=True)
class Option:
    """What one place may get: ``cost`` in units of the budget, ``loss`` in units that add up over places."""

    cost: float
    loss: float


def numbers_left(keep: float, selected: int, whole: int, of: str) -> float:
    """How many of ``selected`` numbers remain of a model of ``whole``: ``keep`` is the part of all ``of`` these.

    ``of`` is `selected` or `model`. Raises PassError when the rest of the model is more than may remain.
    """
    if of == "selected":
        return keep * selected
    left = keep * whole - (whole - selected)
    if left <= 0:
        raise PassError(
            "what is not selected is already more than may remain of the model",
            option="keep",
            remedy="select more with `where`, or keep more",
        )
    return left


def allocate(places: Sequence[Sequence[Option]], budget: float) -> list[int]:
    """The index of the option that each place gets, with the least total loss whose total cost is within ``budget``.

    A multiple-choice knapsack, solved exactly by mixed-integer programming (HiGHS). Raises PassError when even the
    cheapest options exceed the budget.
    """
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp

    if sum(min(option.cost for option in options) for options in places) > budget:
        raise PassError(
            "the budget is below what the cheapest choice everywhere costs",
            remedy="allow more: keep a larger part, or more bits",
        )
    flat = [option for options in places for option in options]
    owner = np.repeat(np.arange(len(places)), [len(options) for options in places])
    one_each = (owner[None] == np.arange(len(places))[:, None]).astype(float)
    scale = max(max(option.loss for option in flat), np.finfo(float).tiny)
    found = milp(
        np.array([option.loss for option in flat]) / scale,
        integrality=np.ones(len(flat)),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(np.array([[option.cost for option in flat]]), -np.inf, budget),
        ],
        options={"mip_rel_gap": 0.0},
    )
    return [int(found.x[owner == place].argmax()) for place in range(len(places))]
