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

from collections.abc import Sequence
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

    def matrix(self) -> Tensor:
        """What is decomposed, ``(I, I)``; only its lower triangle is meaningful."""
        if self.pooled.largest <= 0:
            return self.product_II
        return congruent(self.product_II, self.pooled.root)

    def whole(self, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
        """The basis and the coefficients of full rank: ``S S⁻¹ = 1`` up to rounding only."""
        basis_RI = torch.eye(self.features, dtype=dtype, device=self.product_II.device)
        return basis_RI, [one.weight_OI.to(dtype, copy=True) for one in self.members]

    def factors(self, leading_IR: Tensor, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
        """The basis and the coefficients of eigenvectors, products with weights in ``dtype``."""
        basis_RI, to_rank_IR = leading_IR.T, leading_IR
        if self.pooled.largest > 0:
            root_II = self.pooled.root
            basis_RI = torch.linalg.solve_triangular(root_II, basis_RI, upper=False, left=False)
            to_rank_IR = root_II @ leading_IR
        to_rank_IR = to_rank_IR.to(dtype)
        return basis_RI.to(dtype), [_times(one.weight_OI, to_rank_IR) for one in self.members]


@dataclass(frozen=True, eq=False)
class OutputSide:
    """A group decomposed over its outputs. ``images`` are the members' ``R_iᵀ W_i G``, where they
    are at hand; ``gram_II`` is not needed then."""

    members: Sequence[SliceStatistics]
    roots: Sequence[OutputRoot | None]
    gram_II: Tensor | None = None
    images: Sequence[Tensor] | None = None

    @property
    def features(self) -> int:
        """``I``."""
        return self.members[0].weight_OI.shape[1]

    def matrix(self) -> Tensor:
        """What is decomposed, ``(O, O)``; only its lower triangle is meaningful."""
        rooted_OI = self._rooted()
        if self.images is not None:
            image_OI = torch.cat(list(self.images))
        else:
            assert self.gram_II is not None
            image_OI = rooted_OI @ self.gram_II
        size = len(rooted_OI)
        return add_lower_product(rooted_OI.new_zeros(size, size), rooted_OI.T, image_OI.T)

    def factors(self, leading_OR: Tensor, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
        """The basis and the coefficients of eigenvectors, products with weights in ``dtype``."""
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

    def _rooted(self) -> Tensor:
        """The stacked ``R_iᵀ W_i`` ``(O, I)``."""
        both = zip(self.members, self.roots, strict=True)
        weights = ((one.weight_OI.double(), root) for one, root in both)
        return torch.cat([w if root is None else root.apply(w) for w, root in weights])


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


@dataclass(frozen=True, eq=False)
class Decomposition:
    """All eigenvectors of a group's smaller side, and what they give at any rank."""

    spectrum: Tensor
    """Squared singular values ``(N,)`` of the weighted stack, descending."""
    vectors: Tensor
    """``(N, N)``, the last one the leading one."""
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


def decompose(side: Side) -> Decomposition:
    """Decompose a group."""
    values, vectors = torch.linalg.eigh(side.matrix())
    spectrum = values.flip(0).clamp(min=0)
    least = rounding(len(spectrum)) * float(spectrum.sum())
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


def rounding(size: int) -> float:
    """What rounding leaves of an eigenvalue that is 0, as a share of their sum."""
    return size * torch.finfo(torch.float64).eps


def _times(weight_OI: Tensor, right_IR: Tensor) -> Tensor:
    found = right_IR.new_empty(len(weight_OI), right_IR.shape[1])
    for part, rows in zip(torch.split(found, _ROWS), torch.split(weight_OI, _ROWS), strict=True):
        torch.mm(rows.to(right_IR.dtype), right_IR, out=part)
    return found
