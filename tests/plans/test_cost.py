"""Costs against tensors that are really there."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxshare.plans.cost import Shape, flops, numbers, ranks, weights_bytes
from fxshare.plans.storage import PIVOTED, PLAIN, STORAGES, Storage

shapes = st.builds(Shape, st.integers(1, 40), st.integers(1, 60), st.integers(1, 3))
storages = st.sampled_from(STORAGES)


def stored(shape: Shape, rank: int, storage: Storage, dtype: torch.dtype) -> list[torch.Tensor]:
    """The tensors of a group, with the stacked outputs as one coefficient."""
    coefficient = torch.empty(shape.out_features, rank, dtype=dtype)
    if storage == PLAIN:
        return [torch.empty(rank, shape.in_features, dtype=dtype), coefficient]
    table = torch.empty(rank, shape.in_features - rank, dtype=dtype)
    return [table, torch.empty(rank, dtype=torch.int32), coefficient]


@given(shapes, storages, st.sampled_from([torch.float64, torch.float32, torch.float16]), st.data())
@settings(deadline=None, max_examples=60)
def test_numbers_and_bytes_are_those_of_the_tensors(
    shape: Shape, storage: Storage, dtype: torch.dtype, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(1, shape.full_rank))
    tensors = stored(shape, rank, storage, dtype)
    at = np.array([rank])
    assert numbers(shape, at, storage).tolist() == [sum(t.numel() for t in tensors)]
    found = weights_bytes(shape, at, storage, dtype.itemsize)
    assert found.tolist() == [sum(t.numel() * t.element_size() for t in tensors)]
    assert found.dtype == np.int64


@given(shapes, storages, st.data())
@settings(deadline=None, max_examples=60)
def test_flops_are_two_a_stored_weight_and_use(
    shape: Shape, storage: Storage, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(1, shape.full_rank))
    basis, *_, coefficient = stored(shape, rank, storage, torch.float32)
    expected = 2 * (shape.inputs * basis.numel() + coefficient.numel())
    assert flops(shape, np.array([rank]), storage).tolist() == [expected]


@given(st.integers(1, 40), st.integers(1, 60))
@settings(deadline=None)
def test_pivoted_at_full_rank_is_dense_and_the_indices(features: int, out: int) -> None:
    shape = Shape(features, out)
    full = np.array([shape.full_rank])
    assert numbers(shape, full, PIVOTED) == shape.dense_numbers + shape.full_rank
    assert weights_bytes(shape, full, PIVOTED, 2) == 2 * shape.dense_numbers + 4 * shape.full_rank
    assert flops(shape, full, PIVOTED) == shape.dense_flops


@given(shapes)
@settings(deadline=None)
def test_pivoted_costs_rise_with_the_rank(shape: Shape) -> None:
    every = np.arange(1, shape.full_rank + 1)
    assert (np.diff(numbers(shape, every, PIVOTED)) > 0).all()


@pytest.mark.parametrize("multiple", [8, 16, 64])
@given(st.integers(64, 5000), st.integers(64, 5000))
@settings(deadline=None, max_examples=20)
def test_ranks_are_the_multiples_up_to_full_rank(multiple: int, features: int, out: int) -> None:
    found = ranks(Shape(features, out), multiple)
    assert found.tolist() == list(range(multiple, min(features, out) + 1, multiple))


@given(st.integers(1, 9000), st.integers(1, 9000))
@settings(deadline=None)
def test_ranks_are_few_and_reach_up_to_full_rank_by_default(features: int, out: int) -> None:
    found = ranks(Shape(features, out))
    step = int(found[0])
    assert step & (step - 1) == 0
    assert len(found) <= 512
    assert min(features, out) - step < found[-1] <= min(features, out)
    assert step == 1 or len(found) > 250


def test_a_finer_choice_than_five_hundred_and_twelve_ranks_is_halved() -> None:
    assert [len(ranks(Shape(size, 9000))) for size in (512, 513, 1024, 1026)] == [
        512,
        256,
        512,
        256,
    ]


def test_a_multiple_above_full_rank_leaves_full_rank() -> None:
    assert ranks(Shape(5, 9), 8).tolist() == [5]
    assert ranks(Shape(9, 8), 8).tolist() == [8]


@given(shapes, storages, st.integers(0, 2), st.data())
@settings(deadline=None, max_examples=30)
def test_rows_that_are_looked_up_only_are_not_multiplied(
    shape: Shape, storage: Storage, lookups: int, data: st.DataObject
) -> None:
    """A row that is looked up is multiplied by the whole basis, whatever the storage."""
    rank = data.draw(st.integers(1, shape.full_rank))
    idle = data.draw(st.integers(0, shape.out_features))
    used = replace(shape, lookups=lookups, idle=idle)
    basis, *_, coefficient = stored(shape, rank, storage, torch.float32)
    products = shape.inputs * basis.numel() + lookups * rank * shape.in_features
    expected = 2 * (products + coefficient[idle:].numel())
    assert flops(used, np.array([rank]), storage).tolist() == [expected]
    assert used.dense_flops == 2 * shape.in_features * (shape.out_features - idle)
