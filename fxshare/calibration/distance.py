"""The distance to the dense model's output: the loss of models that predict no next token.

Per row r of an output (a token of ``(B, T, D)``, a sample of ``(B, D)``) it is
``½ ‖y_r − y⁰_r‖² / ‖y⁰_r‖²``, y⁰ the dense output; rows that the mask leaves out do not count. Its
gradient vanishes at the dense model, and its second derivative there is the Gauss-Newton matrix
``Jᵀ J`` of the normalised output (Schraudolph, Neural Computation 14, 2002, section 3). With v a
standard normal vector for each row, ``vᵀ J`` has that matrix as its second moment, so one backward
pass of the projection gives what one of a loss gives elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fxshare.base.numerics import float_leaves
from fxshare.capture.call import MASK, Call

DISTANCE = "distance to the dense output"
"""Its name in plans and reports."""


def output_rows(output: Any, call: Call) -> Iterator[Tensor]:
    """The rows ``(N, D)`` of every floating-point tensor of an output, without those that are
    masked; at least float32. A tensor without two dimensions is one row."""
    mask = call.get(MASK)
    for _, leaf in float_leaves(output):
        rows = leaf if leaf.dtype == torch.float64 else leaf.float()
        if rows.ndim > 2 and isinstance(mask, Tensor) and mask.shape == rows.shape[:2]:
            yield rows[mask.to(rows.device).bool()].flatten(1).reshape(-1, rows.shape[-1])
        elif rows.ndim >= 2:
            yield rows.reshape(-1, rows.shape[-1])
        else:
            yield rows.reshape(1, -1)


def projected(output: Any, call: Call, generator: torch.Generator | None) -> Tensor | None:
    """A random projection of the dense output, each row normalised, to differentiate; None where
    the output has no floating-point tensor."""
    found = []
    for rows_ND in output_rows(output, call):
        # on the CPU, where the generator is: the same seed draws the same everywhere
        v_ND = torch.randn(rows_ND.shape, generator=generator, dtype=rows_ND.dtype)
        found.append((rows_ND * v_ND.to(rows_ND.device) / _norms(rows_ND)).sum())
    return torch.stack(found).sum() if found else None


def distance(output: Any, dense: Sequence[Tensor], call: Call) -> float:
    """The distance summed over rows; ``dense`` are the :func:`output_rows` of the dense model."""
    total = 0.0
    for rows_ND, dense_ND in zip(output_rows(output, call), dense, strict=True):
        gap_ND = (rows_ND.double() - dense_ND.double()) / _norms(dense_ND).double()
        total += 0.5 * float(gap_ND.pow(2).sum())
    return total


def _norms(rows_ND: Tensor) -> Tensor:
    norms_N1: Tensor = rows_ND.detach().norm(dim=-1, keepdim=True)
    # a row of zeros has no direction; it counts like the smallest of the others
    least = norms_N1[norms_N1 > 0].min() if bool((norms_N1 > 0).any()) else norms_N1.new_ones(())
    return norms_N1.clamp(min=float(least))
