"""Costs drawn towards one share of dense for all."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from fxshare.planning import blend as blending
from fxshare.planning.solver.solve import solve
from tests.planning.build import random_problem, stack


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_cost_is_the_dearest_below_what_is_wanted(
    share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blending, "dense_cost", lambda nodes, name, options: 36)
    problem = random_problem(stack(4), 0)
    planned = solve(problem, 108, strategy="separate")
    options: Any = SimpleNamespace()
    found = blending.blend(planned, problem, share, 0.7, options)
    for before, after in zip(planned.choices, found.choices, strict=True):
        assert after.candidate is before.candidate
        wanted = (1 - share) * before.cost + share * 0.7 * 36
        allowed = [float(cost) for cost in before.candidate.curve.cost if cost <= wanted]
        assert after.cost == max(allowed)
    assert (found.cost == planned.cost) is (share == 0.0)
    # more than the least, so that what was asked for is what decides
    assert max(choice.cost for choice in found.choices) > 12
