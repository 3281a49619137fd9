"""Meet a budget: prices outside, a partition problem inside.

At a price λ per unit of cost the groups no longer compete, and the best partition is an
unconstrained problem (MATH §2 of the design notes: Lagrangian relaxation). Partitions are collected
on a fixed grid of prices; each is then ranked for the budget along its own path of falling slopes,
and the best is kept. Because the grid does not depend on the budget, more budget never gives more
loss.

A second limit, on a cost in another unit, gets a price of its own: at a price μ the loss of every
option is ``loss + μ · side``, and μ is bisected for the cheapest that keeps the limit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from fxshare.errors import PlanError
from fxshare.planning.solver.curve import Curve
from fxshare.planning.solver.problem import Candidate, Part, Problem
from fxshare.planning.solver.strategies import STRATEGIES, mixed_in

_PRICES = 48


@dataclass(frozen=True)
class Choice:
    """A candidate and which option of its curve was taken."""

    candidate: Candidate
    option: int

    @property
    def cost(self) -> int:
        """Cost in the budget's unit."""
        return int(self.candidate.curve.cost[self.option])

    @property
    def loss(self) -> float:
        """Predicted loss increase."""
        return float(self.candidate.curve.loss[self.option])

    @property
    def side(self) -> int:
        """Cost in the second unit, 0 where there is none."""
        side = self.candidate.curve.side
        return 0 if side is None else int(side[self.option])

    @property
    def label(self) -> int:
        """What whoever made the curve calls the option, or ``DENSE``."""
        return int(self.candidate.curve.label[self.option])

    @property
    def meaning(self) -> object:
        """What the label stands for; None for dense."""
        return self.candidate.curve.meaning(self.option)


@dataclass(frozen=True)
class Solution:
    """A partition with ranks. ``bound`` is the dual bound: no plan over the partitions considered
    loses less within the budget; ``gap`` how far above it this plan is. ``priced_bound`` is that of
    the partitions whose parts were all priced, and ``priced`` and ``unpriced`` say how many parts
    were, and of how many others a bound of their own was taken."""

    choices: tuple[Choice, ...]
    budget: float
    bound: float
    price: float
    strategy: str
    priced_bound: float = 0.0
    priced: int = 0
    unpriced: int = 0

    @property
    def cost(self) -> int:
        """Total cost."""
        return sum(choice.cost for choice in self.choices)

    @property
    def loss(self) -> float:
        """Total predicted loss increase."""
        return sum(choice.loss for choice in self.choices)

    @property
    def side(self) -> int:
        """Total cost in the second unit."""
        return sum(choice.side for choice in self.choices)

    @property
    def gap(self) -> float:
        """``loss − bound``."""
        return max(self.loss - self.bound, 0.0)


def solve(problem: Problem, budget: float, *, strategy: str = "auto") -> Solution:
    """The plan of least predicted loss whose cost is at most ``budget``.

    Raises :class:`PlanError` for an unknown strategy or a budget below the cheapest plan.
    """
    found = sweep(problem, [budget], strategy=strategy)[0]
    return found


def sweep(problem: Problem, budgets: Sequence[float], *, strategy: str = "auto") -> list[Solution]:
    """:func:`solve` for several budgets over one collection of partitions."""
    solutions = _sweep(problem, budgets, strategy)
    limit = problem.side_limit
    if limit is None:
        return solutions
    return [s if s.side <= limit else _within_side(problem, s, limit) for s in solutions]


def _within_side(problem: Problem, free: Solution, limit: float) -> Solution:
    """The plan of least loss found within the budget *and* the side limit.

    The dual bound holds for both prices: ``min (loss + λ cost + μ side) − λ budget − μ limit``.
    """
    least = sum(float(problem.candidate(p).curve.loss.max()) for p in problem.singletons())
    # as if all that can be lost bought all of the side
    unit = max(least, 1e-30) / max(free.side, 1)
    bound, priced_bound, best = free.bound, free.priced_bound, None
    low, high = -8.0, 8.0  # decimal exponents of the price, in that unit
    for step in range(14):
        exponent = high if step == 0 else (low + high) / 2
        price = unit * 10.0**exponent
        priced = replace(
            problem,
            curve_of=partial(_priced, price, lambda part: problem.candidate(part).curve),
            least_of=problem.least_of and partial(_priced, price, problem.least_of),
            others={
                key: replace(one, curve=_curve(price, one.curve, one.slices))
                for key, one in problem.others.items()
            },
        )
        found = _sweep(priced, [free.budget], free.strategy)[0]
        bound = max(bound, found.bound - price * limit)
        priced_bound = max(priced_bound, found.priced_bound - price * limit)
        choices = tuple(Choice(problem.candidate(c.candidate.key), c.option) for c in found.choices)
        one = replace(found, choices=_filled(choices, free.budget, limit))
        if one.side <= limit:
            high = exponent
            if best is None or one.loss < best.loss:
                best = one
        elif step == 0:
            raise PlanError(
                f"the second limit, {limit:,.0f}, is below what the plans within the budget need, "
                f"{one.side:,} at least; raise one of the two limits, or lower the floor"
            )
        else:
            low = exponent
    assert best is not None
    counted = replace(best, priced=free.priced, unpriced=free.unpriced)
    return replace(counted, bound=bound, priced_bound=priced_bound)


def _filled(choices: tuple[Choice, ...], budget: float, limit: float) -> tuple[Choice, ...]:
    """Spend what a jump between two prices left over: the greatest saving that still fits, again
    and again."""
    left, side_left = budget - sum(c.cost for c in choices), limit - sum(c.side for c in choices)
    if side_left < 0:
        return choices
    taken = list(choices)
    while True:
        best, saved = None, 0.0
        for at, choice in enumerate(taken):
            curve = choice.candidate.curve
            assert curve.side is not None
            fits = (curve.cost <= choice.cost + left) & (curve.side <= choice.side + side_left)
            options = np.flatnonzero(fits & (curve.loss < choice.loss - saved))
            if len(options):
                option = int(options[np.argmin(curve.loss[options])])
                best = at, Choice(choice.candidate, option)
                saved = choice.loss - best[1].loss
        if best is None:
            return tuple(taken)
        at, better = best
        left -= better.cost - taken[at].cost
        side_left -= better.side - taken[at].side
        taken[at] = better


def _priced(price: float, curve_of: Callable[[Part], Curve], part: Part) -> Curve:
    return _curve(price, curve_of(part), part)


def _curve(price: float, curve: Curve, part: Part) -> Curve:
    if curve.side is None:
        raise PlanError(
            f"a plan is bounded in a second unit that {sorted(part)[0]!r} has no cost in"
        )
    return replace(curve, loss=curve.loss + price * curve.side)


def _sweep(problem: Problem, budgets: Sequence[float], strategy: str) -> list[Solution]:
    if strategy not in STRATEGIES:
        raise PlanError(f"no strategy {strategy!r}; there are {', '.join(STRATEGIES)}")
    if not problem.nodes:
        raise PlanError("there is nothing to plan: no slices")
    if strategy not in problem.collected:
        problem.collected[strategy] = _collect(problem, strategy)
    collected: _Collected = problem.collected[strategy]
    priced, unpriced = len(list(problem.seen())), problem.unpriced
    return [
        replace(_best(collected, budget, strategy), priced=priced, unpriced=unpriced)
        for budget in budgets
    ]


@dataclass(frozen=True, eq=False)
class _Collected:
    """The partitions that a strategy finds at all prices, and the least values and bounds there:
    no budget has a part in it."""

    prices: Sequence[float]
    partitions: Sequence[frozenset[Part]]
    values: Sequence[float]
    bounds: Sequence[float]
    paths: Sequence[_Path]


def _collect(problem: Problem, strategy: str) -> _Collected:
    prices = _grid(problem)
    problem.fix_prices(prices)
    position = {name: at for at, name in enumerate(problem.nodes)}
    partitions: dict[frozenset[Part], list[Part]] = {}
    found = []
    for price in prices:
        # in the slices' order: some strategies give sets, whose order changes from run to run
        parts = STRATEGIES[strategy](problem, price)
        parts = mixed_in(strategy, problem, price, parts)
        parts = sorted(parts, key=lambda p: min(position[n] for n in problem.covered(p)))
        found.append(frozenset(parts))
        partitions.setdefault(found[-1], parts)
    # over every partition collected, not only the one found at this price: a heuristic may have
    # found a better one at another price, and the bound must hold for that one too
    at_all = {
        part: np.asarray([problem.value(part, price) for price in prices])
        for part in frozenset[Part]().union(*partitions)
    }
    sums = [np.sum([at_all[part] for part in parts], axis=0) for parts in partitions.values()]
    values: list[float] = np.min(sums, axis=0).tolist()
    bounds = [min(v, problem.bound(price)) for v, price in zip(values, prices, strict=True)]
    paths = [_Path([problem.candidate(p) for p in parts]) for parts in partitions.values()]
    return _Collected(prices, found, values, bounds, paths)


def least_cost(problem: Problem, loss: float, *, strategy: str = "auto") -> Solution:
    """The cheapest plan whose predicted loss increase is at most ``loss``, to within 0.1 % of the
    dense cost. Loss never rises with the budget, so the budget is bisected.

    Raises :class:`PlanError` when not even the dearest plan that is allowed loses so little.
    """
    if not loss >= 0:
        raise PlanError(f"max_loss_increase: expected a number of at least 0, found {loss!r}")
    dense = sum(int(problem.candidate(p).curve.cost[-1]) for p in problem.singletons())
    low, high = 0, dense
    best = solve(problem, dense, strategy=strategy)
    if best.loss > loss:
        raise PlanError(
            f"max_loss_increase {loss:g}: the dearest plan that the ceiling allows is predicted to "
            f"lose {best.loss:.3g}; raise the limit or the ceiling"
        )
    while high - low > max(dense / 1000, 1):
        middle = (low + high) // 2
        try:
            one = solve(problem, middle, strategy=strategy)
        except PlanError:  # below the cheapest plan
            low = middle
            continue
        if one.loss <= loss:
            best, high = one, middle
        else:
            low = middle
    return best


def _grid(problem: Problem) -> list[float]:
    """Prices from where everything is dense to where everything is cheapest."""
    each = [*problem.singletons(), *problem.others]
    slopes = [s for p in each for s in _ends(problem.candidate(p).curve) if s > 0]
    if not slopes:
        return [1.0]
    low, high = min(slopes) * 0.5, max(slopes) * 2
    if not np.isfinite(high):
        raise PlanError("a price is infinite: some slice loses infinitely much per stored number")
    # a price that nothing is worth: it finds the cheapest partition, however much that one loses,
    # so that every budget that can be kept has a plan
    return [*(float(x) for x in np.geomspace(low, high, _PRICES)), high * 1e9]


def _ends(curve: Curve) -> list[float]:
    return [float(curve.slopes[0]), float(curve.slopes[-1])] if len(curve.slopes) else []


class _Path:
    """One partition, from its cheapest plan to its dearest: steps by falling slope."""

    def __init__(self, candidates: Sequence[Candidate]) -> None:
        self.candidates = candidates
        curves = [candidate.curve for candidate in candidates]
        self.least = sum(int(c.cost[c.hull[0]]) for c in curves)
        slopes = np.concatenate([c.slopes for c in curves])
        owner = np.repeat(np.arange(len(curves)), [len(c.slopes) for c in curves])
        at = np.concatenate([np.arange(len(c.slopes)) for c in curves])
        cost = np.concatenate([np.diff(c.cost[c.hull]) for c in curves])
        # slopes fall along a hull, so this order keeps every candidate's steps in theirs
        order = np.lexsort((at, owner, -slopes))
        self._slopes, self._owner = slopes[order], owner[order]
        self._spent = np.cumsum(cost[order])

    def at(self, budget: float) -> tuple[tuple[Choice, ...], float]:
        """The choices at a budget, and the price there."""
        left = budget - self.least
        taken = int(np.searchsorted(self._spent, left, side="right"))
        counts = np.bincount(self._owner[:taken], minlength=len(self.candidates))
        options = [
            int(c.curve.hull[n]) for c, n in zip(self.candidates, counts.tolist(), strict=True)
        ]
        price = 0.0
        if taken < len(self._owner):
            # the first step that does not fit is taken in part: the options between hull points
            number = int(self._owner[taken])
            price = float(self._slopes[taken])
            spent = float(self._spent[taken - 1]) if taken else 0.0
            options[number] = _between(self.candidates[number].curve, options[number], left - spent)
        choices = tuple(Choice(c, o) for c, o in zip(self.candidates, options, strict=True))
        return choices, price


def _between(curve: Curve, option: int, left: float) -> int:
    fits = np.flatnonzero(curve.cost <= curve.cost[option] + left)
    best = int(fits[np.argmin(curve.loss[fits])])
    return best if curve.loss[best] < curve.loss[option] else option


def _best(collected: _Collected, budget: float, strategy: str) -> Solution:
    feasible = [path for path in collected.paths if path.least <= budget]
    if not feasible:
        least = min(path.least for path in collected.paths)
        raise PlanError(
            f"the budget {budget:,.0f} is below the cheapest plan, {least:,}; raise the budget or "
            "lower the floor"
        )
    found = [path.at(budget) for path in feasible]
    choices, price = min(found, key=lambda one: sum(c.loss for c in one[0]))
    dual, priced = (
        max(0.0, *(v - p * budget for p, v in zip(collected.prices, least, strict=True)))
        for least in (collected.bounds, collected.values)
    )
    return Solution(choices, budget, dual, price, strategy, priced)
