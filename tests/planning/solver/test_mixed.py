"""Candidates of several kinds in one partition: exact where all are tried, bounded elsewhere."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxshare.planning.solver.curve import DENSE, Curve
from fxshare.planning.solver.mixed import mixed
from fxshare.planning.solver.problem import Other, Part, Problem
from fxshare.planning.solver.solve import Solution, solve, sweep
from fxshare.planning.solver.strategies import STRATEGIES
from tests.planning.build import all_partitions, random_problem, stack

seeds = st.integers(0, 10_000)
GIVEN = settings(deadline=None, max_examples=25)


def other_curve(rng: Any, dense: int, scale: float) -> Curve:
    """Loss that falls with what is kept."""
    cost = np.linspace(dense / 8, dense, 8).astype(np.int64)
    loss = scale * np.sort(rng.uniform(0, 1, 8))[::-1]
    loss[-1] = 0.0
    label = np.array([*range(7), DENSE])
    return Curve(cost, loss, label, meanings=tuple(f"{n}" for n in range(7)))


def with_others(
    problem: Problem, groups: Sequence[Part], seed: int, kinds: Sequence[str] = ("units",)
) -> Problem:
    """The problem with a candidate of every kind for each of some sets of slices."""
    rng = np.random.default_rng(seed)
    found: dict[Part, Other] = {}
    for kind, (number, part) in itertools.product(kinds, enumerate(groups)):
        singles = [problem.candidate(frozenset({name})).curve for name in part]
        dense = sum(int(curve.cost[-1]) for curve in singles)
        most = sum(float(curve.loss.max()) for curve in singles)
        scale = most * rng.uniform(0.2, 1.5)
        one = Other(f"{number}", part, other_curve(rng, dense, scale), kind)
        found[one.key] = one
    return replace(problem, others=found)


def mlps(problem: Problem, types: Sequence[str] = ("gate", "up")) -> list[Part]:
    """The slices of these types, layer by layer."""
    layers = sorted({node.layer for node in problem.nodes.values()})
    return [
        frozenset(n.name for n in problem.nodes.values() if n.layer == layer and n.type in types)
        for layer in layers
    ]


def small(seed: int, kinds: Sequence[str] = ("units",)) -> Problem:
    problem = random_problem(stack(2, ("gate", "up", "q")), seed)
    return with_others(problem, mlps(problem), seed, kinds)


def all_plans(problem: Problem) -> Iterator[list[Part]]:
    """Every choice of candidates that do not overlap, with every partition of what they leave."""
    keys = list(problem.others)
    for taken in itertools.chain(*(itertools.combinations(keys, n) for n in range(len(keys) + 1))):
        gone: list[str] = [name for key in taken for name in problem.others[key].slices]
        if len(set(gone)) < len(gone):
            continue
        rest = [frozenset({name}) for name in problem.nodes if name not in gone]
        for parts in all_partitions(rest):
            if all(problem.may_join(part) for part in parts):
                yield [*taken, *parts]


def value(problem: Problem, parts: Sequence[Part], price: float) -> float:
    return sum(problem.candidate(part).curve.value(price) for part in parts)


def prices(problem: Problem) -> list[float]:
    curves = [problem.candidate(part).curve for part in problem.singletons()]
    middle = float(np.median([slope for curve in curves for slope in curve.slopes]))
    return [middle / 5, middle, middle * 5]


@given(seeds, st.sampled_from([("units",), ("units", "more")]))
@GIVEN
def test_exhaustive_is_the_best_of_all_choices(seed: int, kinds: tuple[str, ...]) -> None:
    problem = small(seed, kinds)
    for price in prices(problem):
        best = min(value(problem, parts, price) for parts in all_plans(problem))
        found = STRATEGIES["exhaustive"](problem, price)
        assert value(problem, found, price) == pytest.approx(best, rel=1e-12)


def check_cover(problem: Problem, solution: Solution) -> None:
    covered = [name for choice in solution.choices for name in choice.candidate.slices]
    assert sorted(covered) == sorted(problem.nodes)


@given(seeds, st.sampled_from(sorted(STRATEGIES)), st.floats(0.2, 0.9))
@GIVEN
def test_plans_cover_every_slice_once_within_the_budget_above_the_bound(
    seed: int, strategy: str, share: float
) -> None:
    problem = small(seed, ("units", "more"))
    dense = sum(int(problem.candidate(p).curve.cost[-1]) for p in problem.singletons())
    found = solve(problem, share * dense, strategy=strategy)
    check_cover(problem, found)
    assert found.cost <= share * dense
    assert found.bound <= found.loss + 1e-9


@given(seeds, st.floats(0.2, 0.9))
@GIVEN
def test_no_plan_of_any_kind_within_the_budget_is_below_the_bound(seed: int, share: float) -> None:
    """All runs of layers with all choices beside them, by brute force over options too."""
    base = random_problem(stack(2, ("gate", "up")), seed)
    problem = with_others(base, mlps(base), seed)
    dense = sum(int(problem.candidate(p).curve.cost[-1]) for p in problem.singletons())
    best = float("inf")
    for parts in all_plans(problem):
        curves = [problem.candidate(part).curve for part in parts]
        for options in itertools.product(*(range(len(c.cost)) for c in curves)):
            cost = sum(int(c.cost[o]) for c, o in zip(curves, options, strict=True))
            if cost <= share * dense:
                loss = sum(float(c.loss[o]) for c, o in zip(curves, options, strict=True))
                best = min(best, loss)
    for strategy in ("exhaustive", "layers", "grown", "auto"):
        found = solve(problem, share * dense, strategy=strategy)
        assert found.bound <= best + 1e-9
        assert found.loss >= best - 1e-9


def are_runs(problem: Problem, parts: Sequence[Part]) -> bool:
    """Whether groups are runs of consecutive layers of one type."""
    for part in parts:
        nodes = [problem.nodes[name] for name in problem.covered(part)]
        at = sorted(node.layer for node in nodes)
        apart = at != list(range(at[0], at[0] + len(at)))
        if part not in problem.others and (apart or len({node.type for node in nodes}) > 1):
            return False
    return True


@given(seeds)
@settings(deadline=None, max_examples=12)
def test_the_local_choice_is_close_to_the_best_and_its_bound_below_it(seed: int) -> None:
    """Runs of layers with MLPs taken or not, at single prices, against all choices."""
    base = random_problem(stack(3, ("gate", "up")), seed)
    problem = with_others(base, mlps(base), seed)
    plans = [parts for parts in all_plans(problem) if are_runs(problem, parts)]
    for price in prices(problem):
        best = min(value(problem, parts, price) for parts in plans)
        rows = [[frozenset({f"h.{layer}.{kind}"}) for layer in range(3)] for kind in ("gate", "up")]
        parts = STRATEGIES["layers"](problem, price)
        found = value(problem, mixed(problem, price, parts, rows, "layers"), price)
        assert best - 1e-9 <= found <= 1.02 * best
        assert problem.bound(price) <= best + 1e-9
        assert problem.bound(price) >= 0.9 * best


def test_a_group_of_the_same_slices_is_another_candidate() -> None:
    problem = random_problem(stack(2, ("q",)), 0)
    part = frozenset(problem.nodes)
    both = with_others(problem, [part], 0)
    (key,) = both.others
    assert both.candidate(key) is not both.candidate(part)
    assert key != part


def test_candidates_that_overlap_are_not_both_taken() -> None:
    problem = random_problem(stack(4, ("a", "b")), 3)
    names = sorted(problem.nodes)
    chain = [frozenset(names[at : at + 3]) for at in range(0, 6, 2)]
    chained = with_others(problem, chain, 3)
    chained = replace(
        chained,
        others={
            key: replace(one, curve=replace(one.curve, loss=one.curve.loss * 1e-3))
            for key, one in chained.others.items()
        },
    )
    dense = sum(int(chained.candidate(p).curve.cost[-1]) for p in chained.singletons())
    for strategy in STRATEGIES:
        found = solve(replace(chained), 0.5 * dense, strategy=strategy)
        check_cover(chained, found)
        assert any(choice.candidate.kind == "units" for choice in found.choices)


def test_separate_shares_nothing_whatever_else_was_solved() -> None:
    problem = small(5)
    dense = sum(int(problem.candidate(p).curve.cost[-1]) for p in problem.singletons())
    solve(problem, 0.5 * dense, strategy="layers")
    found = solve(problem, 0.5 * dense, strategy="separate")
    basis = [c.candidate.slices for c in found.choices if c.candidate.kind == "basis"]
    assert all(len(part) == 1 for part in basis)


def test_a_problem_that_insists_takes_them_wherever_they_are() -> None:
    for strategy in STRATEGIES:
        problem = replace(small(2), insists=True)
        dense = sum(int(problem.candidate(p).curve.cost[-1]) for p in problem.singletons())
        found = solve(problem, 0.5 * dense, strategy=strategy)
        check_cover(problem, found)
        assert sum(c.candidate.kind == "units" for c in found.choices) == 2


def test_a_second_limit_holds_for_all_kinds() -> None:
    problem = small(1)

    def sided(curve: Curve) -> Curve:
        return replace(curve, side=curve.cost * 2)

    limited = replace(
        problem,
        curve_of=lambda part: sided(problem.curve_of(part)),
        others={k: replace(o, curve=sided(o.curve)) for k, o in problem.others.items()},
        side_limit=900.0,
    )
    dense = sum(int(limited.candidate(p).curve.cost[-1]) for p in limited.singletons())
    found = solve(limited, dense, strategy="layers")
    assert found.side <= 900
    check_cover(limited, found)


def test_more_budget_never_loses_more() -> None:
    problem = small(7)
    dense = sum(int(problem.candidate(p).curve.cost[-1]) for p in problem.singletons())
    found = sweep(problem, [share * dense for share in np.linspace(0.2, 1, 12)], strategy="grown")
    losses = [one.loss for one in found]
    assert losses == sorted(losses, reverse=True)


def test_thirty_two_layers_of_seven_types_take_seconds_with_a_small_gap() -> None:
    problem = random_problem(stack(32, ("q", "k", "v", "o", "gate", "up", "down")), 0, max_group=4)
    parts = mlps(problem, ("gate", "up", "down"))
    deep = with_others(problem, parts, 0)
    dense = sum(int(deep.candidate(p).curve.cost[-1]) for p in deep.singletons())
    start = time.perf_counter()
    found = solve(deep, 0.5 * dense, strategy="grown")
    assert time.perf_counter() - start < 30
    check_cover(deep, found)
    kinds = [choice.candidate.kind for choice in found.choices]
    assert 0 < kinds.count("units") < 32
    assert found.gap < 0.05 * found.loss
