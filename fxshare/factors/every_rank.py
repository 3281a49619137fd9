"""The factors of groups at every rank at once, to judge plans by.

The eigenvectors of a group do not depend on the rank: the basis of rank r is the first r rows of
the one of full rank, and the coefficients of rank r are the first r columns. The plans of a search
differ in ranks more than in groups, so both are made once, and lie in a file, of which a plan reads
what it takes.

Legend: I input features, O outputs of all members, N the smaller of both, R rank, X = I + O.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fxshare.base.filed import Filed
from fxshare.factors.decompose import Decomposition, Side
from fxshare.factors.factorise import Factors


@dataclass(frozen=True, eq=False)
class EveryRank:
    """A group's factors at full rank, of which those beyond ``significant`` are arbitrary.

    ``rows(r)`` are the first r rows ``(R, X)``, in float32 or as a model of half precision stores
    them: row k is row k of the basis and column k of the stacked coefficients, of ``outputs`` a
    member.
    """

    rows: Callable[[int], Tensor]
    outputs: tuple[int, ...]
    spectrum: Tensor
    significant: int

    def factors(self, rank: int) -> Factors:
        """The factors of a rank, in float32."""
        rows_RX = self.rows(rank).float()
        features = rows_RX.shape[1] - sum(self.outputs)
        return Factors(
            basis_RI=rows_RX[:, :features],
            coefficients=tuple(
                c.T for c in torch.split(rows_RX[:, features:], list(self.outputs), 1)
            ),
            spectrum=self.spectrum,
            lost=float(self.spectrum[rank:].sum()),
            total=float(self.spectrum.sum()),
        )


def every_rank(
    whole: Decomposition, side: Side, filed: Filed, dtype: torch.dtype = torch.float32
) -> tuple[EveryRank, bool]:
    """All factors of a decomposed group, kept in a dtype, and whether they are in the file."""
    found = whole.factors(side, len(whole.spectrum), torch.float32, exact=False)
    rows_NX = torch.cat([found.basis_RI, *(c.T for c in found.coefficients)], dim=1).to(dtype)
    outputs = tuple(len(c) for c in found.coefficients)
    rows = filed.keep(rows_NX)

    def in_memory(count: int) -> Tensor:
        return rows_NX[:count]

    made = EveryRank(rows or in_memory, outputs, found.spectrum, whole.significant)
    return made, rows is not None


__all__ = ["EveryRank", "every_rank"]
