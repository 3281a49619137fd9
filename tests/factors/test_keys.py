"""Narrower queries and keys: what every width loses, and what makes up for the rest."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxshare.errors import FactoriseError
from fxshare.factors.keys import KeyFactors, key_factors, key_order, moments_of, stored_keys
from fxshare.factors.metric import SliceStatistics
from fxshare.plans.keys import Keys
from passes.graph.scores import Rotary
from tests.factors.test_units import moment

seeds = st.integers(0, 1000)
WIDTH, INPUTS = 6, 7
SHAPES = ((3, 3), (4, 2), (4, 1))  # heads and key-value heads
ROTARY: tuple[tuple[Rotary, int], ...] = (
    ("none", 0),
    ("halves", WIDTH),
    ("neighbours", WIDTH),
    ("halves", 4),
)


def random(*shape: int, seed: int = 9) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def a_slice(seed: int, heads: int, *, bias: bool = False, tokens: int = 90) -> SliceStatistics:
    wide = heads * WIDTH
    return SliceStatistics(
        random(wide, INPUTS, seed=seed),
        moment(INPUTS, seed, tokens),
        moment(wide, seed + 2, 300),
        "x",
        mean_I=random(INPUTS, seed=seed + 3) if bias else None,
        bias_O=random(wide, seed=seed + 4) if bias else None,
    )


def entry(kept: int, heads: int, kv_heads: int, rotary: tuple[Rotary, int] = ("none", 0)) -> Keys:
    return Keys(
        name="keys",
        type="k+q",
        layers=(0,),
        producers=("k",),
        consumer="q",
        kept=kept,
        of=WIDTH,
        numbers_per_unit=(heads + kv_heads) * INPUTS,
        queries=("q",),
        keys=("k",),
        heads=heads,
        kv_heads=kv_heads,
        rotary=rotary[0],
        rotated=rotary[1],
    )


def made(one: Keys, q: SliceStatistics, k: SliceStatistics, *, by_keys: bool = False) -> KeyFactors:
    moments = moments_of([q], [k], WIDTH)
    groups = None if one.rotary == "none" else one.together
    order = key_order(moments, one.heads, one.kv_heads, groups, by_keys=by_keys)
    return key_factors(one, {"q": q}, moments, order, by_keys=by_keys)


def scores(
    q: tuple[Tensor, Tensor | None], k: tuple[Tensor, Tensor | None], heads: int, kv_heads: int
) -> Tensor:
    x, y = random(9, INPUTS, seed=2), random(8, INPUTS, seed=3)
    (wq, bq), (wk, bk) = q, k
    left = (x @ wq.T + (0 if bq is None else bq)).reshape(9, heads, -1)
    right = (y @ wk.T + (0 if bk is None else bk)).reshape(8, kv_heads, -1)
    return torch.einsum("thd,shd->hts", left, right.repeat_interleave(heads // kv_heads, 1))


@pytest.mark.parametrize("by_keys", [False, True])
@pytest.mark.parametrize("rotary", ROTARY)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_predicted_loss_is_the_measured_one(
    shape: tuple[int, int], rotary: tuple[Rotary, int], by_keys: bool
) -> None:
    for seed in (1, 2):
        q, k = a_slice(seed, shape[0]), a_slice(seed + 20, shape[1])
        for kept in (1, 2, 3, 4, 5):
            one = entry(kept, *shape, rotary)
            if rotary[1] and kept % 2:  # a pair of which one goes
                continue
            found = made(one, q, k, by_keys=by_keys)
            whole = found.whole("q", torch.float64)
            assert q.quadratic_loss(whole) == pytest.approx(found.lost, rel=1e-8)
            if by_keys:
                continue
            # no other queries for these keys lose less
            found.weights["q"] *= 1 + 1e-3
            assert q.quadratic_loss(found.whole("q", torch.float64)) > found.lost


@pytest.mark.parametrize("rotary", ROTARY)
def test_with_a_bias_it_is_that_of_the_queries_and_not_of_their_weight_alone(
    rotary: tuple[Rotary, int],
) -> None:
    q, k = a_slice(4, 4, bias=True), a_slice(5, 2, bias=True)
    assert q.mean_I is not None
    assert q.bias_O is not None
    found = made(entry(4, 4, 2, rotary), q, k)
    gap_OI = q.weight_OI - found.whole("q", torch.float64)
    mean_O = gap_OI @ q.mean_I - found.bias_shift["q"]
    moment_OO = gap_OI @ q.gram_II @ gap_OI.T + torch.outer(mean_O, mean_O)
    assert isinstance(q.moment_OO, Tensor)
    measured = 0.5 * float((q.moment_OO * moment_OO).sum())
    assert measured == pytest.approx(found.lost, rel=1e-8)
    assert q.quadratic_loss(found.whole("q", torch.float64)) != pytest.approx(found.lost, rel=1e-2)


@pytest.mark.parametrize("rotary", ROTARY)
@pytest.mark.parametrize("shape", SHAPES)
def test_wider_heads_lose_less_and_whole_ones_are_the_identity(
    shape: tuple[int, int], rotary: tuple[Rotary, int]
) -> None:
    q, k = a_slice(0, shape[0], bias=True), a_slice(1, shape[1], bias=True)
    one = entry(WIDTH, *shape, rotary)
    groups = None if one.rotary == "none" else one.together
    lost = key_order(moments_of([q], [k], WIDTH), *shape, groups).lost
    finite = lost[lost.isfinite()]
    assert len(finite) >= WIDTH // 2 + 1
    assert (finite.diff() < 0).all()
    assert lost[-1] == 0.0
    found = made(one, q, k)
    assert torch.equal(found.weights["q"], q.weight_OI)
    assert torch.equal(found.rows(0, k.weight_OI), k.weight_OI)
    assert found.lost == 0.0
    assert not found.bias_shift


@pytest.mark.parametrize("rotary", ROTARY)
@pytest.mark.parametrize("shape", SHAPES)
def test_narrower_queries_and_keys_have_the_scores_of_the_queries_alone(
    shape: tuple[int, int], rotary: tuple[Rotary, int]
) -> None:
    q, k = a_slice(7, shape[0], bias=True), a_slice(8, shape[1], bias=True)
    assert q.bias_O is not None
    assert k.bias_O is not None
    found = made(entry(4, *shape, rotary), q, k)
    narrow = scores(
        (found.weights["q"], found.biases["q"]),
        (found.rows(0, k.weight_OI), found.rows(0, k.bias_O)),
        *shape,
    )
    whole = found.whole("q", torch.float64), q.bias_O + found.bias_shift["q"]
    exact = scores(whole, (k.weight_OI, k.bias_O), *shape)
    torch.testing.assert_close(narrow, exact, rtol=1e-11, atol=1e-10)
    dense = scores((q.weight_OI, q.bias_O), (k.weight_OI, k.bias_O), *shape)
    assert (narrow - dense).abs().max() > 1e-2
    halves = [found.rows(at, k.weight_OI[at * WIDTH : (at + 1) * WIDTH]) for at in range(shape[1])]
    assert torch.equal(torch.cat(halves), found.rows(0, k.weight_OI))


@given(seeds)
@settings(deadline=None, max_examples=10)
def test_of_one_head_it_is_the_best_product_of_that_rank(seed: int) -> None:
    """The Eckart–Young bound under both moments, which no narrower head beats."""
    q, k = a_slice(seed, 1, tokens=200), a_slice(seed + 1, 1)
    moments = moments_of([q], [k], WIDTH)
    lost = key_order(moments, 1, 1, None).lost
    roots = [torch.linalg.cholesky(x) for x in (moments.metric_nn, moments.queries_nn)]
    squares = torch.linalg.svdvals(roots[0].T @ roots[1]).square()
    tails = 0.5 * torch.stack([squares[n:].sum() for n in range(WIDTH + 1)])
    torch.testing.assert_close(lost, tails, rtol=1e-7, atol=1e-10)
    by_keys = key_order(moments, 1, 1, None, by_keys=True).lost
    assert (by_keys[1:-1] >= lost[1:-1] * (1 - 1e-9)).all()


def test_the_first_pair_is_the_one_that_loses_least_alone() -> None:
    q, k = a_slice(11, 4), a_slice(12, 2)
    moments = moments_of([q], [k], WIDTH)
    groups = entry(2, 4, 2, ("halves", WIDTH)).together
    order = key_order(moments, 4, 2, groups)
    losses = []
    for group in groups:
        there = torch.arange(4 * WIDTH).reshape(4, WIDTH)[:, list(group)].flatten()
        own = moments.metric_nn[there]
        told = own.T @ torch.linalg.solve(own[:, there], own)
        losses.append(0.5 * float(((moments.metric_nn - told) * moments.queries_nn).sum()))
    best = int(np.argmin(losses))
    assert order.kept(2) == groups[best]
    assert float(order.lost[2]) == pytest.approx(losses[best], rel=1e-9)
    assert torch.isinf(order.lost[[1, 3, 5]]).all()


def test_what_is_stored_is_as_far_from_the_weights_as_it_says() -> None:
    q, k = a_slice(7, 4, bias=True), a_slice(8, 2, bias=True)
    assert q.bias_O is not None
    assert k.bias_O is not None
    found = made(entry(4, 4, 2, ("halves", WIDTH)), q, k)
    rows = {"q": q.weight_OI, "k": k.weight_OI}
    stored = stored_keys(found, rows, {"q": q.bias_O, "k": k.bias_O})
    gone = [number for number in range(WIDTH) if number not in found.kept]
    left = k.weight_OI.clone().reshape(2, WIDTH, -1)
    size = float(left[:, gone].norm() / left.norm())
    assert stored.slice_errors["k"] == pytest.approx(size, rel=1e-9)
    assert stored.bias_shifts["k"] == pytest.approx(
        float(k.bias_O.reshape(2, WIDTH)[:, gone].norm()), rel=1e-9
    )
    assert stored.slice_errors["q"] > 0.1


def test_the_mean_of_keys_changes_nothing() -> None:
    """It adds the same to all scores of a query."""
    q, k = a_slice(1, 2), a_slice(2, 2)
    far = replace(k, mean_I=random(INPUTS), bias_O=10 * random(2 * WIDTH))
    one, other = (moments_of([q], [x], WIDTH).keys_nn for x in (k, far))
    assert torch.equal(one, other)


def test_few_tokens_have_widths_too_and_what_is_not_finite_is_refused() -> None:
    q, k = a_slice(1, 2, tokens=3), a_slice(2, 2, tokens=3)
    for groups in (None, entry(2, 2, 2, ("halves", WIDTH)).together):
        lost = key_order(moments_of([q], [k], WIDTH), 2, 2, groups).lost
        assert not lost.isnan().any()
    bad = replace(q, gram_II=torch.full((INPUTS, INPUTS), torch.nan, dtype=torch.float64))
    with pytest.raises(FactoriseError, match="queries and keys: expected finite moments"):
        moments_of([bad], [k], WIDTH)
