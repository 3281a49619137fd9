"""What error feedback asks of a moment: in which order columns are rounded, and how much of an
error each that is still to come makes up for.

With ``H = Uᵀ U`` the inverse of the damped moment, U upper triangular, row i of U says what an
error of column i asks of the columns after it when those before it are given (GPTQ, arXiv
2210.17323, section 3.3). U is the inverse of a triangular root of the moment, so that no inverse of
the whole moment is made.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fxshare.errors import FactoriseError
from fxshare.factors.triangles import inverse_of_lower

_DAMPING = 0.01
"""Of the mean of the moment's diagonal, added to it: the inverse of a singular one says little."""


@dataclass(frozen=True, eq=False)
class Elimination:
    """Of one moment ``(I, I)``: slices that read one input have it in common."""

    factor_II: Tensor
    """Upper triangular, of columns in ``order``; float64."""
    order: Tensor
    """The numbers ``(I,)`` of the columns, those first that count most."""

    @staticmethod
    def of(gram_II: Tensor) -> Elimination:
        """Of a moment.

        Raises :class:`FactoriseError` for one that is not finite.
        """
        if not bool(gram_II.isfinite().all()):
            raise FactoriseError(
                "bits: expected finite moments of the inputs, found NaN or infinity"
            )
        diagonal_I = gram_II.diagonal().double().clamp(min=0.0)
        order = diagonal_I.argsort(descending=True, stable=True)
        last_first = order.flip(0)  # the root of what is turned round is upper triangular
        damped = gram_II.double()[last_first][:, last_first]
        mean = float(diagonal_I.mean())
        share = _DAMPING
        while True:
            damped.diagonal().add_(share * mean if mean > 0 else 1.0)
            root, failed = torch.linalg.cholesky_ex(damped)
            if not failed:
                return Elimination(inverse_of_lower(root).flip(0, 1), order)
            share *= 10


__all__ = ["Elimination"]
