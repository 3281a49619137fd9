"""Roots of moments, singular or not, without their eigenvalues."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxshare.factors import damping
from fxshare.factors.damping import Damping, largest_eigenvalue
from fxshare.factors.kept import Kept
from tests.planning.build import gram


def falling(size: int, power: float, seed: int = 0) -> Tensor:
    """A moment with known eigenvalues, from 1 down to ``10^-power``."""
    generator = torch.Generator().manual_seed(seed)
    turn, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    return (turn * torch.logspace(0, -power, size, dtype=torch.float64)) @ turn.T


@pytest.mark.parametrize(("size", "power"), [(40, 3), (40, 11.5), (300, 3), (300, 11.5)])
@pytest.mark.parametrize("relative_floor", [1e-8, 1e-4])
def test_eigenvalues_are_raised_to_the_floor_where_one_is_below(
    size: int, power: float, relative_floor: float
) -> None:
    moment = falling(size, power)
    damping = Damping(moment, relative_floor)
    below = int((torch.logspace(0, -power, size, dtype=torch.float64) < relative_floor).sum())
    assert damping.floor == pytest.approx(relative_floor, rel=1e-6)
    assert damping.floored == below
    assert damping.singular == (below > 0)
    values, vectors = torch.linalg.eigh(moment)
    expected = (vectors * values.clamp(min=damping.floor)) @ vectors.T
    torch.testing.assert_close(damping.root @ damping.root.T, expected, rtol=0, atol=1e-14)
    assert not bool(damping.root.triu(1).any())


@given(st.integers(1, 12), st.integers(1, 30), st.integers(0, 1000))
@settings(deadline=None, max_examples=40)
def test_eigenvalues_below_the_floor_are_counted(size: int, tokens: int, seed: int) -> None:
    moment = gram(size, seed, tokens=tokens)
    damping = Damping(moment, 1e-6)
    values = torch.linalg.eigvalsh(moment)
    assert damping.floored == int((values < 1e-6 * values[-1]).sum())


@pytest.mark.parametrize("values", [[3.0, 2.0, 1.0], [3.0, 0.0, 1e-12]])
def test_a_diagonal_is_the_matrix_with_that_diagonal(values: list[float]) -> None:
    diagonal = torch.tensor(values, dtype=torch.float64)
    one, whole = Damping(diagonal, 1e-8), Damping(diagonal.diag(), 1e-8)
    assert (one.largest, one.floored) == (whole.largest, whole.floored)
    square = whole.root @ whole.root.T
    torch.testing.assert_close(one.root.square().diag(), square, rtol=1e-12, atol=1e-14)


def test_a_floor_below_rounding_still_has_a_root() -> None:
    moment = torch.ones(30, 30, dtype=torch.float64)
    root = Damping(moment, 1e-18).root
    torch.testing.assert_close(root @ root.T, moment, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["falling", "flat", "one direction", "zero", "identity"])
def test_the_largest_eigenvalue_of_many(kind: str) -> None:
    size = 400
    moment = {
        "falling": falling(size, 6),
        "flat": gram(size, 0, tokens=2000),
        "one direction": torch.ones(size, size).double(),
        "zero": torch.zeros(size, size).double(),
        "identity": torch.eye(size).double(),
    }[kind]
    exact = float(torch.linalg.eigvalsh(moment)[-1])
    found = largest_eigenvalue(moment)
    assert found <= exact * (1 + 1e-12) + 1e-12
    assert found >= exact * (1 - 1e-3)


def test_what_was_not_asked_for_longest_goes_first() -> None:
    made: list[str] = []
    kept: Kept[str] = Kept(100)

    def get(key: str, size: int) -> str:
        return kept.get(key, lambda: made.append(key) or key, size)

    for key in ("a", "b", "a", "c"):
        assert get(key, 40) == key
    assert made == ["a", "b", "c"]
    assert ("a" in kept, "b" in kept, "c" in kept) == (True, False, True)
    get("large", 1000)
    assert [key in kept for key in ("a", "c", "large")] == [False, False, True]
    get("large", 1000)
    assert made == ["a", "b", "c", "large"]


def test_what_was_cleared_keeps_a_share_from_then_on() -> None:
    kept: Kept[str] = Kept(100)
    for key in ("a", "b"):
        kept.get(key, lambda: "made", 40)
    kept.clear(0.5)
    assert not kept.has_room(51)
    assert kept.has_room(50)
    for key in ("a", "b"):
        kept.get(key, lambda: "made", 40)
    assert ("a" in kept, "b" in kept) == (False, True)
    kept.clear()
    assert "b" not in kept
    assert kept.has_room(50)


def test_what_stays_is_found_in_turn_where_the_last_one_kept_would_not_be() -> None:
    asked: list[int] = []

    def made(number: int) -> int:
        asked.append(number)
        return number

    counts = {}
    for stays in (False, True):
        kept: Kept[int] = Kept(30, stays=stays)
        asked.clear()
        for _ in range(4):
            assert [kept.get(n, lambda n=n: made(n), 10) for n in range(5)] == list(range(5))
        counts[stays] = len(asked)
        assert kept.found(99) is None
    assert counts == {False: 20, True: 5 + 3 * 2}
    assert kept.found(0) == 0


@pytest.mark.parametrize("below", [1, 3])
def test_few_eigenvalues_below_the_floor_are_raised_without_the_others(
    monkeypatch: pytest.MonkeyPatch, below: int
) -> None:
    """Behind a LayerNorm one eigenvalue is 0, and the vectors of the others are not computed."""
    size = damping._FEW + 44
    x = torch.randn(3 * size, size, generator=torch.Generator().manual_seed(0)).double()
    null = torch.linalg.qr(torch.randn(size, below, dtype=torch.float64))[0]
    x = x - x @ null @ null.T
    moment = x.T @ x / len(x)
    values, vectors = torch.linalg.eigh(moment)
    one = Damping(moment, 1e-6)
    expected = (vectors * values.clamp(min=one.floor)) @ vectors.T
    whole = torch.linalg.eigh

    def small(matrix: Tensor) -> object:
        assert len(matrix) < size
        return whole(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", small)
    assert one.floored == below
    off = (one.root @ one.root.T - expected).abs().max()
    assert off < 1e-3 * one.floor  # the floor itself is what a matrix left as it is would lack
    assert float((moment - expected).abs().max()) > 1e-3 * one.floor
