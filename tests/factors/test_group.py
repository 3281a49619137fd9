"""Factors of a planned group: refit, bias, pivots."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxshare.errors import FactoriseError
from fxshare.factors import group as groups
from fxshare.factors.group import GroupFactors, factorise_group
from fxshare.factors.metric import SliceStatistics
from fxshare.factors.pivots import BOUND, complement, pivot
from fxshare.factors.spectra import Spectra
from tests.factors.test_spectra import group
from tests.planning.build import gram, quadratic, slice_of

seeds = st.integers(0, 1000)


def own_inputs(outs: list[int], seed: int, tokens: int = 60) -> dict[str, SliceStatistics]:
    """Slices whose Grams differ, as those of different layers do."""
    return {
        str(i): slice_of(out, 7, seed + i, input=i, gram_II=gram(7, seed + 50 * i, tokens=tokens))
        for i, out in enumerate(outs)
    }


def factors(slices: dict[str, SliceStatistics], rank: int, **options: Any) -> GroupFactors:
    storage = options.pop("storage", "plain")
    return factorise_group(group(slices, rank, storage), Spectra(slices), **options)


# Refit and bias


@given(seeds, st.lists(st.integers(2, 8), min_size=2, max_size=3), st.integers(1, 6), st.booleans())
@settings(deadline=None, max_examples=30)
def testfitted_to_never_raises_a_slices_own_error(
    seed: int, outs: list[int], rank: int, few: bool
) -> None:
    slices = own_inputs(outs, seed, tokens=4 if few else 60)
    rank = min(rank, sum(outs))
    before, after = (factors(slices, rank, refit=refit) for refit in (False, True))
    for name, one in slices.items():
        scale = quadratic(one, 0 * one.weight_OI)
        # the damping of a singular Gram is what the refit may give away
        assert quadratic(one, after.product(name)) <= (
            quadratic(one, before.product(name)) + (1e-7 if few else 1e-12) * scale
        )
    assert torch.equal(after.basis_RI, before.basis_RI)


def test_only_what_is_asked_for_is_fitted_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    fitted = []

    def counted(one: SliceStatistics, *given: Any) -> Tensor:
        fitted.append(one)
        return refit(one, *given)

    refit = groups.fitted_to
    monkeypatch.setattr(groups, "fitted_to", counted)
    slices = own_inputs([5, 6, 7], 3)
    made = factors(slices, 3)
    assert fitted == []
    names = list(slices)
    first = made.product(names[1])
    assert fitted == [slices[names[1]]]
    assert torch.equal(made.product(names[1]), first)
    assert len(fitted) == 1
    assert [len(c) for c in made.coefficients.values()] == [5, 6, 7]
    assert len(fitted) == 3


def testfitted_to_lowers_the_error_where_grams_differ_and_is_the_least_squares_fit() -> None:
    slices = own_inputs([8, 8], 0)
    before, after = (factors(slices, 4, refit=refit) for refit in (False, True))
    for name, one in slices.items():
        basis = after.basis_RI
        inner = basis @ one.gram_II @ basis.T
        fit = torch.linalg.solve(inner, basis @ one.gram_II @ one.weight_OI.T).T
        assert after.coefficients[name] == pytest.approx(fit, rel=1e-5, abs=1e-6)
        assert quadratic(one, after.product(name)) < 0.999 * quadratic(one, before.product(name))


@given(seeds, st.lists(st.integers(1, 9), min_size=1, max_size=3), st.booleans())
@settings(deadline=None, max_examples=30)
def test_full_rank_is_the_identity(seed: int, outs: list[int], refit: bool) -> None:
    slices = own_inputs(outs, seed)
    made = factors(slices, min(7, sum(outs)), refit=refit)
    for name, one in slices.items():
        assert float((made.product(name) - one.weight_OI).abs().max()) <= 1e-7
    assert made.lost == pytest.approx(0, abs=1e-12 * made.total)


@given(seeds, st.integers(1, 5), st.booleans())
@settings(deadline=None, max_examples=20)
def test_the_bias_takes_up_the_mean_of_what_is_lost(seed: int, rank: int, refit: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    x_TI = torch.randn(300, 7, generator=generator, dtype=torch.float64) + 1.5
    mean = x_TI.mean(0)
    centred = x_TI.T @ x_TI / len(x_TI) - torch.outer(mean, mean)
    slices = {str(i): slice_of(6, 7, seed + i, gram_II=centred, mean_I=mean) for i in range(2)}
    made = factors(slices, rank, refit=refit)
    for name, one in slices.items():
        gap = one.weight_OI - made.product(name)
        assert made.bias_shift[name] == pytest.approx(gap @ mean, rel=1e-12, abs=1e-12)
        # what the outputs really differ by, shift included, is the error under the covariance
        lost_TO = x_TI @ gap.T - made.bias_shift[name]
        assert one.moment_OO is not None
        error = 0.5 * float(((lost_TO @ one.moment_OO) * lost_TO).sum()) / len(x_TI)
        assert quadratic(one, made.product(name)) == pytest.approx(error, rel=1e-9)
        without = 0.5 * float(((x_TI @ gap.T @ one.moment_OO) * (x_TI @ gap.T)).sum()) / len(x_TI)
        assert error < without


def test_there_is_no_shift_without_a_mean_or_when_it_is_not_wanted() -> None:
    slices = {"a": slice_of(6, 7, 0, mean_I=torch.ones(7).double()), "b": slice_of(6, 7, 1)}
    assert set(factors(slices, 3).bias_shift) == {"a"}
    assert factors(slices, 3, bias=False).bias_shift == {}


def test_what_the_spectrum_predicts_is_reported() -> None:
    slices = {"a": slice_of(6, 7, 0), "b": slice_of(6, 7, 1)}
    made = factors(slices, 3, refit=False)
    tails = Spectra(slices).tails(frozenset("ab"))
    assert made.lost == pytest.approx(tails[3], rel=1e-10)
    assert made.total == pytest.approx(tails[0], rel=1e-10)


# Pivots


def assert_is_pivoted(basis: Tensor, largest: float = BOUND) -> None:
    rank, features = basis.shape
    found = pivot(basis)
    kept, rest = found.kept_J, complement(found.kept_J, features)
    assert kept.tolist() == sorted(set(kept.tolist()))
    assert sorted([*kept.tolist(), *rest.tolist()]) == list(range(features))
    assert torch.equal(found.block_RR, basis.double()[:, kept])
    gap = found.block_RR @ found.table_RT - basis.double()[:, rest]
    scale = basis.double().norm(dim=1, keepdim=True)
    assert float((gap / scale).abs().max()) <= 1e-12 if rest.numel() else True
    assert found.table_RT.shape == (rank, features - rank)
    actual = float(found.table_RT.abs().max()) if rest.numel() else 0.0
    assert found.largest == actual
    assert actual <= largest * (1 + 1e-9)


@given(seeds, st.integers(1, 8), st.integers(0, 12))
@settings(deadline=None, max_examples=60)
def test_pivots_give_the_basis_back_with_small_entries(seed: int, rank: int, more: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(rank, rank + more, generator=generator, dtype=torch.float64)
    # rows of very different size: the choice must not depend on how a basis is scaled
    scale = 10.0 ** torch.randint(-6, 7, (rank, 1), generator=generator)
    assert_is_pivoted(basis * scale)
    assert torch.equal(pivot(basis * scale.pow(2).sqrt()).kept_J, pivot(basis).kept_J)


def growing(size: int, less: float = 1e-3) -> Tensor:
    """Wilkinson's matrix, of which partial pivoting keeps the columns in their order and leaves the
    last one, whose table entries grow like ``2^size``: the basis is ``[L; m]ᵀ`` with L unit lower
    triangular and (almost) −1 below its diagonal.

    A multiple of every row on those before it gives all the same length, so that scaling to unit
    length changes nothing, and leaves L, the table and its pivots as they are.
    """
    lower = torch.eye(size).double() - (1 - less) * torch.ones(size, size).double().tril(-1)
    last = torch.full((1, size), less - 1, dtype=torch.float64)
    columns_IR = torch.cat([lower, last])
    upper = torch.eye(size).double()
    long = float(columns_IR[:, 0].norm()) * 2
    for column in range(1, size):
        # the length of ``column + t · the first one`` is wanted: a quadratic equation
        own, first = columns_IR[:, column], columns_IR[:, 0] * 2
        a, b, c = first @ first, 2 * (own @ first), own @ own - long**2
        upper[0, column] = 2 * (-b + (b * b - 4 * a * c).sqrt()) / (2 * a)
    upper[0, 0] = 2
    return (columns_IR @ upper).T.contiguous()


@pytest.mark.parametrize("size", [8, 20, 40])
def test_swaps_mend_what_elimination_gets_wrong(size: int) -> None:
    basis = growing(size)
    plain = pivot(basis, bound=math.inf)
    assert plain.kept_J.tolist() == list(range(size))
    assert plain.largest > 1.9 ** (size - 1)
    assert pivot(basis).swaps > 0
    assert_is_pivoted(basis)


def deficient() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    thin = torch.randn(4, 2, generator=generator, dtype=torch.float64)
    wide = torch.randn(2, 9, generator=generator, dtype=torch.float64)
    zero_row = torch.randn(3, 9, generator=generator, dtype=torch.float64)
    zero_row[1] = 0
    twice = torch.cat([wide, wide[:1]])
    return [thin @ wide, zero_row, twice, torch.zeros(2, 5).double()]


@pytest.mark.parametrize("at", range(4))
def test_a_basis_without_full_rank_is_refused(at: int) -> None:
    with pytest.raises(FactoriseError, match="choose a lower rank"):
        pivot(deficient()[at])


@pytest.mark.parametrize("basis", [torch.zeros(5, 3), torch.full((2, 3), math.nan)])
def test_a_basis_that_is_none_is_refused(basis: Tensor) -> None:
    with pytest.raises(FactoriseError, match="expected a finite basis of at most 3 rows"):
        pivot(basis)


def test_a_deficient_group_is_named() -> None:
    made = factors({"a": slice_of(5, 7, 0)}, 2, storage="pivoted")
    with pytest.raises(FactoriseError, match="group 'g': pivoting"):
        _ = replace(made, basis_RI=made.basis_RI * 0).pivoted


@pytest.mark.parametrize("storage", ["plain", "pivoted"])
@pytest.mark.parametrize("rank", [2, 4, 5])
@pytest.mark.parametrize("own", [0, 3])
def test_a_rank_that_the_weights_lack_is_filled_up(rank: int, own: int, storage: str) -> None:
    """A floor may ask for it; the basis has full rank, and what it computes is the weight."""
    one = slice_of(5, 7, 0)
    thin = replace(one, weight_OI=one.weight_OI[:, :own] @ one.weight_OI[:own])
    made = factors({"a": thin}, rank, storage=storage)
    assert int(torch.linalg.matrix_rank(made.basis_RI)) == rank
    if rank >= own:
        assert float((made.product("a") - thin.weight_OI).abs().max()) <= 1e-9
    assert (made.pivoted is not None) == (storage == "pivoted")
