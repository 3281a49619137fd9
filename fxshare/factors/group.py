"""The factors of one planned group, refitted to each slice's own input moment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from fxshare.base.lazily import Once
from fxshare.base.quantised import Quantised
from fxshare.base.spent import part
from fxshare.errors import FactoriseError
from fxshare.factors.metric import SliceStatistics
from fxshare.factors.pivots import Pivoted, pivot
from fxshare.factors.spectra import Spectra
from fxshare.plans.plan import Group


@dataclass(eq=False)
class GroupFactors:
    """The factors of one group: ``weight_i ≈ coefficients[i] @ basis_RI``, in float64, or
    in float32 to judge a plan by."""

    group: Group
    basis_RI: Tensor
    coefficients: Mapping[str, Tensor]
    lost: float
    """Predicted loss increase, from the spectrum."""
    total: float
    spectra: Spectra
    """What the group was factorised in."""
    bias_shift: Mapping[str, Tensor] = field(default_factory=dict)
    quantised: dict[str, Quantised] = field(default_factory=dict)
    """What is stored where the group has few bits: its basis by the empty name, its coefficients by
    their slices'."""
    kept_form: Pivoted | None = None
    """The pivoted form of a basis that is quantised in it."""

    @cached_property
    def floored(self) -> int:
        """How many eigenvalues of the inputs' moment are below the floor; counted when first asked
        for, because most plans of a search are never reported."""
        return self.spectra.pooled(self.group.slices).floored

    @cached_property
    def pivoted(self) -> Pivoted | None:
        """The pivoted form of the basis where the group is stored so; made when first asked for,
        because most plans of a search are never stored."""
        if not self.group.stored_as.keeps_inputs:
            return None
        if self.kept_form is not None:
            return self.kept_form
        try:
            return pivot(self.basis_RI)
        except FactoriseError as error:
            raise FactoriseError(f"group {self.group.name!r}: {error}") from error

    def product(self, name: str, dtype: torch.dtype = torch.float64) -> Tensor:
        """The weight that a slice is replaced by, multiplied out in ``dtype``."""
        return self.coefficients[name].to(dtype) @ self.basis_RI.to(dtype)


@part("factorise groups")
def factorise_group(
    group: Group,
    spectra: Spectra,
    *,
    refit: bool = True,
    bias: bool = True,
    dtype: torch.dtype = torch.float64,
) -> GroupFactors:
    """Factorise one planned group in the metric it was priced in.

    Minimises ``½ Σ_i tr(A_i (W_i − C_i B) G (W_i − C_i B)ᵀ)``; with ``refit`` each slice's
    coefficient is then fitted to its own Gram, ``C_i = W_i G_i Bᵀ (B G_i Bᵀ)⁻¹``, which never
    raises its error; with ``bias`` the mean of what is lost is returned as a shift of the bias.
    """
    names = group.slices
    try:
        factors = spectra.factors(names, group.rank, dtype)
    except FactoriseError as error:
        raise FactoriseError(f"group {group.name!r}: {error}") from error
    made = GroupFactors(
        group,
        factors.basis_RI,
        dict(zip(names, factors.coefficients, strict=True)),
        0.5 * factors.lost,
        0.5 * factors.total,
        spectra,
    )
    if refit:
        return refitted(made, bias=bias)
    return replace(made, bias_shift=shifts_of(made)) if bias else made


def refitted(factors: GroupFactors, *, bias: bool = True) -> GroupFactors:
    """The factors with every coefficient fitted to its own slice's Gram, when it is asked for. With
    one input there is nothing to do: that is what they are factorised in."""
    spectra = factors.spectra
    members = {name: spectra.slices[name] for name in factors.coefficients}
    made = replace(factors, bias_shift={})
    if len({one.input for one in members.values()}) > 1:
        # the damping that the decomposition may have had, so that a singular Gram refits to where
        # it started
        floor = spectra.pooled(factors.group.slices).floor

        def fitted(name: str) -> Tensor:
            return fitted_to(members[name], factors.basis_RI, factors.coefficients[name], floor)

        made.coefficients = Once(tuple(members), fitted)
    return replace(made, bias_shift=shifts_of(made)) if bias else made


def shifts_of(factors: GroupFactors) -> Mapping[str, Tensor]:
    """What the biases take up: the means of what is lost."""
    slices = factors.spectra.slices

    def shift(name: str) -> Tensor:
        mean_I = slices[name].mean_I
        assert mean_I is not None
        kept_R = factors.basis_RI @ mean_I.to(factors.basis_RI)
        return slices[name].image_of_mean - (factors.coefficients[name] @ kept_R).double()

    return Once(tuple(n for n in factors.coefficients if slices[n].mean_I is not None), shift)


@part("refit")
def fitted_to(one: SliceStatistics, basis_RI: Tensor, coefficient: Tensor, floor: float) -> Tensor:
    """The coefficient of a slice that loses least with a basis; the given one where the basis is
    singular under the slice's inputs."""
    # what rounding to float32 loses, to judge a plan by, is squared in the loss
    projected_RI = torch.add(one.times_gram(basis_RI), basis_RI, alpha=floor)
    inner_RR = (projected_RI @ basis_RI.T).double()
    right_RO = projected_RI @ one.weight_OI.to(basis_RI).T
    root_RR, failed = torch.linalg.cholesky_ex(inner_RR)
    if failed:
        return coefficient
    refitted: Tensor = torch.cholesky_solve(right_RO.double(), root_RR).T.to(coefficient.dtype)
    return refitted if bool(refitted.isfinite().all()) else coefficient
