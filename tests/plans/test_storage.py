"""Each way of storing, against tensors that are really there."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxshare.errors import PlanError
from fxshare.factors.pivots import pivot
from fxshare.plans.storage import (
    PIVOTED,
    PLAIN,
    STORAGES,
    Storage,
    StorageName,
    storage_named,
    storages_of,
    usable,
)
from passes import PivotBasis, PivotedGroup

sizes = st.tuples(st.integers(1, 40), st.integers(1, 60))


def stored(storage: Storage, rank: int, width: int, out: int) -> list[torch.Tensor]:
    """Basis, coefficient, and the index where inputs are kept, of random factors in float64."""
    generator = torch.Generator().manual_seed(rank)
    basis_RI = torch.randn(rank, width, dtype=torch.float64, generator=generator)
    coefficient_OR = torch.randn(out, rank, dtype=torch.float64, generator=generator)
    if storage == PLAIN:
        return [basis_RI, coefficient_OR]
    one = pivot(basis_RI)
    return [one.table_RT, coefficient_OR @ one.block_RR, one.kept_J.to(torch.int32)]


@given(sizes, st.sampled_from(STORAGES), st.data())
@settings(deadline=None, max_examples=60)
def test_numbers_bytes_and_flops_are_those_of_the_tensors(
    size: tuple[int, int], storage: Storage, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(1, storage.largest_rank(*size)))
    tensors = stored(storage, rank, *size)
    assert storage.numbers(rank, *size) == sum(t.numel() for t in tensors)
    found = storage.bytes(rank, *size, itemsize=8)
    assert found == sum(t.numel() * t.element_size() for t in tensors)
    basis, coefficient = tensors[:2]
    assert storage.flops(rank, *size, inputs=3) == 2 * (3 * basis.numel() + coefficient.numel())


@pytest.mark.parametrize("storage", STORAGES, ids=lambda one: one.name)
def test_the_product_is_that_of_the_factors(storage: Storage) -> None:
    basis_RI, coefficient_OR = stored(PLAIN, 5, 12, 7)
    basis, coefficient, *kept = stored(storage, 5, 12, 7)
    found = storage.product(coefficient, basis, *kept)
    torch.testing.assert_close(found, coefficient_OR @ basis_RI, rtol=1e-12, atol=1e-12)


@given(sizes)
@settings(deadline=None)
def test_pivoted_at_full_rank_is_dense_and_the_indices(size: tuple[int, int]) -> None:
    full = PIVOTED.largest_rank(*size)
    assert PIVOTED.floats(full, *size) == size[0] * size[1]
    assert PIVOTED.numbers(full, *size) == size[0] * size[1] + full


@given(sizes, st.sampled_from(STORAGES))
@settings(deadline=None)
def test_break_even_is_the_last_rank_that_saves(size: tuple[int, int], storage: Storage) -> None:
    dense, rank = size[0] * size[1], storage.break_even_rank(*size)
    every = [r for r in range(1, min(size) + 1) if storage.numbers(r, *size) <= dense]
    assert every == list(range(1, rank + 1))
    if storage == PLAIN:
        assert rank == dense // sum(size)


@given(sizes, st.sampled_from(STORAGES), st.integers(0, 3000))
@settings(deadline=None)
def test_the_largest_rank_is_the_last_that_fits(
    size: tuple[int, int], storage: Storage, most: int
) -> None:
    every = [r for r in range(1, min(size) + 1) if storage.numbers(r, *size) <= most]
    assert storage.largest_rank(*size, numbers=most) == len(every)
    assert storage.largest_rank(*size) == min(size)


@given(sizes)
@settings(deadline=None)
def test_a_later_storage_stores_no_more_at_any_rank(size: tuple[int, int]) -> None:
    for rank in range(1, min(size) + 1):
        counts = [storage.numbers(rank, *size) for storage in STORAGES]
        assert counts == sorted(counts, reverse=True)


def test_names_are_those_of_plan_files_and_an_unknown_one_is_refused() -> None:
    assert tuple(storage.name for storage in STORAGES) == get_args(StorageName)
    assert all(storage_named(storage.name) is storage for storage in STORAGES)
    with pytest.raises(PlanError, match="storage: expected 'plain' or 'pivoted'; found 'zip'"):
        storage_named("zip")


def test_rows_that_are_looked_up_are_stored_plain() -> None:
    assert storages_of("auto") == STORAGES
    assert usable(STORAGES, looked_up=False) == STORAGES
    assert usable(STORAGES, looked_up=True) == (PLAIN,)
    assert usable(storages_of("pivoted"), looked_up=True) == (PLAIN,)


def test_a_table_above_the_bound_is_a_fault() -> None:
    table = stored(PIVOTED, 5, 12, 7)[0]
    assert PIVOTED.faults(table) == ()
    (said,) = PIVOTED.faults(table * 4 / table.abs().max())
    assert "the largest entry of the table of a pivoted basis is 4, expected at most 2" in said
    assert PLAIN.faults(table * 1000) == ()
    assert PIVOTED.faults(torch.tensor([[-2.0]])) == ()
    assert PIVOTED.faults(torch.tensor([[1.0, -2.001]]))
    assert PIVOTED.faults(torch.zeros(8, 0)) == ()  # at full rank nothing is left to multiply


def test_a_storage_names_its_passes() -> None:
    stored = [PivotedGroup("b", torch.zeros(0), torch.zeros(0, 0))]
    assert PLAIN.passes(stored) == () == PIVOTED.passes([])
    (found,) = PIVOTED.passes(stored)
    assert isinstance(found, PivotBasis)
    assert found.groups == tuple(stored)
