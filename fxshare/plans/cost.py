"""Exact integer costs of one group at every rank, under each way of storing it.

Letters: I input features, O stacked output width, R rank, M distinct inputs that read the basis.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fxshare.plans.storage import Ints, Storage


@dataclass(frozen=True)
class Shape:
    """What the cost of a group depends on, apart from its rank."""

    in_features: int
    out_features: int
    inputs: int = 1
    """Distinct inputs: each is multiplied with the basis once per token."""
    lookups: int = 0
    """Embeddings that look rows up: each multiplies one row with the basis per token."""
    idle: int = 0
    """Of the output width, rows that are looked up only and never multiplied."""

    @property
    def full_rank(self) -> int:
        """``min(I, O)``."""
        return min(self.in_features, self.out_features)

    @property
    def dense_numbers(self) -> int:
        """``I · O``."""
        return self.in_features * self.out_features

    @property
    def dense_flops(self) -> int:
        """Floating-point operations per token of the dense weights: 2 a weight, none for what is
        looked up only."""
        return 2 * self.in_features * (self.out_features - self.idle)


def numbers(shape: Shape, rank: Ints, storage: Storage) -> Ints:
    """Stored numbers, index entries included."""
    return storage.numbers(rank, shape.in_features, shape.out_features)


def weights_bytes(shape: Shape, rank: Ints, storage: Storage, element_size: int) -> Ints:
    """Bytes: numbers in the model's dtype, and index entries."""
    return storage.bytes(rank, shape.in_features, shape.out_features, itemsize=element_size)


def flops(shape: Shape, rank: Ints, storage: Storage) -> Ints:
    """Operations per token."""
    return storage.flops(
        rank,
        shape.in_features,
        shape.out_features,
        inputs=shape.inputs,
        lookups=shape.lookups,
        idle=shape.idle,
    )


def ranks(shape: Shape, multiple: int | None = None) -> Ints:
    """The ranks to choose from: multiples of ``multiple``, never above full rank.

    None chooses a step of full rank / 256 as a power of two: a finer choice of thousands of ranks
    changes the cost by less than the budget's tolerance.
    """
    if multiple is None:
        multiple = 1
        while shape.full_rank // multiple > 512:
            multiple *= 2
    return np.arange(min(multiple, shape.full_rank), shape.full_rank + 1, multiple, dtype=np.int64)
