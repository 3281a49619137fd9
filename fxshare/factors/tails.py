"""What a group loses at every rank, from the eigenvalues of its weighted stack."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fxshare.factors.decompose import rounding

_EPS = torch.finfo(torch.float64).eps


def tails_of(
    leading: Tensor, full: int, total: float | None = None, *, dtype: torch.dtype = torch.float64
) -> NDArray[np.float64]:
    """``½ Σ_{k>r} σ_k²`` for r = 0 .. full, descending to 0, of eigenvalues ``σ²``, descending,
    that were computed in ``dtype``. Where these are not all, ``total`` is the sum of all.

    In float32 the error is a few roundings of the largest, at every rank: the eigenvalues are added
    up in float64, so that those which are left out bring in no error of theirs.
    """
    leading = leading.double().clamp(min=0).cpu()
    values = leading.numpy()
    whole = float(values.sum()) if total is None else total
    tail = np.zeros(full + 1)
    tail[: len(values) + 1] = whole - np.concatenate([[0.0], np.cumsum(values)])
    # beyond a sketch the tail is not known: it stays at its last value, and is 0 at full rank
    tail[len(values) + 1 : full] = tail[len(values)]
    tail[full] = 0.0
    # what rounding leaves of the eigenvalues is no loss: a curve of it would make the planner
    # pay for ranks that the weights do not have
    tail[tail < (rounding(leading, dtype) if total is None else full * _EPS * total)] = 0.0
    found: NDArray[np.float64] = 0.5 * np.minimum.accumulate(tail)
    return found


def unsure_by(tails: NDArray[np.float64], dtype: torch.dtype) -> float:
    """By how much tails are uncertain of eigenvalues that were computed in ``dtype``: below it they
    are 0."""
    return 0.5 * rounding(torch.from_numpy(-2 * np.diff(tails)), dtype)


__all__ = ["tails_of", "unsure_by"]
