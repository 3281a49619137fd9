"""Runs that grow from pairs: what they find, what they leave unpriced, and that the bound holds."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxshare.errors import PlanError
from fxshare.planning.solver.curve import Curve
from fxshare.planning.solver.grow import grow
from fxshare.planning.solver.problem import Node, Part, Problem
from fxshare.planning.solver.solve import solve
from fxshare.planning.solver.strategies import STRATEGIES
from tests.planning.build import WIDTH, random_weights, spectral_curve, stack, total

Weights = Mapping[str, np.ndarray[Any, Any]]
seeds = st.integers(0, 10_000)
prices = st.floats(1e-3, 1.0)


def alone(weights: Weights, part: Part) -> Curve:
    """Of a part as long as its dense cost, but each slice loses what a basis of its own would."""
    curve = spectral_curve(weights, part)
    least = np.zeros(len(curve.loss))
    for name in part:
        power = np.linalg.svd(weights[name], compute_uv=False) ** 2
        tail = np.concatenate([np.cumsum(power[::-1])[::-1], [0.0]]) / 2
        ranks = curve.label[:-1]
        least[:-1] += tail[np.minimum(ranks, len(tail) - 1)]
    return Curve(curve.cost, np.minimum(least, curve.loss), curve.label)


def bounded(layers: int, weights: Weights, **options: Any) -> Problem:
    nodes: dict[str, Node] = stack(layers)
    return Problem(
        nodes,
        lambda part: spectral_curve(weights, part),
        least_of=lambda part: alone(weights, part),
        **options,
    )


def runs(names: list[str]) -> Any:
    for cuts in itertools.product([False, True], repeat=len(names) - 1):
        ends = [at for at, cut in enumerate(cuts, 1) if cut] + [len(names)]
        yield [frozenset(names[a:b]) for a, b in zip([0, *ends[:-1]], ends, strict=True)]


@given(seeds, prices, st.integers(1, 7))
@settings(deadline=None, max_examples=40)
def test_no_partition_into_runs_is_below_the_bound(seed: int, price: float, layers: int) -> None:
    weights = random_weights(stack(layers), seed)
    problem, whole = bounded(layers, weights), bounded(layers, weights)
    found = STRATEGIES["grown"](problem, price)
    best = min(total(whole, parts, price) for parts in runs(list(problem.nodes)))
    assert frozenset().union(*found) == set(problem.nodes)
    assert problem.bound(price) <= best * (1 + 1e-12) <= total(problem, found, price) * (1 + 2e-12)


@given(seeds, st.floats(0.2, 1.0), st.integers(2, 7))
@settings(deadline=None, max_examples=25)
def test_the_dual_bound_holds_for_what_was_not_priced(seed: int, share: float, layers: int) -> None:
    weights = random_weights(stack(layers), seed)
    budget = share * layers * WIDTH * WIDTH
    try:
        exact = solve(bounded(layers, weights), budget, strategy="layers")
    except PlanError:
        return
    found = solve(bounded(layers, weights), budget, strategy="grown")
    assert found.bound <= exact.bound * (1 + 1e-9) + 1e-12
    assert found.bound <= found.priced_bound
    assert found.cost <= budget
    assert exact.unpriced == 0


def test_what_the_bound_rules_out_is_never_better() -> None:
    price = 0.05
    for seed in range(30):
        weights = random_weights(stack(6), seed)
        problem = bounded(6, weights)
        grown = grow(problem, problem.singletons(), price)
        for run, least in grown.least.items():
            assert least[0] <= spectral_curve(weights, grown.part(run)).value(price) * (1 + 1e-12)


def test_a_bound_above_the_part_is_caught() -> None:
    """The checks above fail of a bound that is none: with it they find a partition below it."""

    def caught(seed: int) -> bool:
        weights = random_weights(stack(5), seed)

        def false(part: Part) -> Curve:
            curve = spectral_curve(weights, part)
            return Curve(curve.cost, curve.loss + 1, curve.label)

        problem = Problem(stack(5), lambda part: spectral_curve(weights, part), least_of=false)
        STRATEGIES["grown"](problem, 0.3)
        return problem.bound(0.3) > min(total(problem, p, 0.3) for p in runs(list(problem.nodes)))

    assert any(caught(seed) for seed in range(40))


WIDE = 24


def counted(layers: int, strategy: str) -> int:
    rng = np.random.default_rng(0)
    weights = {name: rng.normal(size=(WIDE, WIDE)) for name in stack(layers)}
    problem = bounded(layers, weights)
    return solve(problem, 0.6 * layers * WIDE * WIDE, strategy=strategy).priced


def test_the_number_of_priced_groups_grows_with_the_layers_where_nothing_is_shared() -> None:
    assert counted(24, "layers") == 24 * 25 // 2
    few, many = counted(12, "grown"), counted(24, "grown")
    assert many <= 2.3 * few
    assert many < 24 * 6


def test_equal_layers_share_one_basis_as_with_every_run_priced() -> None:
    rng = np.random.default_rng(0)
    common = rng.normal(size=(2, WIDTH))
    weights = {name: rng.normal(size=(WIDTH, 2)) @ common for name in stack(6)}
    budget = 0.5 * 6 * WIDTH * WIDTH
    grown, layers = (solve(bounded(6, weights), budget, strategy=s) for s in ("grown", "layers"))
    assert grown.loss == pytest.approx(layers.loss, abs=1e-12)
    assert max(len(c.candidate.slices) for c in grown.choices) > 1


def test_large_runs_grow_where_they_gain_more(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    common = rng.normal(size=(3, WIDTH))
    weights = {
        name: rng.normal(size=(WIDTH, 3)) @ common + 0.5 * rng.normal(size=(WIDTH, WIDTH))
        for name in stack(6)
    }

    def priced(large: float) -> int:
        monkeypatch.setattr("fxshare.planning.solver.grow._LARGE", large)
        problem = bounded(6, weights)
        found = solve(problem, 0.5 * 6 * WIDTH * WIDTH, strategy="grown")
        # what is not priced still counts in the bound
        assert found.bound <= min(
            solve(bounded(6, weights), found.cost, strategy="layers").loss, found.loss
        ) * (1 + 1e-12)
        return found.priced

    whole, few = priced(WIDTH), priced(0.01)
    assert 6 + 5 <= few < whole  # layers and pairs are priced in any case


def test_candidates_grow_with_the_heads_and_not_with_their_square() -> None:
    def priced(heads: int) -> int:
        nodes = stack(2, heads=heads)
        rng = np.random.default_rng(0)
        weights = {name: rng.normal(size=(WIDE // 4, WIDE)) for name in nodes}
        problem = Problem(nodes, lambda part: spectral_curve(weights, part))
        dense = sum(w.size for w in weights.values())
        return solve(problem, 0.6 * dense, strategy="same_input").priced

    assert priced(32) <= 2.3 * priced(16)


def test_without_a_bound_whatever_is_asked_for_is_priced() -> None:
    weights = random_weights(stack(5), 3)
    problem = Problem(stack(5), lambda part: spectral_curve(weights, part))
    STRATEGIES["grown"](problem, 0.1)
    assert problem.unpriced == 0
    assert len(list(problem.seen())) == 5 * 6 // 2  # every run


def test_too_many_slices_to_enumerate() -> None:
    weights = random_weights(stack(14), 0)
    problem = Problem(stack(14), lambda part: spectral_curve(weights, part))
    with pytest.raises(PlanError, match="14 slices have too many partitions"):
        solve(problem, 14 * WIDTH * WIDTH, strategy="exhaustive")


@given(seeds, prices, st.integers(2, 6), st.sets(st.integers(0, 20), max_size=12))
@settings(deadline=None, max_examples=40)
def test_of_known_parts_alone_nothing_else_is_priced_and_the_bound_holds(
    seed: int, price: float, layers: int, chosen: set[int]
) -> None:
    weights = random_weights(stack(layers), seed)
    names = list(stack(layers))
    every = [frozenset(names[a:b]) for a, b in itertools.combinations(range(layers + 1), 2)]
    known = {part for at, part in enumerate(every) if at in chosen}
    problem = bounded(layers, weights, known=known.__contains__)
    whole = bounded(layers, weights)
    found = STRATEGIES["grown"](problem, price)
    assert {one.slices for one in problem.seen()} <= known | set(problem.singletons())
    best = min(total(whole, parts, price) for parts in runs(names))
    assert problem.bound(price) <= best * (1 + 1e-12) <= total(problem, found, price) * (1 + 2e-12)


def test_joins_of_slices_that_are_not_known_are_not_priced() -> None:
    nodes = stack(2, heads=4)
    rng = np.random.default_rng(0)
    common = rng.normal(size=(2, WIDTH))
    weights = {name: rng.normal(size=(WIDTH, 2)) @ common for name in nodes}

    def solved(known: Any) -> Problem:
        problem = Problem(
            nodes,
            lambda part: spectral_curve(weights, part),
            least_of=lambda part: alone(weights, part),
            known=known,
        )
        STRATEGIES["same_input"](problem, 0.1)
        return problem

    assert any(len(one.slices) > 1 for one in solved(None).seen())
    assert all(len(one.slices) == 1 for one in solved(lambda part: False).seen())
