"""Partitions against brute force, and the graph that they are made on."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxshare.errors import PlanError
from fxshare.planning.solver.problem import Node, Part, Problem
from fxshare.planning.solver.strategies import STRATEGIES, _families, _local_moves
from tests.planning.build import (
    all_partitions,
    legal,
    node,
    random_problem,
    random_weights,
    spectral_curve,
    stack,
    total,
)

QK = (frozenset({"q", "k"}),)
prices = st.floats(1e-3, 1.0)
seeds = st.integers(0, 10_000)
EVERY = sorted(STRATEGIES)


def same_type(a: str, b: str) -> bool:
    return a == b


def same_or_qk(a: str, b: str) -> bool:
    return a == b or {a, b} == {"q", "k"}


def parts_of(*names: str) -> list[Part]:
    return [frozenset(name.split()) for name in names]


# The graph


def test_nodes_and_edges_carry_what_they_stand_for() -> None:
    problem = random_problem(stack(2, ("q", "k")), 0, may_share=QK)
    graph = problem.graph(0.1)
    assert isinstance(graph, nx.Graph)
    q0 = frozenset({"h.0.q"})
    expected = {"site": "h.0.q", "type": "q", "layer": 0, "head": None}
    assert graph.nodes[q0] == {**expected, "in_features": 6, "out_features": 6}
    assert {frozenset(*[a | b]) for a, b in graph.edges} == {
        frozenset(names.split())
        for names in ("h.0.q h.0.k", "h.1.q h.1.k", "h.0.q h.1.q", "h.0.k h.1.k")
    }
    for a, b, weight in graph.edges(data="weight"):
        gain = problem.value(a, 0.1) + problem.value(b, 0.1) - problem.value(a | b, 0.1)
        assert weight == gain


def test_edges_grow_linearly_with_the_heads() -> None:
    def edges(heads: int) -> int:
        problem = random_problem(stack(3, ("q", "k"), heads=heads), 0, may_share=QK)
        return len(problem.neighbours(problem.singletons()))

    few, many = edges(4), edges(16)
    assert few == 3 * (2 * 4 - 1) + 2 * 2 * 4
    assert many == 3 * (2 * 16 - 1) + 2 * 2 * 16


def test_a_type_that_may_not_share_does_not_part_those_that_may() -> None:
    problem = random_problem(stack(1, ("k", "q", "v")), 0, may_share=[frozenset({"k", "v"})])
    assert [a | b for a, b in problem.neighbours(problem.singletons())] == [{"h.0.k", "h.0.v"}]


def test_heads_are_neighbours_in_their_order_and_not_in_that_of_their_names() -> None:
    problem = random_problem(stack(1, heads=11), 0)
    pairs = {a | b for a, b in problem.neighbours(problem.singletons())}
    assert pairs == {frozenset({f"h.0.q.{i}", f"h.0.q.{i + 1}"}) for i in range(10)}


# Brute force


def runs(names: Sequence[str]) -> Any:
    """All partitions of a row into runs."""
    for cuts in itertools.product([False, True], repeat=len(names) - 1):
        parts, start = [], 0
        for at, cut in enumerate([*cuts, True], start=1):
            if cut:
                parts.append(frozenset(names[start:at]))
                start = at
        yield parts


@given(seeds, prices, st.integers(1, 8), st.sampled_from([None, 1, 2, 3]))
@settings(deadline=None, max_examples=30)
def test_layers_is_the_best_partition_into_runs(
    seed: int, price: float, layers: int, most: int | None
) -> None:
    problem = random_problem(stack(layers), seed, max_group=most)
    names = list(problem.nodes)
    best = min(
        total(problem, parts, price)
        for parts in runs(names)
        if all(most is None or len(part) <= most for part in parts)
    )
    found = STRATEGIES["layers"](problem, price)
    assert total(problem, found, price) == pytest.approx(best, rel=1e-12)
    assert any(set(found) == set(parts) for parts in runs(names))


def matchings(edges: list[tuple[Part, Part]]) -> Any:
    if not edges:
        yield []
        return
    (a, b), rest = edges[0], edges[1:]
    yield from matchings(rest)
    for matching in matchings([e for e in rest if not {a, b} & set(e)]):
        yield [(a, b), *matching]


@given(seeds, prices, st.sampled_from([(8, ("q",)), (4, ("q", "k")), (2, ("q", "k", "v"))]))
@settings(deadline=None, max_examples=20)
def test_pairs_is_the_best_matching(
    seed: int, price: float, size: tuple[int, tuple[str, ...]]
) -> None:
    problem = random_problem(stack(*size), seed, may_share=QK)
    graph = problem.graph(price)
    best = min(
        total(problem, [a | b for a, b in chosen], price)
        + total(problem, [p for p in graph if not any(p in pair for pair in chosen)], price)
        for chosen in matchings(list(graph.edges))
    )
    found = STRATEGIES["pairs"](problem, price)
    assert total(problem, found, price) == pytest.approx(best, rel=1e-12)
    assert max(map(len, found)) <= 2


@given(seeds, prices, st.sampled_from([(6, ("q",)), (3, ("q", "k")), (2, ("q", "k", "v"))]))
@settings(deadline=None, max_examples=20)
def test_exhaustive_is_the_best_set_partition_and_auto_is_as_good(
    seed: int, price: float, size: tuple[int, tuple[str, ...]]
) -> None:
    problem = random_problem(stack(*size), seed, may_share=QK, max_group=3)
    best = min(
        total(problem, parts, price)
        for parts in all_partitions(problem.singletons())
        if all(legal(problem, part, same_or_qk) for part in parts)
    )
    found = STRATEGIES["exhaustive"](problem, price)
    assert total(problem, found, price) == pytest.approx(best, rel=1e-12)
    assert total(problem, STRATEGIES["auto"](problem, price), price) <= best * 1.01


def test_exhaustive_takes_eight_slices() -> None:
    problem = random_problem(stack(8), 3)
    for price in (0.01, 0.1, 0.5):
        best = min(total(problem, parts, price) for parts in all_partitions(problem.singletons()))
        found = STRATEGIES["exhaustive"](problem, price)
        assert total(problem, found, price) == pytest.approx(best, rel=1e-12)


@given(seeds, prices, st.integers(1, 4), st.sampled_from([None, 2]))
@settings(deadline=None, max_examples=20)
def test_agglomerative_and_auto_are_never_worse_than_no_sharing(
    seed: int, price: float, layers: int, heads: int | None
) -> None:
    problem = random_problem(stack(layers, ("q", "k"), heads), seed, may_share=QK)
    alone = total(problem, problem.singletons(), price)
    for name in ("agglomerative", "auto"):
        assert total(problem, STRATEGIES[name](problem, price), price) <= alone * (1 + 1e-12)


def test_auto_may_leave_the_slices_of_a_layer_apart() -> None:
    # experts: one family, several in a layer, nothing in common
    nodes = {
        f"{layer}.{expert}": node(f"{layer}.{expert}", layer=layer)
        for layer in range(9)
        for expert in range(9)
    }
    problem = random_problem(nodes, 0)
    alone = total(problem, problem.singletons(), 0.05)
    assert total(problem, STRATEGIES["layers"](problem, 0.05), 0.05) > alone
    assert total(problem, STRATEGIES["auto"](problem, 0.05), 0.05) <= alone


def test_same_input_joins_what_reads_one_activation_where_that_pays() -> None:
    """q and k of a layer are the same weights; v has nothing in common with them."""
    nodes = stack(1, ("q", "k", "v"))
    weights = random_weights(nodes, 0)
    weights["h.0.k"] = weights["h.0.q"]
    weights["h.0.v"] = 0.1 * np.random.default_rng(1).normal(size=(6, 6))
    every = [frozenset(pair) for pair in itertools.combinations("qkv", 2)]
    problem = Problem(nodes, lambda part: spectral_curve(weights, part), may_share=every)
    assert set(STRATEGIES["same_input"](problem, 0.05)) == set(parts_of("h.0.q h.0.k", "h.0.v"))
    # at a price of nothing everything is stored dense, and nothing is gained
    assert set(STRATEGIES["same_input"](problem, 0.0)) == set(problem.singletons())


def test_same_input_leaves_what_reads_two_activations_apart() -> None:
    """However much they have in common, and although their types may share."""
    nodes = {name: node(name, type=name) for name in "qo"}
    weights = random_weights(nodes, 0)
    weights["o"] = weights["q"]
    may_share = [frozenset("qo")]
    problem = Problem(nodes, lambda part: spectral_curve(weights, part), may_share=may_share)
    apart = problem.singletons()
    assert problem.value(frozenset("qo"), 0.05) < total(problem, apart, 0.05)
    assert set(STRATEGIES["same_input"](problem, 0.05)) == set(apart)


def test_a_piece_moves_to_the_group_that_it_has_something_in_common_with() -> None:
    nodes = stack(3)
    rng = np.random.default_rng(0)
    weights = {n: rng.normal(size=(6, 2)) @ rng.normal(size=(2, 6)) for n in sorted(nodes)}
    a, b, c = sorted(nodes)
    weights[c] = weights[b]
    problem = Problem(nodes, lambda part: spectral_curve(weights, part))
    start = parts_of(f"{a} {b}", c)
    moved = _local_moves(problem, 0.05, start, problem.singletons())
    assert set(moved) == set(parts_of(a, f"{b} {c}"))
    assert total(problem, moved, 0.05) < total(problem, start, 0.05)


def test_what_is_tied_over_layers_is_no_part_of_a_row() -> None:
    nodes = stack(4)
    tie = parts_of("h.1.q h.2.q")
    problem = random_problem(nodes, 0, tie=tie)
    rows = _families(problem, problem.singletons())
    assert rows == [parts_of("h.0.q", "h.3.q"), tie]


# What every strategy owes


def limited(problem: Problem) -> list[Problem]:
    tie = parts_of("h.0.q h.1.q", "h.2.q h.2.k")
    return [
        problem,
        replace(problem, max_group=2),
        replace(problem, may_share=QK),
        replace(problem, may_share=[*QK, frozenset({"k", "v"})]),
        replace(problem, tie=tie, max_group=2, may_share=QK),
        replace(problem, tie=parts_of("h.0.q h.0.v h.1.k")),
    ]


@pytest.mark.parametrize("strategy", EVERY)
@given(seeds, prices)
@settings(deadline=None, max_examples=5)
def test_every_strategy_keeps_to_the_rules(strategy: str, seed: int, price: float) -> None:
    nodes = stack(3, ("q", "k") if strategy == "exhaustive" else ("q", "k", "v"))
    for problem in limited(random_problem(nodes, seed)):
        if any(not part <= set(nodes) for part in problem.tie):
            continue
        found = STRATEGIES[strategy](problem, price)
        assert sorted(name for part in found for name in part) == sorted(nodes)
        tied = {part: {nodes[n].type for n in part} for part in problem.tie}
        for part in found:
            assert all(names <= part or not names & part for names in problem.tie)
            if problem.max_group is not None:
                assert len({nodes[name].layer for name in part}) <= problem.max_group
            allowed = [*problem.may_share, *(t for names, t in tied.items() if names <= part)]
            for a, b in itertools.combinations({nodes[name].type for name in part}, 2):
                assert any({a, b} <= types for types in allowed), part


def test_the_rules_of_tests_have_teeth() -> None:
    # at this price everything wants to be together: k would link q and v
    nodes = stack(2, ("q", "k", "v"))
    types = [frozenset({"q", "k"}), frozenset({"k", "v"})]
    problem = random_problem(nodes, 0, may_share=types)
    for strategy in EVERY:
        parts = STRATEGIES[strategy](problem, 100.0)
        assert all({"q", "v"} - {nodes[n].type for n in part} for part in parts), strategy
    assert len(STRATEGIES["agglomerative"](problem, 100.0)) == 2


@pytest.mark.parametrize("strategy", EVERY)
@given(seeds, prices)
@settings(deadline=None, max_examples=4)
def test_other_names_give_the_same_partition(strategy: str, seed: int, price: float) -> None:
    nodes = stack(2, ("q", "k"), heads=2)
    # names in another order than the slices
    names = {name: f"{(seed + 7 * at) % 11}.{at}" for at, name in enumerate(nodes)}
    back = {new: old for old, new in names.items()}
    problem = random_problem(nodes, seed, may_share=QK)
    renamed = {new: replace(nodes[old], name=new) for old, new in names.items()}
    other = replace(
        problem,
        nodes=renamed,
        curve_of=lambda part: problem.curve_of(frozenset(back[name] for name in part)),
    )
    expected = {frozenset(map(names.get, p)) for p in STRATEGIES[strategy](problem, price)}
    assert set(STRATEGIES[strategy](other, price)) == expected


def mixed() -> dict[str, Node]:
    nodes = stack(3)
    return {**nodes, "wide": node("wide", in_features=9)}


@pytest.mark.parametrize(
    ("tie", "options", "reason"),
    [
        (["h.0.q wide"], {}, r"different width \[6, 9\]"),
        (["h.0.q h.1.q", "h.1.q h.2.q"], {}, "'h.1.q' is in two ties"),
        (["h.0.q h.1.q h.2.q"], {"max_group": 2}, "more layers than max_group 2"),
        (["h.0.q nothing"], {}, "'nothing' is not a slice"),
    ],
)
def test_ties_that_contradict_say_so(tie: list[str], options: Any, reason: str) -> None:
    problem = random_problem(mixed(), 0, tie=parts_of(*tie), **options)
    for strategy in EVERY:
        with pytest.raises(PlanError, match=reason):
            STRATEGIES[strategy](problem, 0.1)
