"""Second moments of the gradients at the outputs of linears: ``A = E[δ δᵀ]`` per slice.

One backward pass over the calibration data, weights untouched: ``A`` is the output side of the
Kronecker-factored Fisher matrix (K-FAC, arXiv 1503.05671), and with it the loss increase of every
site is on one scale.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fxshare.calibration.gram import DiagonalAccumulator, GramAccumulator
from fxshare.calibration.projected import ProjectedAccumulator
from fxshare.sites.site import Site, SliceSpec

Moment = GramAccumulator | DiagonalAccumulator | ProjectedAccumulator
"""What sums up a slice's gradients: whole, its diagonal, or seen from the inputs."""
PROJECTED_ABOVE = 1024
"""Outputs of a slice above which ``Wᵀ A W`` is kept instead of ``A`` where that is smaller."""
DIAGONAL_ABOVE = 16384
"""Outputs of a slice above which only the diagonal of its moment is kept: half of a whole one is a
gigabyte here."""


def is_diagonal(site: Site, s: SliceSpec) -> bool:
    """Whether the moment of a slice is kept as its diagonal: rows that are tokens are many, and
    their gradients have little in common."""
    return bool(site.lookups) or s.out_features > DIAGONAL_ABOVE


def is_projected(site: Site, s: SliceSpec) -> bool:
    """Whether ``Wᵀ A W`` is kept of a slice and not ``A``: which of the two its errors are priced
    with (:mod:`fxshare.factors.decompose`) depends on the smaller side."""
    return s.out_features > max(site.in_features, PROJECTED_ABOVE) and not is_diagonal(site, s)


class GradientTap(nn.Module):
    """The identity; in the backward pass it adds the gradient's rows to one Gram per slice, or to
    its diagonal alone for the slices named in ``diagonal``; those in ``projected`` are seen through
    these weights ``(out, in)``. Products are summed up in ``dtype``."""

    def __init__(
        self,
        slices: Sequence[SliceSpec],
        diagonal: Container[str] = (),
        projected: Mapping[str, Tensor] | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        super().__init__()
        self.slices = tuple(slices)
        self.grams: dict[str, Moment] = {}
        for s in slices:
            if projected and s.name in projected:
                self.grams[s.name] = ProjectedAccumulator(projected[s.name], dtype)
            elif s.name in diagonal:
                self.grams[s.name] = DiagonalAccumulator(s.out_features)
            else:
                self.grams[s.name] = GramAccumulator(s.out_features, dtype=dtype)
        # what makes the tap part of the backward graph although every weight may be frozen
        self.probe = torch.zeros((), requires_grad=True)
        self.finite = True

    def forward(self, y: Tensor, mask: Tensor | None = None) -> Tensor:
        """``y`` ``(..., out)`` as it is; rows where ``mask`` ``(batch, sequence)`` is 0 are left
        out of the statistics."""
        if not torch.is_grad_enabled():
            return y
        rows = y.numel() // max(y.shape[-1], 1)
        keep = mask.bool() if mask is not None and mask.numel() == rows else None
        tapped: Tensor = _Tap.apply(y, self.probe.to(y.device), self, keep)  # type: ignore[no-untyped-call]
        return tapped

    def take(self, gradient: Tensor, keep: Tensor | None) -> None:
        """Add the rows of a gradient ``(..., out)``."""
        if not bool(torch.isfinite(gradient).all()):
            self.finite = False
            return
        for s in self.slices:
            self.grams[s.name].add(gradient[..., s.start : s.stop], keep)


class _Tap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, probe: Tensor, tap: GradientTap, keep: Any) -> Tensor:
        ctx.tap, ctx.keep = tap, keep
        # not a view: autograd refuses to write in place into the view of a custom function, and
        # `ReLU(inplace=True)` after a linear does
        return y.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (gradient,) = gradients
        ctx.tap.take(gradient.detach(), ctx.keep)
        return gradient, gradient.new_zeros(()), None, None
