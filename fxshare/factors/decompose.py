"""The decomposition of a group on its smaller side; one serves every rank.

Legend: I input features, O outputs of all members, R rank, N the smaller of I and O.

With ``A = R Rᵀ`` of the outputs and ``G = S Sᵀ`` of the inputs, any roots, the best ``Ŵ`` of rank r
under ``tr(A (W − Ŵ) G (W − Ŵ)ᵀ)`` has two forms with the same eigenvalues Λ, whose tails are what
is lost:

* on the inputs: ``Sᵀ (Σ W_iᵀ A_i W_i) S = V Λ Vᵀ``, ``B = V_rᵀ S⁻¹``, ``C_i = W_i S V_r``. A needs
  no root and is gone from the coefficients.
* on the outputs: ``Rᵀ W G Wᵀ R = U Λ Uᵀ``, ``B = U_rᵀ Rᵀ W``, ``C_i = R_i⁻ᵀ U_i``. G needs no root.

Squaring costs singular values below 1e-8 of the largest, far below anything worth storing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxshare.factors.damping import Damping
from fxshare.factors.factorise import Factors, balance
from fxshare.factors.metric import OutputRoot, SliceStatistics
from fxshare.factors.triangles import add_lower_product, congruent

# rows of a weight that are taken to float64 at a time: a vocabulary's are gigabytes
_ROWS = 4096


@dataclass(frozen=True, eq=False)
class InputSide:
    """A group decomposed over its inputs. ``product_II`` is the members' ``Σ W_iᵀ A_i W_i``."""

    members: Sequence[SliceStatistics]
    pooled: Damping
    product_II: Tensor

    @property
    def features(self) -> int:
        """``I``."""
        return len(self.product_II)

    def matrix(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """What is decomposed, ``(I, I)``; only its lower triangle is meaningful."""
        product_II = self.product_II.to(dtype)
        if self.pooled.largest <= 0:
            return product_II
        return congruent(product_II, self.pooled.root.to(dtype))

    def whole(self, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
        """The basis and the coefficients of full rank: ``S S⁻¹ = 1`` up to rounding only."""
        basis_RI = torch.eye(self.features, dtype=dtype, device=self.product_II.device)
        return basis_RI, [one.weight_OI.to(dtype, copy=True) for one in self.members]

    def factors(self, leading_IR: Tensor, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
        """The basis and the coefficients of eigenvectors, products with weights in ``dtype``."""
        leading_IR = leading_IR.double()
        basis_RI, to_rank_IR = leading_IR.T, leading_IR
        if self.pooled.largest > 0:
            root_II = self.pooled.root
            basis_RI = torch.linalg.solve_triangular(root_II, basis_RI, upper=False, left=False)
            to_rank_IR = root_II @ leading_IR
        to_rank_IR = to_rank_IR.to(dtype)
        return basis_RI.to(dtype), [_times(one.weight_OI, to_rank_IR) for one in self.members]


@dataclass(frozen=True, eq=False)
class OutputSide:
    """A group decomposed over its outputs. ``images`` are the members' ``W_i G``, where they are at
    hand; ``gram_II`` is not needed then."""

    members: Sequence[SliceStatistics]
    roots: Sequence[OutputRoot | None]
    gram_II: Tensor | None = None
    images: Sequence[Tensor] | None = None

    @property
    def features(self) -> int:
        """``I``."""
        return self.members[0].weight_OI.shape[1]

    def matrix(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """What is decomposed, ``(O, O)``; only its lower triangle is meaningful."""
        rooted_OI = self._rooted([one.weight_OI for one in self.members], dtype)
        if self.images is not None:
            image_OI = self._rooted(self.images, dtype)
        else:
            assert self.gram_II is not None
            image_OI = rooted_OI @ self.gram_II.to(dtype)
        size = len(rooted_OI)
        return add_lower_product(rooted_OI.new_zeros(size, size), rooted_OI.T, image_OI.T)

    def factors(self, leading_OR: Tensor, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
        """The basis and the coefficients of eigenvectors, products with weights in ``dtype``."""
        leading_OR = leading_OR.double()
        parts = torch.split(leading_OR, [len(one.weight_OI) for one in self.members])
        basis_RI = leading_OR.new_zeros(leading_OR.shape[1], self.features, dtype=dtype)
        coefficients = []
        for one, root, part_OR in zip(self.members, self.roots, parts, strict=True):
            # (R U)ᵀ W: cheaper than Uᵀ of all of Rᵀ W
            left_OR = part_OR if root is None else root.times(part_OR)
            basis_RI.addmm_(left_OR.T.to(dtype), one.weight_OI.to(dtype))
            undone_OR = part_OR.contiguous() if root is None else root.undo(part_OR)
            coefficients.append(undone_OR.to(dtype))
        return basis_RI, coefficients

    def _rooted(self, stacked: Iterable[Tensor], dtype: torch.dtype) -> Tensor:
        """The stacked ``R_iᵀ W_i`` ``(O, I)``, or those of images of the weights."""
        both = ((x.to(dtype), root) for x, root in zip(stacked, self.roots, strict=True))
        return torch.cat([x if root is None else root.apply(x) for x, root in both])


Side = InputSide | OutputSide


def is_wide(members: Sequence[SliceStatistics]) -> bool:
    """Whether the outputs are a group's smaller side. Of several slices with as many outputs as
    inputs they are: each has a small root of its own, and the pooled moment needs none."""
    outputs, inputs = sum(len(one.weight_OI) for one in members), members[0].weight_OI.shape[1]
    return outputs < inputs or (outputs == inputs and len(members) > 1)


def weighted_product(one: SliceStatistics, added: float = 0.0) -> Tensor:
    """``Wᵀ (A + added) W`` ``(I, I)`` of a slice."""
    out, features = one.weight_OI.shape
    product_II, moment = one.product_II, one.moment_OO
    if product_II is not None and not added:
        return product_II
    device = one.weight_OI.device
    found = torch.zeros(features, features, dtype=torch.float64, device=device)
    whole = None if moment is None or moment.ndim == 1 else one.weight_OI.double()
    for first in range(0, out, _ROWS):
        rows = slice(first, min(first + _ROWS, out))
        weight_OI = one.weight_OI[rows].double()
        if product_II is not None:
            left_OI = added * weight_OI
        elif moment is None:
            left_OI = weight_OI
        elif whole is None:
            left_OI = moment[rows, None].double() * weight_OI
        else:
            left_OI = moment[rows].double() @ whole
        if added and product_II is None:
            left_OI = torch.add(left_OI, weight_OI, alpha=added)
        found.addmm_(left_OI.T, weight_OI)
    return found if product_II is None else found.add_(product_II)


def damped_product(one: SliceStatistics, relative_floor: float) -> Tensor:
    """``Wᵀ A W`` with a damped ``A``."""
    added = 0.0
    if one.is_projected:
        # what is added decides between directions that nothing takes: its size is free
        added = relative_floor * one.trace
    elif one.moment_OO is not None:
        added = Damping(one.moment_OO, relative_floor).floor
    return weighted_product(one, added)


def have_rank(members: Sequence[SliceStatistics], rank: int) -> bool:
    """Whether the stacked weights of slices have a rank."""
    stacked_OI = torch.cat([one.weight_OI.double() for one in members])
    return int(torch.linalg.matrix_rank(stacked_OI)) >= rank


def weighted_products(members: Sequence[SliceStatistics], dtype: torch.dtype) -> Tensor:
    """``Σ Wᵀ A W`` ``(I, I)`` of slices. In float32 many small ones, as heads are, are multiplied
    together."""
    together = [one for one in members if dtype == torch.float32 and _is_small(one)]
    products = [weighted_product(x).to(dtype) for x in members if all(x is not y for y in together)]
    if together:
        weight_OI = torch.cat([one.weight_OI.to(dtype) for one in together])
        left_OI = torch.cat([_weighted(one, dtype) for one in together])
        products.append(left_OI.T @ weight_OI)
    return total(products)


def _is_small(one: SliceStatistics) -> bool:
    return not one.is_projected and len(one.weight_OI) <= _ROWS


def _weighted(one: SliceStatistics, dtype: torch.dtype) -> Tensor:
    """``A W``."""
    weight_OI, moment = one.weight_OI.to(dtype), one.moment_OO
    if moment is None:
        return weight_OI
    moment = moment.to(weight_OI)
    return moment[:, None] * weight_OI if moment.ndim == 1 else moment @ weight_OI


def total(products: Iterable[Tensor]) -> Tensor:
    """The sum; the products themselves stay as they are, and one alone is not copied."""
    found: Tensor | None = None
    own = False
    for one in products:
        if found is None:
            found = one
        else:
            found, own = (found.add_(one) if own else found + one), True
    assert found is not None
    return found


@dataclass(frozen=True, eq=False)
class Decomposition:
    """All eigenvectors of a group's smaller side, and what they give at any rank."""

    spectrum: Tensor
    """Squared singular values ``(N,)`` of the weighted stack, descending, in float64."""
    vectors: Tensor
    """``(N, N)``, the last one the leading one, in the dtype that it was decomposed in."""
    significant: int
    """How many eigenvalues are more than rounding: directions beyond are arbitrary."""

    def factors(
        self, side: Side, rank: int, dtype: torch.dtype = torch.float64, *, exact: bool = True
    ) -> Factors:
        """The best factors of that rank of the side that was decomposed. In float32 they are to
        judge a plan by: its products are no finer, and take half the time. Not ``exact``, the first
        rows of those of full rank are those of every other."""
        if exact and isinstance(side, InputSide) and rank == side.features:
            basis_RI, coefficients = side.whole(dtype)
        else:
            basis_RI, coefficients = side.factors(self.vectors[:, -rank:].flip(1), dtype)
        norm_R = torch.stack([c.pow(2).sum(0) for c in coefficients]).sum(0).sqrt()
        scale_R = balance(basis_RI, norm_R)
        return Factors(
            basis_RI=basis_RI * scale_R[:, None],
            coefficients=tuple(c / scale_R for c in coefficients),
            spectrum=self.spectrum,
            lost=float(self.spectrum[rank:].sum()),
            total=float(self.spectrum.sum()),
        )


def decompose(side: Side, dtype: torch.dtype = torch.float64) -> Decomposition:
    """Decompose a group, in float32 to price it and to judge a plan by."""
    values, vectors = torch.linalg.eigh(side.matrix(dtype))
    spectrum = values.flip(0).clamp(min=0).double()
    least = rounding(spectrum, dtype) if dtype == torch.float64 else 8 * _error(spectrum, dtype)
    return Decomposition(spectrum, vectors, int((spectrum > least).sum()))


def leading_values(matrix: Tensor, count: int, seed: int) -> Tensor:
    """The ``count`` leading Ritz values of a symmetric positive matrix, descending (Halko,
    Martinsson & Tropp 2011, subspace iteration)."""
    generator = torch.Generator().manual_seed(seed)
    width = min(count + 16, matrix.shape[0])
    block = torch.randn(matrix.shape[0], width, generator=generator, dtype=torch.float64)
    block = block.to(matrix.device)
    for _ in range(4):
        block, _ = torch.linalg.qr(matrix @ block)
    values: Tensor = torch.linalg.eigvalsh(block.T @ matrix @ block)
    return values.flip(0)[:count]


def rounding(spectrum: Tensor, dtype: torch.dtype = torch.float64) -> float:
    """What rounding leaves of a sum of eigenvalues that are 0, beside these."""
    size = len(spectrum)
    if dtype == torch.float64:
        return size * torch.finfo(dtype).eps * float(spectrum.sum())
    # such a bound is a loss to reckon with in float32: errors of products are independent, and add
    # up like a random walk, each of the size of the matrix' norm
    return 2 * math.sqrt(size) * _error(spectrum, dtype)


def _error(spectrum: Tensor, dtype: torch.dtype) -> float:
    """A rounding of the largest eigenvalue, which is about the error of every other one."""
    return torch.finfo(dtype).eps * float(spectrum[:1].sum())


def _times(weight_OI: Tensor, right_IR: Tensor) -> Tensor:
    found = right_IR.new_empty(len(weight_OI), right_IR.shape[1])
    for part, rows in zip(torch.split(found, _ROWS), torch.split(weight_OI, _ROWS), strict=True):
        torch.mm(rows.to(right_IR.dtype), right_IR, out=part)
    return found
