"""The factors of one planned group, refitted to each slice's own input moment."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from fxshare.errors import FactoriseError
from fxshare.factors.metric import SliceStatistics
from fxshare.factors.pivots import Pivoted, pivot
from fxshare.factors.spectra import Spectra
from fxshare.plans.plan import Group


@dataclass(eq=False)
class GroupFactors:
    """The factors of one group in float64: ``weight_i ≈ coefficients[i] @ basis_RI``."""

    group: Group
    basis_RI: Tensor
    coefficients: dict[str, Tensor]
    floored: int
    lost: float
    """Predicted loss increase, from the spectrum."""
    total: float
    floor: float = 0.0
    """What the whitening raised small eigenvalues to."""
    bias_shift: dict[str, Tensor] = field(default_factory=dict)

    @cached_property
    def pivoted(self) -> Pivoted | None:
        """The pivoted form of the basis where the group is stored so; made when first asked for,
        because most plans of a search are never stored."""
        if not self.group.stored_as.keeps_inputs:
            return None
        try:
            return pivot(self.basis_RI)
        except FactoriseError as error:
            raise FactoriseError(f"group {self.group.name!r}: {error}") from error

    def product(self, name: str) -> Tensor:
        """The weight that a slice is replaced by."""
        return self.coefficients[name] @ self.basis_RI


def factorise_group(
    group: Group,
    spectra: Spectra,
    *,
    refit: bool = True,
    bias: bool = True,
) -> GroupFactors:
    """Factorise one planned group in the metric it was priced in.

    Minimises ``½ Σ_i tr(A_i (W_i − C_i B) G (W_i − C_i B)ᵀ)``; with ``refit`` each slice's
    coefficient is then fitted to its own Gram, ``C_i = W_i G_i Bᵀ (B G_i Bᵀ)⁻¹``, which never
    raises its error; with ``bias`` the mean of what is lost is returned as a shift of the bias.
    """
    names = group.slices
    whitening = spectra.whitening(tuple(sorted(names)))
    try:
        factors = spectra.factors(names, group.rank)
    except FactoriseError as error:
        raise FactoriseError(f"group {group.name!r}: {error}") from error
    coefficients = {}
    for name, coefficient in zip(names, factors.coefficients, strict=True):
        root = spectra.root(name)
        coefficients[name] = coefficient if root is None else root.undo(coefficient)
    made = GroupFactors(
        group,
        factors.basis_RI,
        coefficients,
        whitening.floored,
        0.5 * factors.lost,
        0.5 * factors.total,
        whitening.floor,
    )
    if refit:
        return refitted(made, spectra, bias=bias)
    return replace(made, bias_shift=_shifts(made, spectra)) if bias else made


def quadratic_loss(one: SliceStatistics, product_OI: Tensor) -> float:
    """``½ tr(A (W − Ŵ) G (W − Ŵ)ᵀ)`` of one slice under its own statistics."""
    gap = one.weight_OI.double() - product_OI
    left = one.times_moment(gap)
    return 0.5 * float((left @ one.gram_II.double() * gap).sum())


def refitted(factors: GroupFactors, spectra: Spectra, *, bias: bool = True) -> GroupFactors:
    """The factors with every coefficient fitted to its own slice's Gram."""
    coefficients = {
        name: _refit(spectra.slices[name], factors.basis_RI, coefficient, factors.floor)
        for name, coefficient in factors.coefficients.items()
    }
    made = replace(factors, coefficients=coefficients, bias_shift={})
    return replace(made, bias_shift=_shifts(made, spectra)) if bias else made


def _shifts(factors: GroupFactors, spectra: Spectra) -> dict[str, Tensor]:
    shifts = {}
    for name in factors.coefficients:
        one = spectra.slices[name]
        if one.mean_I is not None:
            shifts[name] = (one.weight_OI.double() - factors.product(name)) @ one.mean_I
    return shifts


def _refit(one: SliceStatistics, basis_RI: Tensor, coefficient: Tensor, floor: float) -> Tensor:
    gram = one.gram_II.double()
    projected = basis_RI @ gram
    inner = projected @ basis_RI.T
    # the damping that the whitening had, so that a singular Gram refits to where it started
    inner = inner + floor * (basis_RI @ basis_RI.T)
    right = one.weight_OI.double() @ (projected.T + floor * basis_RI.T)
    solved, info = torch.linalg.solve_ex(inner, right.T)
    refitted: Tensor = solved.T
    if int(info) or not bool(refitted.isfinite().all()):
        return coefficient
    return refitted
