"""The planned mode: statistics in, a plan with predicted loss out; and its factors.

Joins the pure solver (:mod:`fxshare.planning.solver`) to tensors: spectra price the candidates, the
chosen groups are factorised in the metric they were priced in, refitted, and stored as planned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fxshare.errors import PlanError
from fxshare.planning.kinds.basis import BasisOption
from fxshare.planning.nodes import shape_of
from fxshare.planning.options import Options, Unit, unit_cost
from fxshare.planning.solver.curve import DENSE
from fxshare.planning.solver.problem import Problem
from fxshare.planning.solver.solve import Solution, sweep
from fxshare.plans.storage import PLAIN, Storage


@dataclass(frozen=True)
class Alternative:
    """The best that a dense slice could be instead, at the plan's price."""

    rank: int
    storage: Storage
    saved: int
    """Units of the budget."""
    loss: float


def alternatives(
    problem: Problem, names: Sequence[str], price: float
) -> dict[str, Alternative | None]:
    """For slices by name what each would be if it could not stay dense: the option of least
    ``loss + price · cost``. None where no option is left."""
    found: dict[str, Alternative | None] = {}
    for name in names:
        curve = problem.candidate(frozenset({name})).curve
        low = np.array(
            [at for at in range(len(curve.label)) if isinstance(curve.meaning(at), BasisOption)],
            dtype=np.int64,
        )
        dense = curve.cost[curve.label == DENSE]
        if not len(low) or not len(dense):
            found[name] = None
            continue
        at = int(low[np.argmin(curve.loss[low] + price * curve.cost[low])])
        option = curve.meaning(at)
        assert isinstance(option, BasisOption)
        found[name] = Alternative(
            option.rank,
            option.storage,
            int(dense[0] - curve.cost[at]),
            float(curve.loss[at]),
        )
    return found


@dataclass(frozen=True)
class SweepPoint:
    """A plan of a sweep. ``budget`` and ``kept`` are shares of the dense cost: what was allowed,
    and what the plan takes of it. ``bound`` is the dual bound, 0 where there is none; ``measured``
    the loss on held-back data where it was measured."""

    budget: float
    kept: float
    loss: float
    bound: float
    bases: int
    measured: float | None = None


@dataclass(frozen=True)
class Sweep:
    """Predicted loss against budget, all on one set of statistics and before any search; of some
    also what was measured.

    ``uniform`` gives every slice a basis of its own and the same share of its dense cost, as far as
    floors and layers kept dense allow; it keeps no bound on FLOPs.
    """

    unit: Unit
    dense: int
    """Cost of everything dense, in the unit."""
    loss_name: str
    planned: tuple[SweepPoint, ...]
    uniform: tuple[SweepPoint, ...]


def sweep_budgets(
    problem: Problem, shares: Sequence[float], options: Options, *, strategy: str, loss_name: str
) -> Sweep:
    """Plans for several budgets, each a share of the dense cost, over one collection of
    partitions; nothing is factorised. Budgets below the cheapest plan have no point."""
    parts = problem.singletons()
    each = {
        part: int(
            unit_cost(shape_of(problem.nodes, part), np.array([0]), PLAIN, options, dense=True)[0]
        )
        for part in parts
    }
    dense = sum(each.values())
    todo = sorted(shares)
    solutions: list[Solution] = []
    while todo and not solutions:
        try:
            solutions = sweep(problem, [share * dense for share in todo], strategy=strategy)
        except PlanError:
            if len(todo) == 1:
                raise
            todo = todo[1:]
    planned = tuple(
        SweepPoint(
            share,
            one.cost / dense,
            one.loss,
            one.bound,
            sum(choice.label != DENSE for choice in one.choices),
        )
        for share, one in zip(todo, solutions, strict=True)
    )
    uniform = []
    for share in todo:
        cost, loss, bases = 0, 0.0, 0
        for part in parts:
            curve = problem.candidate(part).curve
            fits = np.flatnonzero(curve.cost <= share * each[part])
            at = int(np.argmin(curve.cost))  # what must stay dense does, whatever its share
            if len(fits):
                at = int(fits[np.lexsort((curve.cost[fits], curve.loss[fits]))[0]])
            cost, loss = cost + int(curve.cost[at]), loss + float(curve.loss[at])
            bases += int(curve.label[at] != DENSE)
        uniform.append(SweepPoint(share, cost / dense, loss, 0.0, bases))
    return Sweep(options.unit, dense, loss_name, planned, tuple(uniform))
