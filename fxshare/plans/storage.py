"""How a basis and its coefficients are stored: what it costs, and what it takes.

Letters: I input features, O stacked output width, R rank, B what the basis module multiplies by of
the I inputs, J the kept ones, T the others.

Everything that depends on the way of storing asks one of the objects here, so that another way is
another class and no search for a word.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fxshare.errors import PlanError
from passes import Pass, PivotBasis, PivotedGroup

StorageName = Literal["plain", "pivoted"]
"""The words of plan files."""
Ints = NDArray[np.int64]
Rank = TypeVar("Rank", int, Ints, NDArray[np.float64])
"""One rank, or several at once."""
_INDEX_BYTES = 4


class Storage(ABC):
    """One way to store a group: a basis of R rows, and a coefficient for each of its slices."""

    name: ClassVar[StorageName]
    keeps_inputs: ClassVar[bool]
    """Whether R of the inputs are kept as they are. The module then gathers its input, and has an
    index entry for each of them."""
    looks_rows_up: ClassVar[bool]
    """Whether a product of a row of a coefficient with the basis can be had without an input, as an
    embedding needs it."""

    @abstractmethod
    def basis_width(self, rank: Rank, in_features: int) -> Rank:
        """Columns of the basis module's weight: the inputs that are multiplied."""

    @abstractmethod
    def indices(self, rank: Rank) -> Rank:
        """Index entries."""

    def floats(self, rank: Rank, in_features: int, out_features: int) -> Rank:
        """Stored floating-point numbers."""
        return rank * (self.basis_width(rank, in_features) + out_features)

    def numbers(self, rank: Rank, in_features: int, out_features: int) -> Rank:
        """Stored numbers: floats and index entries."""
        return self.floats(rank, in_features, out_features) + self.indices(rank)

    def bytes(self, rank: Rank, in_features: int, out_features: int, *, itemsize: int) -> Rank:
        """Stored bytes: floats of ``itemsize``, index entries as 4-byte integers."""
        floats = self.floats(rank, in_features, out_features)
        return floats * itemsize + self.indices(rank) * _INDEX_BYTES

    def flops(
        self,
        rank: Rank,
        in_features: int,
        out_features: int,
        *,
        inputs: int = 1,
        lookups: int = 0,
        idle: int = 0,
    ) -> Rank:
        """Operations per token, 2 a multiply-add: the basis once per distinct input, whole once per
        lookup, every coefficient once but for its ``idle`` rows, which are looked up only."""
        products = inputs * self.basis_width(rank, in_features) + lookups * in_features
        return 2 * rank * (products + out_features - idle)

    def largest_rank(
        self, in_features: int, out_features: int, *, numbers: float | None = None
    ) -> int:
        """The largest rank there is, ``min(I, O)``, or that stores no more than ``numbers``; 0
        where rank 1 stores more."""
        full = min(in_features, out_features)
        if numbers is None:
            return full
        # numbers rise with the rank, see the tests
        return bisect_right(
            range(1, full + 1), numbers, key=lambda r: self.numbers(r, in_features, out_features)
        )

    def break_even_rank(self, in_features: int, out_features: int) -> int:
        """The largest rank that stores no more numbers than the dense ``I · O``."""
        dense = in_features * out_features
        return self.largest_rank(in_features, out_features, numbers=dense)

    @abstractmethod
    def whole_basis(self, basis_RB: Tensor, kept_J: Tensor | None = None) -> Tensor:
        """The basis ``(R, I)`` that the stored one stands for."""

    def product(
        self, coefficient_OR: Tensor, basis_RB: Tensor, kept_J: Tensor | None = None
    ) -> Tensor:
        """The weight ``(O, I)`` that a stored coefficient and basis stand for."""
        return coefficient_OR @ self.whole_basis(basis_RB, kept_J)

    def passes(self, stored: Sequence[PivotedGroup]) -> tuple[Pass, ...]:
        """What stores shared groups in this way, in a rewritten graph that has them whole."""
        return ()

    def faults(self, basis_RB: Tensor) -> tuple[str, ...]:
        """What is wrong with a stored basis, in sentences; it may still be used."""
        return ()


@dataclass(frozen=True)
class _Plain(Storage):
    """``C (B x)``: ``R (I + O)`` numbers."""

    name = "plain"
    keeps_inputs = False
    looks_rows_up = True

    def basis_width(self, rank: Rank, in_features: int) -> Rank:
        return rank * 0 + in_features

    def indices(self, rank: Rank) -> Rank:
        return rank * 0

    def whole_basis(self, basis_RB: Tensor, kept_J: Tensor | None = None) -> Tensor:
        return basis_RB


@dataclass(frozen=True)
class _Pivoted(Storage):
    """``C (x[J] + T x[rest])`` (PIFA, arXiv 2501.19090): ``R (I + O) − R²`` floats and R index
    entries for the same function."""

    name = "pivoted"
    keeps_inputs = True
    looks_rows_up = False

    bound: float = 2.0
    """What no entry of T should exceed: rounding of the inputs grows by as much."""

    def basis_width(self, rank: Rank, in_features: int) -> Rank:
        return in_features - rank

    def indices(self, rank: Rank) -> Rank:
        return rank

    def whole_basis(self, basis_RB: Tensor, kept_J: Tensor | None = None) -> Tensor:
        assert kept_J is not None, "pivoted storage has kept inputs"
        rank, kept = len(basis_RB), kept_J.long()
        whole = basis_RB.new_zeros(rank, rank + basis_RB.shape[1])
        others = torch.ones(whole.shape[1], dtype=torch.bool, device=kept.device)
        others[kept] = False
        whole[:, kept] = torch.eye(rank, dtype=whole.dtype, device=whole.device)
        whole[:, others] = basis_RB
        return whole

    def passes(self, stored: Sequence[PivotedGroup]) -> tuple[Pass, ...]:
        return (PivotBasis(groups=tuple(stored)),) if stored else ()

    def faults(self, basis_RB: Tensor) -> tuple[str, ...]:
        largest = float(basis_RB.abs().max()) if basis_RB.numel() else 0.0
        # the table is solved for anew once its columns are chosen, in float64
        if largest <= self.bound * (1 + 1e-6):
            return ()
        return (
            f"the largest entry of the table of a pivoted basis is {largest:.3g}, expected at most "
            f"{self.bound:g}: rounding of its inputs grows by it. Choose a lower rank, or planner: "
            "{storage: plain}",
        )


PLAIN: Storage = _Plain()
PIVOTED = _Pivoted()
STORAGES: tuple[Storage, ...] = (PLAIN, PIVOTED)
"""Every way of storing; of two, the later one never stores more numbers at the same rank."""


def storage_named(name: str) -> Storage:
    """The storage of a name; :class:`PlanError` says which there are."""
    for storage in STORAGES:
        if storage.name == name:
            return storage
    known = " or ".join(repr(storage.name) for storage in STORAGES)
    raise PlanError(f"storage: expected {known}; found {name!r}")


def storages_of(choice: Literal["auto"] | StorageName) -> tuple[Storage, ...]:
    """What the configuration's ``planner.storage`` leaves to choose from."""
    return STORAGES if choice == "auto" else (storage_named(choice),)


def usable(storages: Sequence[Storage], *, looked_up: bool) -> tuple[Storage, ...]:
    """Of these, what can store a group; where rows of it are looked up and none can, plain does."""
    if not looked_up:
        return tuple(storages)
    return tuple(one for one in storages if one.looks_rows_up) or (PLAIN,)
