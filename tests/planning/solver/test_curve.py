"""Curves: the lower hull, and what a price chooses."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxshare.errors import PlanError
from fxshare.planning.solver.curve import DENSE, Curve, allowed


def curve(points: list[tuple[int, float]]) -> Curve:
    cost, loss = zip(*points, strict=True)
    rank = [*range(1, len(points)), DENSE]
    return Curve(np.array(cost, np.int64), np.array(loss, np.float64), np.array(rank, np.int64))


# small integers: every comparison of slopes is exact, collinear points included
points = st.lists(st.tuples(st.integers(1, 25), st.integers(0, 12)), min_size=1, max_size=12)
curves = points.map(lambda found: curve([(c, float(v)) for c, v in found]))


def on_hull(one: tuple[float, float], others: set[tuple[float, float]]) -> bool:
    """Below every point and every segment that could replace it."""
    cost, loss = one
    others = others - {one}
    if any(c <= cost and v <= loss for c, v in others):
        return False
    return not any(
        a_cost < cost < b_cost
        and (b_cost - cost) * a_loss + (cost - a_cost) * b_loss <= loss * (b_cost - a_cost)
        for a_cost, a_loss in others
        for b_cost, b_loss in others
    )


@given(curves)
@settings(deadline=None, max_examples=300)
def test_hull_is_the_lower_convex_hull(one: Curve) -> None:
    every = {(float(c), float(v)) for c, v in zip(one.cost, one.loss, strict=True)}
    found = [(float(one.cost[at]), float(one.loss[at])) for at in one.hull]
    assert found == sorted(point for point in every if on_hull(point, every))


@given(curves, st.lists(st.floats(0, 20), min_size=1, max_size=6))
@settings(deadline=None, max_examples=150)
def test_values_are_the_least_over_all_options(one: Curve, prices: list[float]) -> None:
    expected = [float((one.loss + price * one.cost).min()) for price in prices]
    found = one.values(np.array(prices))
    assert found == pytest.approx(expected, rel=1e-14, abs=1e-14)
    for price, value in zip(prices, found, strict=True):
        assert one.value(price) == value
        at = one.at_price(price)
        assert one.loss[at] + price * one.cost[at] == value


def test_prices_from_nothing_to_everything_choose_from_dear_to_cheap() -> None:
    one = curve([(1, 9.0), (3, 4.0), (4, 3.9), (7, 1.0), (9, 0.0)])
    assert [one.at_price(p) for p in (0.0, 0.6, 0.8, 2.4, 2.6)] == [4, 3, 1, 1, 0]


@given(curves, st.floats(0, 26), st.floats(0, 26))
@settings(deadline=None, max_examples=100)
def test_floor_and_ceiling_bound_every_option_but_dense(
    one: Curve, least: float, most: float
) -> None:
    floored = allowed(one.cost, one.label, least=least)
    low = one.label[floored] != DENSE
    assert set(one.cost[floored][low]) <= {c for c in one.cost if c >= least}
    assert (~low).sum() == (one.label == DENSE).sum()
    both = allowed(one.cost, one.label, least=least, most=most)
    inside = (one.cost >= least) & (one.cost <= most)
    if inside.any():
        assert both.tolist() == np.flatnonzero(inside).tolist()
    else:
        assert one.label[both].tolist() == [DENSE]


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -1e-9])
def test_losses_that_are_none_are_refused(wrong: float) -> None:
    with pytest.raises(PlanError, match="not finite or below zero"):
        curve([(1, wrong), (2, 0.0)])


def test_under_a_floor_above_everything_the_dearest_is_left() -> None:
    """Dense weights in few bits are an option like others, and cost less than the floor."""
    cost, label = np.array([1, 3, 4]), np.array([1, 2, 3])
    assert allowed(cost, label, least=5.0).tolist() == [2]
    assert allowed(cost, label, least=4.0).tolist() == [2]
    assert allowed(cost, np.array([1, 2, DENSE]), least=5.0).tolist() == [2]
    assert allowed(cost[:0], label[:0]).tolist() == []
