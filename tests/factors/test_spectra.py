"""Spectra: the loss of every rank, against the loss that factorising measures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxshare.errors import FactoriseError, FxShareWarning
from fxshare.factors.group import factorise_group
from fxshare.factors.metric import SliceStatistics, output_root
from fxshare.factors.spectra import Spectra
from fxshare.plans.plan import Group
from tests.planning.build import gram, quadratic, slice_of

FLOOR = 1e-8


def group(slices: dict[str, SliceStatistics], rank: int, storage: Any = "plain") -> Group:
    weights = [one.weight_OI for one in slices.values()]
    return Group(
        name="g",
        type="w",
        label="",
        layers=(0,),
        slices=tuple(slices),
        in_features=weights[0].shape[1],
        out_features=sum(map(len, weights)),
        rank=rank,
        storage=storage,
    )


def measured(slices: dict[str, SliceStatistics], rank: int) -> float:
    """The quadratic loss of the factorised group, each slice with its own statistics."""
    made = factorise_group(group(slices, rank), Spectra(slices), refit=False)
    return sum(quadratic(one, made.product(name)) for name, one in slices.items())


@given(st.integers(0, 1000), st.lists(st.integers(1, 9), min_size=1, max_size=3), st.booleans())
@settings(deadline=None, max_examples=25)
def test_tails_are_the_measured_quadratic_loss(seed: int, outs: list[int], aware: bool) -> None:
    given_: dict[str, Any] = {} if aware else {"moment_OO": None}
    slices = {str(i): slice_of(out, 7, seed + i, **given_) for i, out in enumerate(outs)}
    tails = Spectra(slices).tails(frozenset(slices))
    full = min(7, sum(outs))
    assert len(tails) == full + 1
    assert tails[full] == 0.0
    everything = sum(quadratic(one, 0 * one.weight_OI) for one in slices.values())
    assert tails[0] == pytest.approx(everything, rel=1e-12)
    for rank in range(1, full):
        assert tails[rank] == pytest.approx(measured(slices, rank), rel=1e-8)


def test_tails_fall_and_are_sharp() -> None:
    slices = {"a": slice_of(9, 7, 0), "b": slice_of(5, 7, 1)}
    tails = Spectra(slices).tails(frozenset(slices))
    assert (np.diff(tails) < 0).all()
    # the wrong Gram shows: the check of the tails is not vacuous
    other = {n: replace(one, gram_II=gram(7, 8)) for n, one in slices.items()}
    made = factorise_group(group(slices, 3), Spectra(slices), refit=False)
    lost = sum(quadratic(other[n], made.product(n)) for n in other)
    assert abs(lost / tails[3] - 1) > 1e-3


def test_what_a_group_is_made_of_adds_up() -> None:
    slices = {"a": slice_of(4, 7, 0), "b": slice_of(3, 7, 1)}
    root = torch.linalg.cholesky(slices["a"].gram_II)
    rows = [
        torch.linalg.cholesky(one.moment_OO).T @ one.weight_OI @ root for one in slices.values()
    ]
    spectrum = torch.linalg.svdvals(torch.cat(rows)) ** 2
    expected = 0.5 * spectrum.flip(0).cumsum(0).flip(0)
    assert Spectra(slices).tails(frozenset(slices))[:-1] == pytest.approx(expected, rel=1e-10)


def test_the_gram_of_a_group_is_the_mean_over_its_inputs() -> None:
    first, second = gram(7, 1), gram(7, 2)
    a, b = slice_of(4, 7, 0, gram_II=first), slice_of(4, 7, 1, gram_II=first)
    c = slice_of(4, 7, 2, gram_II=second, input="y")
    pooled = (first + second) / 2
    slices = {"a": a, "b": b, "c": c}
    same = {n: replace(one, gram_II=pooled, input="z") for n, one in slices.items()}
    found = Spectra(slices).tails(frozenset("abc"))
    assert found == pytest.approx(Spectra(same).tails(frozenset("abc")), rel=1e-12)


# Singular statistics


def test_a_singular_gram_keeps_tails_and_measurement_together() -> None:
    slices = {str(i): slice_of(6, 8, i, gram_II=gram(8, 3, tokens=4)) for i in range(2)}
    tails = Spectra(slices).tails(frozenset(slices))
    for rank in range(1, 4):
        assert tails[rank] == pytest.approx(measured(slices, rank), rel=1e-5)
    # four tokens span four directions: from there on only the floor is left
    assert tails[4] < 1e-6 * tails[0]


def test_a_singular_moment_keeps_tails_and_measurement_together() -> None:
    slices = {str(i): slice_of(6, 8, i, moment_OO=gram(6, i, tokens=2)) for i in range(2)}
    tails = Spectra(slices).tails(frozenset(slices))
    for rank in range(1, 4):
        assert tails[rank] == pytest.approx(measured(slices, rank), rel=1e-4)
    assert (tails[4:] == 0).all(), "two moments of rank 2 each: rounding is no loss"
    root = output_root(slices["0"].moment_OO)
    assert root.floored == 4
    eye = torch.eye(6).double()
    assert root.times(eye).T @ root.undo(eye) == pytest.approx(eye, abs=1e-6)
    assert root.apply(eye).T @ root.apply(eye) == pytest.approx(slices["0"].moment_OO, abs=1e-12)


def test_a_weight_of_low_rank_loses_nothing_above_it() -> None:
    one = slice_of(9, 7, 0)
    thin = replace(one, weight_OI=one.weight_OI[:, :3] @ one.weight_OI[:3])
    tails = Spectra({"a": thin}).tails(frozenset("a"))
    assert (tails[3:] == 0).all()
    assert tails[2] > 0


@pytest.mark.parametrize(
    ("moment", "reason"), [(torch.zeros(3, 3), "all zero"), (torch.full((3, 3), torch.nan), "NaN")]
)
def test_a_moment_that_says_nothing_is_refused(moment: torch.Tensor, reason: str) -> None:
    with pytest.raises(FactoriseError, match=reason):
        output_root(moment)


def test_a_diagonal_moment_is_the_matrix_with_that_diagonal() -> None:
    """``(O,)`` is stored for outputs that are many: tails, factors and roots are the same."""
    one = slice_of(5, 7, 0, moment_OO=torch.linspace(0.5, 3.0, 5, dtype=torch.float64))
    diagonal, full = {"a": one}, {"a": replace(one, moment_OO=one.moment_OO.diag())}
    tails = [Spectra(slices).tails(frozenset("a")) for slices in (diagonal, full)]
    assert tails[0] == pytest.approx(tails[1], rel=1e-10)
    products = [
        factorise_group(group(slices, 3), Spectra(slices), refit=False).product("a")
        for slices in (diagonal, full)
    ]
    torch.testing.assert_close(*products, rtol=1e-8, atol=1e-10)
    weight = one.weight_OI
    for make in ("times", "undo"):
        ours, theirs = (
            getattr(output_root(slices["a"].moment_OO), make)(weight) for slices in (diagonal, full)
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


# Cache and sketch


def test_a_second_time_is_read_from_the_cache(tmp_path: Path) -> None:
    slices = {"a": slice_of(4, 7, 0), "b": slice_of(5, 7, 1)}
    first, second = (Spectra(dict(slices), cache=tmp_path / "spectra") for _ in range(2))
    found = first.tails(frozenset("ab"))
    assert (first.computed, second.computed) == (1, 0)
    assert second.tails(frozenset("ab")).tolist() == found.tolist()
    assert second.computed == 0
    second.tails(frozenset("a"))
    assert second.computed == 1


@pytest.mark.parametrize("change", ["weight_OI", "gram_II", "moment_OO", "none", "input"])
def test_a_change_of_content_is_not_read_from_the_cache(tmp_path: Path, change: str) -> None:
    slices = {n: slice_of(4, 4, i) for i, n in enumerate("abc")}
    Spectra(slices, cache=tmp_path).tails(frozenset("abc"))
    one = slices["b"]
    if change == "none":
        other = replace(one, moment_OO=None)
    elif change == "input":
        # a third of the pooled Gram where it was half: numbers equal, their mean not
        other = replace(one, input="y")
    else:
        tensor = getattr(one, change).clone()
        tensor[0, 0] += 1e-9
        other = replace(one, **{change: tensor})
    changed = Spectra({**slices, "b": other}, cache=tmp_path)
    changed.tails(frozenset("abc"))
    assert changed.computed == 1
    again = Spectra(slices, cache=tmp_path, relative_floor=1e-6)
    again.tails(frozenset("abc"))
    assert again.computed == 1


def test_a_damaged_cache_is_not_there(tmp_path: Path) -> None:
    slices = {"a": slice_of(4, 7, 0), "b": slice_of(5, 7, 1)}
    expected = Spectra(slices, cache=tmp_path).tails(frozenset("ab")).tolist()
    Spectra(slices, cache=tmp_path).tails(frozenset("a"))
    one, other = sorted(tmp_path.iterdir())
    whole = one.read_bytes(), other.read_bytes()
    flipped = bytearray(whole[0])
    flipped[40] ^= 1
    for damaged in (b"", whole[0][:-8], whole[0][:10], bytes(flipped), b"\0" * 100, whole[1]):
        one.write_bytes(damaged)
        other.write_bytes(whole[0])  # an entry of another key is none either
        spectra = Spectra(slices, cache=tmp_path)
        assert spectra.tails(frozenset("ab")).tolist() == expected
        assert spectra.computed == 1
        # and it was made good
        assert Spectra(slices, cache=tmp_path).tails(frozenset("ab")).tolist() == expected


def test_a_cache_that_cannot_be_written_says_so_and_costs_time_only(tmp_path: Path) -> None:
    slices = {"a": slice_of(4, 7, 0)}
    (tmp_path / "file").write_text("in the way")
    spectra = Spectra(slices, cache=tmp_path / "file")
    with pytest.warns(FxShareWarning, match=r"nothing is kept.*cannot write"):
        found = spectra.tails(frozenset("a"))
    assert found.tolist() == Spectra(slices).tails(frozenset("a")).tolist()


@given(st.integers(0, 100))
@settings(deadline=None, max_examples=10)
def test_a_sketch_is_an_upper_bound_and_exact_at_small_ranks(seed: int) -> None:
    features = 60
    falling = 0.8 ** torch.arange(features, dtype=torch.float64)
    one = slice_of(70, features, seed)
    one = replace(one, weight_OI=one.weight_OI * falling, gram_II=torch.eye(features).double())
    exact = Spectra({"a": one}).tails(frozenset("a"))
    sketched = Spectra({"a": one}, sketch=12, seed=seed).tails(frozenset("a"))
    assert (sketched >= exact * (1 - 1e-12) - 1e-14 * exact[0]).all()
    assert (np.diff(sketched) <= 0).all()
    assert sketched[:13] == pytest.approx(exact[:13], rel=1e-6)
    assert (sketched[12:-1] == sketched[12]).all()
    assert sketched[-1] == 0.0


def test_a_sketch_of_half_the_ranks_or_more_is_no_sketch() -> None:
    """It would cost as much as all eigenvalues, which are exact."""
    slices = {"a": slice_of(12, 20, 3)}
    exact = Spectra(slices).tails(frozenset("a"))
    for sketch in (6, 7, 13):
        assert np.array_equal(Spectra(slices, sketch=sketch).tails(frozenset("a")), exact)
    assert not np.array_equal(Spectra(slices, sketch=5).tails(frozenset("a")), exact)
