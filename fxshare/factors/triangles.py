"""Products of which a triangle is known to be zero, or not needed: two thirds of the arithmetic."""

from __future__ import annotations

import torch
from torch import Tensor

# Columns a strip: 192 took two thirds of the whole product's time at 768 columns; 128 and 384 took
# longer.
_STRIP = 192


def times_lower(left_NI: Tensor, root_II: Tensor) -> Tensor:
    """``left @ root`` for a lower triangular root, without the products with its zeros."""
    result_NI = torch.empty_like(left_NI)
    for first in range(0, len(root_II), _STRIP):
        strip = slice(first, first + _STRIP)
        torch.mm(left_NI[:, first:], root_II[first:, strip], out=result_NI[:, strip])
    return result_NI


def add_lower_product(result_NN: Tensor, left_TN: Tensor, right_TN: Tensor) -> Tensor:
    """Adds the lower triangle (at least) of ``leftᵀ @ right``, known to be symmetric, in place."""
    for first in range(0, len(result_NN), _STRIP):
        strip = slice(first, first + _STRIP)
        result_NN[first:, strip].addmm_(left_TN[:, first:].T, right_TN[:, strip])
    return result_NN


def congruent(symmetric_II: Tensor, root_II: Tensor) -> Tensor:
    """The lower triangle (at least) of ``rootᵀ @ symmetric @ root`` for a lower triangular root."""
    half_II = times_lower(symmetric_II, root_II)
    return add_lower_product(torch.zeros_like(symmetric_II), root_II, half_II)


def inverse_of_lower(root_NN: Tensor) -> Tensor:
    """The inverse of a lower triangular root, by halves: a third of the arithmetic of solving for
    every column of the identity."""
    if len(root_NN) <= _STRIP:
        identity = torch.eye(len(root_NN), dtype=root_NN.dtype, device=root_NN.device)
        solved: Tensor = torch.linalg.solve_triangular(root_NN, identity, upper=False)
        return solved
    half = len(root_NN) // 2
    first, last = inverse_of_lower(root_NN[:half, :half]), inverse_of_lower(root_NN[half:, half:])
    result_NN = torch.zeros_like(root_NN)
    result_NN[:half, :half], result_NN[half:, half:] = first, last
    torch.mm(last @ root_NN[half:, :half], -first, out=result_NN[half:, :half])
    return result_NN


def mirrored(lower_NN: Tensor) -> Tensor:
    """The symmetric matrix of a lower triangle."""
    return lower_NN.tril() + lower_NN.tril(-1).T
