"""Pivoted storage of a basis: ``R`` of its columns become the identity.

Legend: I input features, R rank, J the kept inputs, T the table.

``C B x = C B_J (x[J] + T x[rest])`` with ``T = B_J⁻¹ B_rest`` ``(R, I − R)``: the same function in
``R (I + O) − R²`` numbers and ``R`` indices (PIFA, arXiv 2501.19090). It is as accurate as ``B_J``
is well conditioned, hence the columns that Gaussian elimination with partial pivoting picks, in
blocks of LAPACK's, then the swaps of strong rank-revealing QR (Gu & Eisenstat 1996) until no entry
of ``T`` exceeds the bound.
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
    kept, rest, table = _eliminated(basis)
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


def _eliminated(basis_RI: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The columns that Gaussian elimination with partial pivoting picks, the others, and the table.

    Of ``P Bᵀ = [L; M] U`` the table is ``(M L⁻¹)ᵀ``.
    """
    rank, features = basis_RI.shape
    factor_IR, pivots_R, _ = torch.linalg.lu_factor_ex(basis_RI.T.contiguous())
    sizes_R = factor_IR.diagonal().abs()
    # below this a column is what rounding left of one that the others span
    least = features * torch.finfo(torch.float64).eps * float(basis_RI.pow(2).sum(0).max().sqrt())
    if bool((sizes_R <= least).any()):
        found = int((sizes_R > least).sum())
        raise FactoriseError(
            f"pivoting: a basis of {rank} rows has rank {found} only; choose a lower rank"
        )
    order_I = list(range(features))
    for at, other in enumerate((pivots_R - 1).tolist()):
        order_I[at], order_I[other] = order_I[other], order_I[at]
    order = torch.tensor(order_I, device=basis_RI.device)
    table_RT = torch.linalg.solve_triangular(
        factor_IR[:rank].T, factor_IR[rank:].T, upper=True, unitriangular=True
    )
    return order[:rank], order[rank:], table_RT
