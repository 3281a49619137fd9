"""Narrower heads: what every width loses, and what makes up for the rest."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxshare.errors import FactoriseError
from fxshare.factors.heads import HeadFactors, head_factors, turns_of, widths_of
from fxshare.factors.metric import SliceStatistics
from fxshare.factors.units import metric_of
from fxshare.plans.heads import Heads
from tests.factors.test_units import moment

seeds = st.integers(0, 1000)
WIDTH, INPUTS, OUT = 4, 10, 7
SHAPES = ((3, 3), (4, 2), (4, 1))  # heads and key-value heads


def a_slice(seed: int, heads: int, tokens: int = 90) -> SliceStatistics:
    generator = torch.Generator().manual_seed(seed + 1)
    wide = heads * WIDTH
    weight = torch.randn(OUT, wide, generator=generator, dtype=torch.float64)
    return SliceStatistics(weight, moment(wide, seed, tokens), moment(OUT, seed + 2, 30), "x")


def entry(kept: int, heads: int, kv_heads: int) -> Heads:
    return Heads(
        name="heads",
        type="v+o",
        layers=(0,),
        producers=("v",),
        consumer="o",
        kept=kept,
        of=WIDTH,
        numbers_per_unit=kv_heads * INPUTS + heads * OUT,
        values=("v",),
        heads=heads,
        kv_heads=kv_heads,
    )


def made(one: SliceStatistics, kept: int, heads: int, kv_heads: int) -> HeadFactors:
    lost = widths_of(one.gram_II, metric_of([one]), heads, kv_heads)
    return head_factors(entry(kept, heads, kv_heads), {"o": one}, lost)


def random(*shape: int, seed: int = 9) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", SHAPES)
@given(seeds, st.integers(1, WIDTH))
@settings(deadline=None, max_examples=15)
def test_the_predicted_loss_is_the_measured_one(
    shape: tuple[int, int], seed: int, kept: int
) -> None:
    one = a_slice(seed, shape[0])
    found = made(one, kept, *shape)
    measured = one.quadratic_loss(found.whole("o", torch.float64))
    assert measured == pytest.approx(found.lost, rel=1e-8, abs=1e-8 * found.total)
    if kept < WIDTH:  # no other weights for these values lose less
        found.weights["o"] *= 1 + 1e-3
        assert one.quadratic_loss(found.whole("o", torch.float64)) > measured


@pytest.mark.parametrize("shape", SHAPES)
def test_wider_heads_lose_less_and_whole_ones_nothing(shape: tuple[int, int]) -> None:
    one = a_slice(3, shape[0])
    lost = widths_of(one.gram_II, metric_of([one]), *shape).lost.numpy()
    assert len(lost) == WIDTH + 1
    assert (np.diff(lost) < 0).all()
    assert lost[-1] == 0.0
    assert lost[0] == pytest.approx(0.5 * float((metric_of([one]) * one.gram_II).sum()), rel=1e-9)


def test_of_one_head_it_is_the_best_product_of_that_rank() -> None:
    """The Eckart–Young bound under both moments, which no narrower head beats."""
    one = a_slice(5, 1)
    lost = widths_of(one.gram_II, metric_of([one]), 1, 1).lost
    root_G = torch.linalg.cholesky(one.gram_II)
    assert isinstance(one.moment_OO, Tensor)
    root_A = torch.linalg.cholesky(one.moment_OO)
    squares = torch.linalg.svdvals(root_A.T @ one.weight_OI @ root_G).square()
    tails = 0.5 * torch.stack([squares[k:].sum() for k in range(WIDTH + 1)])
    torch.testing.assert_close(lost, tails, rtol=1e-9, atol=1e-12)


def test_heads_make_up_for_one_another() -> None:
    """A head that repeats another one may lose all but one of its directions."""
    generator = torch.Generator().manual_seed(4)
    first = torch.randn(200, WIDTH, generator=generator, dtype=torch.float64)
    twice = torch.cat([first, first @ random(WIDTH, WIDTH)], 1)
    one = SliceStatistics(random(OUT, 2 * WIDTH), twice.T @ twice / 200, None, "x")
    lost = widths_of(one.gram_II, metric_of([one]), 2, 2).lost
    alone = widths_of(
        one.gram_II * torch.block_diag(*[torch.ones(WIDTH, WIDTH)] * 2).double(),
        metric_of([one]),
        2,
        2,
    ).lost
    assert lost[WIDTH // 2] < 0.5 * alone[WIDTH // 2]


@pytest.mark.parametrize("shape", SHAPES)
def test_all_of_the_width_is_the_identity(shape: tuple[int, int]) -> None:
    one = a_slice(0, shape[0], tokens=3)  # a singular moment
    found = made(one, WIDTH, *shape)
    values = random(shape[1] * WIDTH, INPUTS)
    assert torch.equal(found.weights["o"], one.weight_OI)
    assert torch.equal(found.rows(0, values), values)
    assert torch.equal(found.whole("o", torch.float64), one.weight_OI)
    assert found.lost == 0.0
    assert not found.bias_shift


@pytest.mark.parametrize("shape", SHAPES)
def test_narrower_values_and_output_are_the_output_for_values_as_they_were(
    shape: tuple[int, int],
) -> None:
    heads, kv_heads = shape
    one = a_slice(7, heads)
    found = made(one, 3, heads, kv_heads)
    values, bias = random(kv_heads * WIDTH, INPUTS), random(kv_heads * WIDTH)
    x = random(20, INPUTS, seed=2)

    def read(weight_V: Tensor, bias_V: Tensor, weight_O: Tensor) -> Tensor:
        z = (x @ weight_V.T + bias_V).reshape(len(x), kv_heads, -1)
        return z.repeat_interleave(heads // kv_heads, 1).flatten(1) @ weight_O.T

    narrow = read(found.rows(0, values), found.rows(0, bias), found.weights["o"])
    whole = read(values, bias, found.whole("o", torch.float64))
    torch.testing.assert_close(narrow, whole, rtol=1e-12, atol=1e-11)
    halves = [found.rows(at, values[at * WIDTH : (at + 1) * WIDTH]) for at in range(kv_heads)]
    assert torch.equal(torch.cat(halves), found.rows(0, values))


def test_a_mean_goes_into_the_bias_of_the_output() -> None:
    heads = 3
    hidden = random(60, heads * WIDTH, seed=1) + 2.0
    mean = hidden.mean(0)
    covariance = (hidden - mean).T @ (hidden - mean) / len(hidden)
    one = SliceStatistics(random(OUT, heads * WIDTH), covariance, None, "x", mean_I=mean)
    found = made(one, 2, heads, heads)
    whole = found.whole("o", torch.float64)
    gone = hidden @ one.weight_OI.T - (hidden @ whole.T + found.bias_shift["o"])
    assert gone.mean(0).abs().max() < 1e-12
    assert 0.5 * float(gone.square().sum()) / len(hidden) == pytest.approx(found.lost, rel=1e-9)


def test_turns_are_orthogonal_and_the_same_in_any_basis_of_the_values() -> None:
    one = a_slice(2, 4)
    turns = turns_of(one.gram_II, metric_of([one]), 4, 2)
    eye = torch.eye(WIDTH, dtype=torch.float64).expand(2, WIDTH, WIDTH)
    torch.testing.assert_close(turns @ turns.mT, eye, rtol=0, atol=1e-12)
    # values in another basis, what reads them in the inverse: nothing else is lost
    basis = torch.block_diag(*[random(WIDTH, WIDTH, seed=at // 2) for at in range(4)])
    inverse = torch.linalg.inv(basis)
    other = SliceStatistics(
        one.weight_OI @ inverse, basis @ one.gram_II @ basis.T, one.moment_OO, "x"
    )
    torch.testing.assert_close(
        widths_of(other.gram_II, metric_of([other]), 4, 2).lost[:-1],
        widths_of(one.gram_II, metric_of([one]), 4, 2).lost[:-1],
        rtol=1e-6,
        atol=0,
    )


def test_dead_values_and_few_tokens_have_widths_too() -> None:
    one = a_slice(1, 3, tokens=5)
    gram = one.gram_II.clone()
    gram[0] = gram[:, 0] = 0.0
    lost = widths_of(gram, metric_of([one]), 3, 3).lost
    assert bool(lost.isfinite().all())
    # five tokens span five directions: two of every head tell them all
    assert lost[2] <= 1e-6 * lost[0]


def test_numbers_that_are_not_finite_are_refused() -> None:
    gram = torch.eye(4, dtype=torch.float64)
    gram[1, 1] = float("nan")
    with pytest.raises(FactoriseError, match="expected finite moments, found NaN"):
        widths_of(gram, torch.eye(4, dtype=torch.float64), 2, 2)
