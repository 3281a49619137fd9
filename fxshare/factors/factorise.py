"""One shared basis for several weights: whitened truncated SVD in closed form.

For weights ``W_i: (out_i, in)`` with one input statistic ``G = E[x xᵀ] = S Sᵀ``, the basis ``B``
and the coefficients ``C_i`` minimise, over all ``B`` of ``rank`` rows,

    Σ_i E‖(W_i − C_i B) x‖² = Σ_i ‖(W_i − C_i B) S‖_F²

Basis Sharing (arXiv 2410.03765) for several weights, SVD-LLM (arXiv 2403.07378) for one. Those take
the SVD of the stacked ``[W_1 S; W_2 S; ...]`` with a Cholesky factor S. Here G's eigenvalues are
raised to a floor first, since it is singular as a rule, and the SVD is replaced by an eigenproblem
on the smaller side: squaring costs singular values below 1e-8 of the largest, far below anything
worth storing.

Shape suffixes: I in, O out stacked over the members, R rank. All results are float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxshare.errors import FactoriseError
from fxshare.factors.damping import Damping
from fxshare.factors.triangles import add_lower_product, congruent, mirrored, times_lower


@dataclass(frozen=True)
class Whitening:
    """A root of the damped Gram: ``root_II @ root_IIᵀ = G``, eigenvalues at least ``floor``.

    The root is lower triangular: half the arithmetic of any other, and needs no inverse. It is
    None for the identity, which then costs nothing to apply.
    """

    features: int
    root_II: Tensor | None
    floor: float  # in the unit of the Gram's eigenvalues, 0.0 for the identity
    floored: int  # how many eigenvalues were raised to the floor
    largest: float  # the largest eigenvalue
    zero_gram: bool = False  # the Gram was all zero: identity, for want of any information


@dataclass(frozen=True)
class Factors:
    """``W_i ≈ coefficients[i] @ basis_RI``, best in the whitened norm at this rank.

    Row k of the basis and column k of the stacked coefficients have the same norm, as far as the
    k-th singular value is above 1e-7 of the largest; the largest entry by magnitude of every basis
    row is positive.
    """

    basis_RI: Tensor  # (rank, in)
    coefficients: tuple[Tensor, ...]  # each (out_i, rank)
    spectrum: Tensor  # (min(in, out),): squared singular values of the whitened stack, descending
    lost: float  # Σ_{k > rank} σ_k²
    total: float  # Σ_k σ_k²

    @property
    def weighted_error(self) -> float:
        """``lost / total``: the relative squared weighted error; 0.0 where the total is 0."""
        return self.lost / self.total if self.total > 0 else 0.0


def identity_whitening(features: int) -> Whitening:
    """Whitening for lack of calibration data: the factorisation is then a plain SVD."""
    return Whitening(features, None, floor=0.0, floored=0, largest=1.0)


@torch.no_grad()
def whiten(gram_II: Tensor, *, relative_floor: float = 1e-8) -> Whitening:
    """A root of ``gram_II: (in, in)`` after raising its eigenvalues to ``relative_floor · max``
    (see :mod:`fxshare.factors.damping`).

    An all-zero Gram gives the identity with ``zero_gram`` set. Raises FactoriseError where the Gram
    is not square or not finite, or the floor is not in (0, 1).
    """
    if not 0 < relative_floor < 1:
        raise FactoriseError(
            f"relative_floor: expected more than 0, less than 1, found {relative_floor}"
        )
    if gram_II.ndim != 2 or gram_II.shape[0] != gram_II.shape[1] or gram_II.numel() == 0:
        raise FactoriseError(f"Gram matrix: expected (in, in), found {tuple(gram_II.shape)}")
    gram_II = gram_II.detach().double()
    if not bool(gram_II.isfinite().all()):
        raise FactoriseError("Gram matrix: expected finite entries, found NaN or infinity")
    features = len(gram_II)
    # LAPACK reads one triangle only: average, so that rounding in the other one counts as well.
    gram_II = (gram_II + gram_II.T) / 2
    damping = Damping(gram_II, relative_floor)
    largest, floored = damping.largest, damping.floored
    if largest <= 0:
        return Whitening(features, None, 0.0, features, 0.0, zero_gram=True)
    return Whitening(features, damping.root, damping.floor, floored, largest)


def spectrum(weights: Sequence[Tensor], whitening: Whitening) -> Tensor:
    """Squared singular values ``(min(in, out),)`` of the stacked ``W_i S``, descending, float64.

    The sum of those after the r-th is the smallest possible squared weighted error at rank r, so
    one call prices every rank. Raises FactoriseError like :func:`factorise`.
    """
    with torch.no_grad():
        members = _checked(weights, whitening)
        eigenvalues: Tensor = torch.linalg.eigvalsh(_smaller_gram(members, whitening))
        return eigenvalues.flip(0).clamp(min=0)


@torch.no_grad()
def factorise(weights: Sequence[Tensor], whitening: Whitening, rank: int) -> Factors:
    """The best basis of ``rank`` rows for ``weights`` (each ``(out_i, in)``) under ``whitening``.

    At ``rank = min(in, out)`` the products equal the weights to rounding, also for a singular Gram.
    The results are on the first weight's device. Raises FactoriseError where the rank is not an int
    from 1 to ``min(in, out)``, or a weight is not a finite matrix of the whitening's width.
    """
    members = _checked(weights, whitening)
    features, out = whitening.features, sum(len(weight_OI) for weight_OI in members)
    limit = min(features, out)
    if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= limit:
        raise FactoriseError(
            f"rank of {len(members)} weights, in {features}, out {out}: expected an int from 1 to "
            f"{limit}, found {rank!r}"
        )
    eigenvalues, vectors = torch.linalg.eigh(_smaller_gram(members, whitening))
    squared = eigenvalues.flip(0).clamp(min=0)
    leading = vectors[:, -rank:].flip(1)
    # The norm of a singular vector times its singular value. Its square is rounded to 1e-16 of the
    # largest, and the floor keeps a singular value that drowned in this from a division by zero.
    norm_R = squared[:rank].clamp(min=1e-14 * float(squared[0])).sqrt()
    if out <= features:
        # Left singular vectors: B = U_rᵀ W needs no inverse root, and is exact at full rank.
        basis_RI = leading.T @ torch.cat(members)
        scale_R = balance(basis_RI, torch.ones_like(norm_R))
        parts = (leading / scale_R).split([len(weight_OI) for weight_OI in members])
        coefficients = [part_OR.contiguous() for part_OR in parts]
    elif rank == features:
        # L L⁻¹ = 1 up to rounding only.
        basis_RI = torch.eye(features, dtype=torch.float64, device=members[0].device)
        scale_R = balance(basis_RI, torch.cat(members).norm(dim=0))
        coefficients = [weight_OI / scale_R for weight_OI in members]
    else:
        root_II = _root_on(whitening, leading.device)
        to_rank_IR, basis_RI = leading, leading.T
        if root_II is not None:
            to_rank_IR = root_II @ leading
            basis_RI = torch.linalg.solve_triangular(root_II, basis_RI, upper=False, left=False)
        scale_R = balance(basis_RI, norm_R)
        to_rank_IR = to_rank_IR / scale_R
        coefficients = [weight_OI @ to_rank_IR for weight_OI in members]

    return Factors(
        basis_RI=basis_RI * scale_R[:, None],
        coefficients=tuple(coefficients),
        spectrum=squared,
        lost=float(squared[rank:].sum()),
        total=float(squared.sum()),
    )


def balance(basis_RI: Tensor, coefficient_norm_R: Tensor) -> Tensor:
    """Factors (R,) for the basis rows that make norms equal and signs definite; never zero."""
    basis_norm_R = basis_RI.norm(dim=1)
    usable_R = (basis_norm_R > 0) & (coefficient_norm_R > 0)
    scale_R = torch.where(usable_R, (coefficient_norm_R / basis_norm_R).sqrt(), 1.0)
    largest_R = basis_RI.gather(1, basis_RI.abs().argmax(dim=1, keepdim=True)).squeeze(1)
    return torch.where(largest_R < 0, -scale_R, scale_R)


def _smaller_gram(members: Sequence[Tensor], whitening: Whitening) -> Tensor:
    """``X Xᵀ: (O, O)`` or ``Xᵀ X: (I, I)`` of the whitened stack X, whichever is smaller.

    Only its lower triangle is meaningful: torch's eigensolvers read no more.
    """
    root_II = _root_on(whitening, members[0].device)
    out, features = sum(len(weight_OI) for weight_OI in members), whitening.features
    if out <= features:
        stack_OI = torch.cat(list(members))
        whitened_IO = (stack_OI if root_II is None else times_lower(stack_OI, root_II)).T
        return add_lower_product(stack_OI.new_zeros(out, out), whitened_IO, whitened_IO)
    sum_II = members[0].new_zeros(features, features)
    for weight_OI in members:
        add_lower_product(sum_II, weight_OI, weight_OI)
    if root_II is None:
        return sum_II
    # Whitening after the sum over members costs in³ per side instead of out · in².
    return congruent(mirrored(sum_II), root_II)


def _root_on(whitening: Whitening, device: torch.device) -> Tensor | None:
    return None if whitening.root_II is None else whitening.root_II.to(device)


def _checked(weights: Sequence[Tensor], whitening: Whitening) -> list[Tensor]:
    """The weights as float64 on one device; FactoriseError names the first unusable one."""
    if not weights:
        raise FactoriseError("expected at least 1 weight to factorise, found none")
    device = weights[0].device
    members = []
    for index, weight_OI in enumerate(weights):
        subject = f"weight {index} of {len(weights)}"
        if weight_OI.ndim != 2 or weight_OI.shape[1] != whitening.features or len(weight_OI) == 0:
            raise FactoriseError(
                f"{subject}: expected (out, {whitening.features}) as the whitening has, found "
                f"{tuple(weight_OI.shape)}; only weights of one input width share a basis"
            )
        members.append(weight_OI.detach().to(device, torch.float64))
        # A sum, because isfinite() of every entry took longer than the eigenproblem's products.
        if not bool(members[-1].sum().isfinite()):
            raise FactoriseError(f"{subject}: expected finite entries, found NaN or infinity")
    return members
