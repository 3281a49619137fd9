"""Budgets: kept, used up, and what more of them buys."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from fxshare.errors import PlanError
from fxshare.planning.solver.curve import DENSE, Curve
from fxshare.planning.solver.problem import Part, Problem
from fxshare.planning.solver.solve import Solution, least_cost, solve, sweep
from fxshare.planning.solver.strategies import STRATEGIES
from fxshare.plans.cost import Shape, numbers, ranks
from fxshare.plans.storage import PLAIN
from tests.planning.build import all_partitions, random_problem, stack

seeds = st.integers(0, 10_000)
SHARING = [s for s in STRATEGIES if s != "exhaustive"]


def dense_of(problem: Problem) -> int:
    return sum(int(problem.candidate(p).curve.cost[-1]) for p in problem.singletons())


def cheapest(problem: Problem) -> int:
    """Cost of the cheapest plan without sharing."""
    return sum(int(problem.candidate(p).curve.cost.min()) for p in problem.singletons())


def plan_of(solution: Solution) -> set[tuple[Part, int]]:
    return {(c.candidate.slices, c.label) for c in solution.choices}


def smooth_problem(count: int, seed: int) -> Problem:
    """Wide slices with power laws for spectra: hundreds of ranks to choose from."""
    rng = np.random.default_rng(seed)
    nodes = stack(count)
    power = dict(zip(nodes, rng.uniform(0.5, 2.0, count), strict=True))
    scale = dict(zip(nodes, rng.uniform(0.1, 10.0, count), strict=True))
    together = rng.uniform(0.5, 1.0)

    def curve(part: Part) -> Curve:
        shape = Shape(512, 512 * len(part))
        rank = ranks(shape)
        at = np.arange(1, shape.full_rank + 1.0)
        spectrum = sum(scale[n] * at ** -power[n] for n in sorted(part))
        tail = np.cumsum(spectrum[::-1])[::-1] * (1 if len(part) == 1 else together)
        cost = numbers(shape, rank, PLAIN)
        keep = cost < shape.dense_numbers
        return Curve(
            np.append(cost[keep], shape.dense_numbers),
            np.append(np.append(tail, 0.0)[rank[keep]], 0.0),
            np.append(rank[keep], DENSE),
        )

    return Problem(nodes, curve)


@given(seeds, st.floats(0.1, 0.99), st.sampled_from(SHARING))
@settings(deadline=None, max_examples=12)
def test_a_budget_is_kept_and_used_up(seed: int, kept: float, strategy: str) -> None:
    problem = smooth_problem(5, seed)
    budget = kept * dense_of(problem)
    found = solve(problem, budget, strategy=strategy)
    one_rank = max(512 * (1 + len(c.candidate.slices)) for c in found.choices)
    assert budget - max(0.005 * budget, one_rank) < found.cost <= budget
    assert found.gap == max(found.loss - found.bound, 0.0)
    assert found.bound <= found.loss * (1 + 1e-9)
    assert sorted(n for c in found.choices for n in c.candidate.slices) == sorted(problem.nodes)


def with_side(problem: Problem, seed: int, limit: float | None) -> Problem:
    """A second cost: another multiple of the first for every part."""
    rng = np.random.default_rng(seed)
    factor = dict(zip(problem.nodes, rng.uniform(0.3, 3.0, len(problem.nodes)), strict=True))

    def curve(part: Part) -> Curve:
        plain = problem.candidate(part).curve
        side = (plain.cost * max(factor[name] for name in part)).astype(np.int64)
        return dataclasses.replace(plain, side=side)

    return Problem(problem.nodes, curve, side_limit=limit)


@given(seeds, st.floats(0.3, 0.9), st.floats(0.5, 1.2), st.sampled_from(["layers", "pairs"]))
@settings(deadline=None, max_examples=6, phases=[Phase.explicit, Phase.generate])
def test_two_limits_are_both_kept(seed: int, kept: float, share: float, strategy: str) -> None:
    problem = smooth_problem(5, seed)
    budget = kept * dense_of(problem)
    free = solve(with_side(problem, seed, None), budget, strategy=strategy)
    limit = share * free.side
    found = solve(with_side(problem, seed, limit), budget, strategy=strategy)
    assert found.cost <= budget
    assert found.side <= limit
    assert found.bound <= found.loss * (1 + 1e-9)
    if share >= 1:
        assert plan_of(found) == plan_of(free)
    else:
        # spending what is left over can beat the free plan, which need not be the best, but not the
        # bound on every plan
        assert found.loss >= free.bound * (1 - 1e-9)
        # one of the two is used up, to the widest step of a rank
        step = 512 * (1 + max(len(c.candidate.slices) for c in found.choices))
        assert found.side > limit - 3 * step or found.cost > budget - step
    for choice in found.choices:
        assert choice.loss == float(
            problem.candidate(choice.candidate.slices).curve.loss[choice.option]
        )


def test_the_price_of_the_second_limit_is_found_where_little_of_it_can_be_saved() -> None:
    """One slice saves three of what the others save one each: from where all are cheap, taking
    back the greatest loss first leaves nothing for the others."""
    loss, saved = np.array([10.0, 8.0, 8.0, 8.0]), np.array([3, 1, 1, 1])

    def curve(part: Part) -> Curve:
        (name,) = part
        at = list(nodes).index(name)
        side = np.array([10**6 - saved[at], 10**6])
        return Curve(np.array([5, 10]), np.array([loss[at], 0.0]), np.array([1, DENSE]), side)

    nodes = stack(4)
    problem = Problem(nodes, curve, side_limit=4 * 10**6 - 3)
    found = solve(problem, 40, strategy="separate")
    assert [choice.loss for choice in found.choices] == [10.0, 0.0, 0.0, 0.0]


def test_a_second_limit_that_nothing_keeps() -> None:
    problem = with_side(smooth_problem(3, 0), 0, 10.0)
    with pytest.raises(PlanError, match="the second limit, 10, is below"):
        solve(problem, 0.5 * dense_of(problem))


@given(seeds, st.sampled_from(sorted(STRATEGIES)), st.sampled_from([(5, ("q",)), (2, ("q", "k"))]))
@settings(deadline=None, max_examples=25)
def test_more_budget_never_loses_more(
    seed: int, strategy: str, size: tuple[int, tuple[str, ...]]
) -> None:
    problem = random_problem(stack(*size), seed, may_share=[frozenset({"q", "k"})])
    budgets = list(range(cheapest(problem), dense_of(problem) + 10))
    losses = [s.loss for s in sweep(problem, budgets, strategy=strategy)]
    assert all(a >= b for a, b in itertools.pairwise(losses))
    assert losses[-1] == 0.0


@given(seeds, st.sampled_from(sorted(STRATEGIES)))
@settings(deadline=None, max_examples=10)
def test_one_budget_gives_what_the_sweep_gives(seed: int, strategy: str) -> None:
    problem = random_problem(stack(5), seed)
    budgets = np.linspace(cheapest(problem), dense_of(problem), 5).tolist()
    swept = sweep(problem, budgets, strategy=strategy)
    for budget, found in zip(budgets, swept, strict=True):
        assert found == solve(problem, budget, strategy=strategy)


def optimum(problem: Problem, budget: float) -> float:
    """The least loss over all partitions and all options."""
    best = math.inf
    for parts in all_partitions(problem.singletons()):
        curves = [problem.candidate(p).curve for p in parts]
        front = {0: 0.0}
        for one in curves:
            longer: dict[int, float] = {}
            for spent, lost in front.items():
                for cost, loss in zip(one.cost.tolist(), one.loss.tolist(), strict=True):
                    if spent + cost <= budget:
                        value = lost + loss
                        if value < longer.get(spent + cost, math.inf):
                            longer[spent + cost] = value
            front = longer
        best = min([best, *front.values()])
    return best


@given(seeds, st.integers(2, 5), st.floats(0.02, 1.0))
@settings(deadline=None, max_examples=25)
def test_the_optimum_is_within_the_reported_gap(seed: int, layers: int, share: float) -> None:
    problem = random_problem(stack(layers), seed)
    least = min(
        sum(int(problem.candidate(p).curve.cost.min()) for p in parts)
        for parts in all_partitions(problem.singletons())
    )
    budget = least + share * (dense_of(problem) - least)
    found = solve(problem, budget, strategy="exhaustive")
    best = optimum(problem, budget)
    slack = 1e-9 * max(found.loss, 1e-9)
    assert found.loss >= best - slack
    assert found.bound <= best + slack
    assert found.loss - found.gap <= best + slack
    assert found.cost <= budget


@given(seeds, st.integers(2, 5))
@settings(deadline=None, max_examples=10)
def test_the_cheapest_partition_is_found_however_much_it_loses(seed: int, layers: int) -> None:
    problem = random_problem(stack(layers), seed)
    least = min(
        sum(int(problem.candidate(p).curve.cost.min()) for p in parts)
        for parts in all_partitions(problem.singletons())
    )
    assert solve(problem, least, strategy="exhaustive").cost == least
    with pytest.raises(PlanError, match=f"is below the cheapest plan, {least:,}"):
        solve(problem, least - 1, strategy="exhaustive")


@given(seeds, st.sampled_from([1e-6, 3.0, 1e5]), st.sampled_from(SHARING))
@settings(deadline=None, max_examples=20)
def test_the_scale_of_the_losses_does_not_matter(seed: int, scale: float, strategy: str) -> None:
    problem = random_problem(stack(4), seed)

    def scaled(part: Part) -> Curve:
        one = problem.curve_of(part)
        return Curve(one.cost, one.loss * scale, one.label)

    budget = 0.6 * dense_of(problem)
    other = solve(Problem(problem.nodes, scaled), budget, strategy=strategy)
    found = solve(problem, budget, strategy=strategy)
    assert plan_of(other) == plan_of(found)
    assert other.bound == pytest.approx(found.bound * scale, rel=1e-9)


@given(seeds, st.floats(0.0, 1.0), st.sampled_from(["layers", "separate"]))
@settings(deadline=None, max_examples=15)
def test_least_cost_is_the_cheapest_budget_that_loses_so_little(
    seed: int, share: float, strategy: str
) -> None:
    problem = random_problem(stack(4), seed)
    dense = dense_of(problem)
    limit = share * solve(problem, cheapest(problem), strategy=strategy).loss
    found = least_cost(problem, limit, strategy=strategy)
    assert found.loss <= limit
    budgets = range(cheapest(problem), dense + 1)
    losses = [s.loss for s in sweep(problem, budgets, strategy=strategy)]
    exact = next(b for b, loss in zip(budgets, losses, strict=True) if loss <= limit)
    assert found.budget <= exact + max(dense / 1000, 1)


def test_least_cost_ends_on_a_problem_of_few_numbers() -> None:
    problem = random_problem(stack(1), 0)
    assert dense_of(problem) == 36
    assert least_cost(problem, 0.0).loss == 0.0
    assert least_cost(problem, 1e9).cost == 12


def test_least_cost_takes_a_plan_that_loses_exactly_so_much() -> None:
    """Slices of rank 2 lose nothing at rank 2: no loss allowed is no reason to stay dense."""

    def curve(part: Part) -> Curve:
        cost = np.array([24.0, 36.0]) * len(part)
        return Curve(cost, np.array([0.0, 0.0]), np.array([2, DENSE]))

    found = least_cost(Problem(stack(3), curve), 0.0)
    assert found.loss == 0.0
    assert found.cost == 72


def test_least_cost_takes_the_plan_whose_loss_is_the_limit() -> None:
    problem = random_problem(stack(4), 0)
    planned = solve(problem, dense_of(problem) // 2, strategy="separate")
    found = least_cost(problem, planned.loss, strategy="separate")
    assert found.loss == planned.loss > 0.0
    assert found.cost == planned.cost < dense_of(problem)


def test_least_cost_says_when_the_ceiling_is_in_the_way() -> None:
    problem = random_problem(stack(2), 0)

    def cheap_only(part: Part) -> Curve:
        one = problem.curve_of(part)
        return Curve(one.cost[:1], one.loss[:1], one.label[:1])

    with pytest.raises(PlanError, match="dearest plan that the ceiling allows"):
        least_cost(Problem(problem.nodes, cheap_only), 0.0)


@pytest.mark.parametrize("limit", [-1.0, math.nan])
def test_a_limit_of_loss_that_is_none_is_refused(limit: float) -> None:
    with pytest.raises(PlanError, match="max_loss_increase"):
        least_cost(random_problem(stack(2), 0), limit)


def test_an_unknown_strategy_names_the_known_ones() -> None:
    with pytest.raises(PlanError, match=r"no strategy 'greedy'; there are separate, layers"):
        solve(random_problem(stack(2), 0), 50, strategy="greedy")


def test_nothing_to_plan_is_refused() -> None:
    with pytest.raises(PlanError, match="no slices"):
        solve(random_problem({}, 0), 10)


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_a_curve_that_is_not_finite_is_refused(wrong: float) -> None:
    problem = random_problem(stack(2), 0)

    def broken(part: Part) -> Curve:
        one = problem.curve_of(part)
        return Curve(one.cost, np.full_like(one.loss, wrong), one.label)

    with pytest.raises(PlanError, match="not finite"):
        solve(Problem(problem.nodes, broken), 50)


def order_of(solution: Solution) -> Sequence[Any]:
    return [min(c.candidate.slices) for c in solution.choices]


def test_choices_come_in_the_order_of_the_slices() -> None:
    problem = random_problem(stack(8), 5)
    for strategy in STRATEGIES:
        found = order_of(solve(problem, 0.5 * dense_of(problem), strategy=strategy))
        assert found == sorted(found)
