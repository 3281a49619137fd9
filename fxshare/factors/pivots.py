"""Pivoted storage of a basis: ``R`` of its columns become the identity.

Legend: I input features, R rank, J the kept inputs, T the table.

``C B x = C B_J (x[J] + T x[rest])`` with ``T = B_J⁻¹ B_rest`` ``(R, I − R)``: the same function in
``R (I + O) − R²`` numbers and ``R`` indices (PIFA, arXiv 2501.19090). It is as accurate as ``B_J``
is well conditioned, hence column-pivoted QR, then the swaps of strong rank-revealing QR (Gu &
Eisenstat 1996) until no entry of ``T`` exceeds the bound.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fxshare.errors import FactoriseError
from fxshare.plans.storage import PIVOTED

BOUND = PIVOTED.bound


@dataclass(frozen=True, eq=False)
class Pivoted:
    """``B = B_J · (identity at kept, table_RT elsewhere)``."""

    kept_J: Tensor
    """Kept inputs, ascending, int64 ``(R,)``."""
    table_RT: Tensor
    """``B_J⁻¹ B_rest`` ``(R, I − R)``, float64, columns in ascending order of the other inputs."""
    block_RR: Tensor
    """``B_J`` ``(R, R)``: multiply coefficients with it from the right."""
    largest: float
    """The largest ``|T|``: a bad pivot shows there first."""
    swaps: int


def complement(kept_J: Tensor, features: int) -> Tensor:
    """The inputs that are not kept, ascending."""
    mask = torch.ones(features, dtype=torch.bool, device=kept_J.device)
    mask[kept_J.long()] = False
    return mask.nonzero().flatten()


@torch.no_grad()
def pivot(basis_RI: Tensor, *, bound: float = BOUND) -> Pivoted:
    """Choose the kept columns of a basis.

    Raises :class:`FactoriseError` when the basis has not full row rank or is not finite.
    """
    basis = basis_RI.double()
    rank, features = basis.shape
    if rank > features or not bool(basis.isfinite().all()):
        raise FactoriseError(
            f"pivoting: expected a finite basis of at most {features} rows, found {rank}"
        )
    # rows of unit norm: the choice must not depend on how the basis is scaled
    basis = basis / basis.norm(dim=1, keepdim=True).clamp(min=1e-300)
    kept = _pivoted_qr(basis)
    rest = complement(kept, features)
    table = _solve(basis, kept, rest)
    swaps = 0
    while rest.numel() and swaps < 4 * features:
        at = int(table.abs().argmax())
        i, j = divmod(at, table.shape[1])
        if float(table[i, j].abs()) <= bound:
            break
        # exchanging the two columns multiplies |det B_J| by |T_ij|: it ends
        row, column = table[i].clone(), table[:, j].clone()
        pivot_value = float(table[i, j])
        column[i] -= 1.0
        row[j] += 1.0
        table -= torch.outer(column, row) / pivot_value
        kept[i], rest[j] = rest[j].clone(), kept[i].clone()
        swaps += 1
    kept = kept.sort().values
    rest = complement(kept, features)
    table = _solve(basis, kept, rest)
    largest = float(table.abs().max()) if table.numel() else 0.0
    return Pivoted(kept, table, basis_RI.double()[:, kept], largest, swaps)


def _solve(basis_RI: Tensor, kept: Tensor, rest: Tensor) -> Tensor:
    try:
        solved: Tensor = torch.linalg.solve(basis_RI[:, kept], basis_RI[:, rest])
    except RuntimeError as error:
        raise FactoriseError(
            f"pivoting: the basis ({basis_RI.shape[0]} rows) has not full rank; choose a lower rank"
        ) from error
    return solved


def _pivoted_qr(basis_RI: Tensor) -> Tensor:
    """The columns that column-pivoted QR picks, in order."""
    work = basis_RI.clone()
    norms = work.pow(2).sum(0)
    rank, features = work.shape
    # below this a column is what rounding left of one that the others span
    largest = float(norms.max())
    least = features * torch.finfo(torch.float64).eps * largest**0.5
    chosen: list[int] = []
    for step in range(rank):
        j = int(norms.argmax())
        chosen.append(j)
        size = float(work[:, j].norm())
        if size <= least:
            raise FactoriseError(
                f"pivoting: a basis of {rank} rows has rank {step} only; choose a lower rank"
            )
        direction = work[:, j] / size
        along = direction @ work
        work -= torch.outer(direction, along)
        # downdated norms drift by cancellation: recomputed now and then, and where they are small
        norms = norms - along.pow(2)
        norms[chosen] = -1.0
        if step % 32 == 31 or float(norms.max()) < 1e-8 * largest:
            norms = work.pow(2).sum(0)
            norms[chosen] = -1.0
    return torch.tensor(chosen, device=basis_RI.device)
