"""Whole heads that go: which, what every number of them loses, and what makes up for them."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxshare.errors import FactoriseError
from fxshare.factors.metric import SliceStatistics
from fxshare.factors.units import Order, metric_of, mixing_of
from fxshare.factors.whole_heads import WholeHeadFactors, whole_head_factors, whole_heads_order
from fxshare.plans.whole_heads import WholeHeads
from tests.factors.test_heads import INPUTS, OUT, WIDTH, a_slice

SHAPES = ((3, 3), (4, 2), (6, 3))  # heads and key-value heads


def entry(kept: int, heads: int, groups: int) -> WholeHeads:
    group = heads // groups
    return WholeHeads(
        name="whole",
        type="q+k+v+o",
        layers=(0,),
        producers=("q", "k", "v"),
        consumer="o",
        kept=kept,
        of=groups,
        numbers_per_unit=WIDTH * ((group + 2) * INPUTS + group * OUT),
        queries=("q",),
        keys=("k",),
        values=("v",),
        heads=heads,
        width=2 * WIDTH,
    )


def order(one: SliceStatistics, groups: int) -> Order:
    return whole_heads_order(one.gram_II, metric_of([one]), groups)


def made(one: SliceStatistics, kept: int, heads: int, groups: int) -> WholeHeadFactors:
    return whole_head_factors(entry(kept, heads, groups), {"o": one}, order(one, groups))


def loss_of(one: SliceStatistics, groups: tuple[int, ...], of: int) -> float:
    """Of these groups with the best columns for them."""
    each = len(one.gram_II) // of
    there = tuple(c for group in groups for c in range(group * each, (group + 1) * each))
    weight = torch.zeros_like(one.weight_OI)
    weight[:, list(there)] = one.weight_OI @ mixing_of(one.gram_II, there, 1e-8)
    return float(one.quadratic_loss(weight))


@pytest.mark.parametrize("shape", SHAPES)
@given(st.integers(0, 1000), st.data())
@settings(deadline=None, max_examples=15)
def test_the_predicted_loss_is_the_measured_one(
    shape: tuple[int, int], seed: int, data: st.DataObject
) -> None:
    one, kept = a_slice(seed, shape[0]), data.draw(st.integers(1, shape[1]))
    found = made(one, kept, *shape)
    measured = one.quadratic_loss(found.whole("o", torch.float64))
    assert measured == pytest.approx(found.lost, rel=1e-8, abs=1e-8 * found.total)
    if kept < shape[1]:  # no other weights for these heads lose less
        found.weights["o"] *= 1 + 1e-3
        assert one.quadratic_loss(found.whole("o", torch.float64)) > measured


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(3))
def test_each_head_is_the_best_next_one(shape: tuple[int, int], seed: int) -> None:
    one, groups = a_slice(seed, shape[0]), shape[1]
    found = order(one, groups)
    assert sorted(found.units.tolist()) == list(range(groups))
    taken: tuple[int, ...] = ()
    for next_ in found.units.tolist():
        rest = {g: loss_of(one, (*taken, g), groups) for g in range(groups) if g not in taken}
        assert rest[next_] == pytest.approx(min(rest.values()), rel=1e-9, abs=1e-9)
        taken = (*taken, next_)
        assert float(found.lost[len(taken)]) == pytest.approx(rest[next_], rel=1e-8, abs=1e-9)
    single = [loss_of(one, some, groups) for some in combinations(range(groups), 1)]
    assert float(found.lost[1]) == pytest.approx(min(single), rel=1e-8)


@pytest.mark.parametrize("shape", SHAPES)
def test_more_heads_lose_less_and_all_of_them_nothing(shape: tuple[int, int]) -> None:
    one = a_slice(3, shape[0])
    lost = order(one, shape[1]).lost.numpy()
    assert len(lost) == shape[1] + 1
    assert (np.diff(lost) < 0).all()
    assert lost[-1] == 0.0
    total = 0.5 * float((metric_of([one]) * one.gram_II).sum())
    assert lost[0] == pytest.approx(total, rel=1e-9)
    found = made(one, shape[1], *shape)
    assert torch.equal(found.whole("o", torch.float64), one.weight_OI)


def test_the_mean_of_what_goes_is_in_the_bias() -> None:
    one = a_slice(1, 4)
    mean = torch.linspace(-1, 1, 4 * WIDTH, dtype=torch.float64)
    centred = SliceStatistics(
        one.weight_OI, one.gram_II, one.moment_OO, "x", mean_I=mean, bias_O=torch.zeros(OUT)
    )
    found = made(centred, 1, 4, 2)
    gap = (one.weight_OI - found.whole("o", torch.float64)) @ mean
    torch.testing.assert_close(found.bias_shift["o"], gap)
    without = whole_head_factors(entry(1, 4, 2), {"o": centred}, order(centred, 2), bias=False)
    assert not without.bias_shift


def test_a_head_that_is_not_read_goes_first() -> None:
    one = a_slice(5, 4)
    weight: Tensor = one.weight_OI.clone()
    weight[:, : 2 * WIDTH] = 0.0
    gram = torch.block_diag(*(one.gram_II[:8, :8], one.gram_II[8:, 8:]))  # type: ignore[no-untyped-call]
    blind = SliceStatistics(weight, gram, one.moment_OO, "x")
    found = order(blind, 2)
    assert found.units.tolist() == [1, 0]
    assert float(found.lost[1]) == pytest.approx(0.0, abs=1e-9 * float(found.lost[0]))


def test_numbers_that_are_not_finite_are_refused() -> None:
    one = a_slice(0, 4)
    gram = one.gram_II.clone()
    gram[0, 0] = torch.nan
    with pytest.raises(FactoriseError, match="heads: expected finite moments"):
        whole_heads_order(gram, metric_of([one]), 2)
