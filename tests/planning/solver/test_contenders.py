"""Which groups are priced again when the statistics are measured again."""

from __future__ import annotations

from fxshare.planning.solver.contenders import contenders
from fxshare.planning.solver.solve import solve
from tests.planning.build import random_problem, stack


def test_parts_of_partitions_near_the_price_contend_with_what_they_were_joined_from() -> None:
    problem = random_problem(stack(6), seed=0)
    solution = solve(problem, 180, strategy="layers")
    contends = contenders(problem, solution.price)
    for choice in solution.choices:
        part = choice.candidate.slices
        assert contends(part)
        assert all(contends(frozenset({name})) for name in part)
    priced = {candidate.slices for candidate in problem.seen()}
    assert any(not contends(part) for part in priced)  # or nothing would be saved
    assert not contends(frozenset({"h.0.q", "h.5.q"}))  # never priced
    # at all prices every partition counts
    everything = contenders(problem, solution.price, within=float("inf"))
    assert {part for part in priced if contends(part)} < {p for p in priced if everything(p)}


def test_nothing_contends_but_what_was_chosen_at_a_price_in_reach() -> None:
    problem = random_problem(stack(4), seed=1)
    solve(problem, 60, strategy="layers")
    assert not contenders(problem, 1e30)(frozenset({"h.0.q", "h.1.q"}))
