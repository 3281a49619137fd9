"""Factors of equal size on both sides, with the same product.

Legend: O stacked outputs, I input features, R rank.

``C B = U Σ Vᵀ`` becomes ``(U √Σ)(√Σ Vᵀ)``: whitened factors differ in scale by orders of magnitude,
and one learning rate for both sides then moves one of them only. Of the pairs with this product the
balanced one has the least ``‖C‖² + ‖B‖²``, and gradient descent keeps it balanced (Arora, Cohen &
Hazan, ICML 2018). A pivoted basis has an identity in it, which leaves no such choice.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fxshare.refining.parameters import Group


def balanced(coefficient_OR: Tensor, basis_RI: Tensor) -> tuple[Tensor, Tensor]:
    """Both factors in float64; as they are where there are fewer outputs or inputs than the rank,
    so that some directions of it hold nothing."""
    coefficient, basis = coefficient_OR.detach().double(), basis_RI.detach().double()
    if min(len(coefficient), basis.shape[1]) < len(basis):
        return coefficient, basis
    left_OR, inner_RR = torch.linalg.qr(coefficient)
    right_IR, outer_RR = torch.linalg.qr(basis.T)
    u_RR, sizes_R, vh_RR = torch.linalg.svd(inner_RR @ outer_RR.T)
    roots_R = sizes_R.sqrt()
    return left_OR @ (u_RR * roots_R), (roots_R[:, None] * vh_RR) @ right_IR.T


@torch.no_grad()
def balance(groups: tuple[Group, ...], values: Mapping[str, Tensor]) -> None:
    """Balance the factors of every plain group in place."""
    for group in groups:
        if group.pivoted or not _has_values(group, values):
            continue
        parts = [values[name] for name in group.coefficients]
        coefficient, basis = balanced(torch.cat(parts), values[group.basis])
        if not bool(basis.isfinite().all()):
            continue
        values[group.basis].copy_(basis)
        rows = torch.split(coefficient, [len(part) for part in parts])
        for part, made in zip(parts, rows, strict=True):
            part.copy_(made)


def _has_values(group: Group, values: Mapping[str, Tensor]) -> bool:
    names = (group.basis, *group.coefficients)
    return all(bool(values[name].isfinite().all()) for name in names)


__all__ = ["balance", "balanced"]
