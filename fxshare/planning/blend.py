"""Statistics measured halfway, blended with the first ones."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fxshare.errors import PlanError
from fxshare.planning.options import Options, dense_cost
from fxshare.planning.solver.problem import Problem
from fxshare.planning.solver.solve import Choice, Solution


def blend(
    solution: Solution, problem: Problem, share: float, kept: float, options: Options
) -> Solution:
    """Draw every group's cost towards ``kept`` of its dense cost: ``(1 − share) · planned + share ·
    uniform``, never above the budget."""
    choices = []
    for choice in solution.choices:
        curve = choice.candidate.curve
        # not the curve's last cost: under a ceiling that is not dense
        dense = sum(dense_cost(problem.nodes, n, options) for n in choice.candidate.slices)
        wanted = (1 - share) * choice.cost + share * kept * dense
        fits = np.flatnonzero(curve.cost <= wanted)
        if len(fits):
            best = fits[np.lexsort((curve.cost[fits], curve.loss[fits]))[0]]
            choices.append(Choice(choice.candidate, int(best)))
        else:
            choices.append(Choice(choice.candidate, int(curve.hull[0])))
    blended = replace(solution, choices=tuple(choices))
    if blended.cost > solution.budget:
        raise PlanError(
            f"blended ranks cost {blended.cost:,}, more than the budget {solution.budget:,.0f}"
        )
    if problem.side_limit is not None and blended.side > problem.side_limit:
        raise PlanError(
            f"blended ranks take {blended.side:,} of the second limit's unit, more than "
            f"{problem.side_limit:,.0f}"
        )
    return blended
