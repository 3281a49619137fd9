"""Rounding a weight to few bits, with error feedback.

What rounding loses is priced like all else (:mod:`fxshare.factors.metric`): of codes that stand for
Ŵ it is ``½ tr(A (W − Ŵ) G (W − Ŵ)ᵀ)``. Scales are symmetric, one a row with 8 bits and one for 32
columns with 4 (of a few shrunk ones the best); the codes are nearest ones, or with feedback: a
column is rounded, and what that does to the outputs is made up for by the columns that are still to
come (GPTQ, arXiv 2210.17323: the column order by the moment's diagonal, lazy batches of updates).
Feedback takes A for a multiple of the identity; where A says that it did worse than the nearest
codes, those are kept.

Of a group the basis is rounded first, the coefficients are fitted to what it is then, and rounded
in the moment of what the basis computes.

Shape suffixes: I input features, O output features, R rank, G groups of columns, T the inputs that
a pivoted basis multiplies.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fxshare.base.quantised import GROUP, Quantised, group_of, scale_count, scale_dtype
from fxshare.base.spent import part
from fxshare.factors.elimination import Elimination
from fxshare.factors.group import GroupFactors, fitted_to, shifts_of
from fxshare.factors.metric import SliceStatistics
from fxshare.factors.pivots import Pivoted, complement

_ROWS = 4096
"""Rows that are rounded together: each by itself, so that what is read again stays in a cache."""
_AT_ONCE = 32
"""Columns up to which an error is subtracted from each of the others as soon as it is there."""
_SHRINK = (1.0, 0.95, 0.9, 7 / 8, 0.85, 0.8, 0.75, 0.7)
"""Of 15 codes the outer ones are few: a smaller scale may lose less, although it clips."""
_LIMITS = {8: (-127, 127), 4: (-8, 7)}


@torch.no_grad()
def scales_for(
    weight_OI: Tensor, bits: int, dtype: torch.dtype, importance_I: Tensor | None = None
) -> Tensor:
    """Scales ``(O, G)`` as they are stored for a weight of a dtype; ``importance_I`` says how much
    an error of each column counts."""
    low, high = _LIMITS[bits]
    if not weight_OI.numel():  # the table of a pivoted basis of full rank
        groups = scale_count(bits, 1, weight_OI.shape[1])
        return weight_OI.new_zeros(len(weight_OI), groups, dtype=scale_dtype(dtype, bits))
    importance = torch.ones_like(weight_OI[0]) if importance_I is None else importance_I
    found = []
    for columns in _groups(bits, weight_OI.shape[1]):
        part_OI, counts_I = weight_OI[:, columns], importance[columns].to(weight_OI)
        peak_O = part_OI.abs().amax(1, keepdim=True) / high
        best_O, least_O = None, None
        for share in _SHRINK if bits == 4 else (1.0,):
            scale_O = (peak_O * share).to(scale_dtype(dtype, bits)).to(weight_OI)
            gap_OI = part_OI - _codes(part_OI, scale_O, low, high) * scale_O
            lost_O = (gap_OI.square() * counts_I).sum(1, keepdim=True)
            if best_O is None or least_O is None:
                best_O, least_O = scale_O, lost_O
                continue
            better = lost_O < least_O
            best_O = torch.where(better, scale_O, best_O)
            least_O = torch.where(better, lost_O, least_O)
        assert best_O is not None
        found.append(best_O)
    return torch.cat(found, 1).to(scale_dtype(dtype, bits))


@part("round")
@torch.no_grad()
def nearest(
    weight_OI: Tensor, bits: int, dtype: torch.dtype, importance_I: Tensor | None = None
) -> Quantised:
    """The nearest codes to a weight, to be stored for a weight of a dtype."""
    scale_OG = scales_for(weight_OI, bits, dtype, importance_I)
    spread_OI = _spread(scale_OG, bits, weight_OI.shape[1]).to(weight_OI)
    codes = _codes(weight_OI, spread_OI, *_LIMITS[bits])
    return Quantised.of(codes.to(torch.int8), scale_OG, bits, dtype)


@part("round")
@torch.no_grad()
def with_feedback(
    weight_OI: Tensor,
    gram_II: Tensor,
    bits: int,
    dtype: torch.dtype,
    elimination: Elimination | None = None,
) -> Quantised:
    """Codes of a weight that make up for one another's errors under a moment of its inputs, whose
    ``elimination`` may be given; the arithmetic is done in the weight's dtype."""
    if not weight_OI.numel():
        return nearest(weight_OI, bits, dtype)
    found = elimination or Elimination.of(gram_II)
    scale_OG = scales_for(weight_OI, bits, dtype, gram_II.diagonal().clamp(min=0.0))
    fed = _Feedback(found.factor_II.to(weight_OI), found.order, bits)
    rows = zip(torch.split(weight_OI, _ROWS), torch.split(scale_OG, _ROWS), strict=True)
    codes_OI = torch.cat([fed.codes(*both) for both in rows])
    return Quantised.of(codes_OI, scale_OG, bits, dtype)


@dataclass(frozen=True, eq=False)
class _Feedback:
    """Columns are rounded one after the other, of matrices that have them as rows. What an error
    asks of others is subtracted at once from a few columns, and from all others in products: the
    lazy batches of GPTQ, by halves."""

    factor_II: Tensor
    order: Tensor
    bits: int

    def codes(self, weight_OI: Tensor, scale_OG: Tensor) -> Tensor:
        """The codes ``(O, I)`` int8 of some rows."""
        left_IO = weight_OI.t().index_select(0, self.order)
        codes_IO = torch.empty(left_IO.shape, dtype=torch.int8, device=left_IO.device)
        self._round(left_IO, codes_IO, scale_OG.t().to(left_IO).contiguous(), 0, len(left_IO))
        return codes_IO.index_select(0, self.order.argsort()).t().contiguous()

    def _round(
        self, left_IO: Tensor, codes_IO: Tensor, scale_GO: Tensor, first: int, last: int
    ) -> None:
        """Round some columns, whose errors then stand in their place."""
        if last - first > _AT_ONCE:
            middle = (first + last) // 2
            self._round(left_IO, codes_IO, scale_GO, first, middle)
            asked = self.factor_II[first:middle, middle:last].t()
            left_IO[middle:last].addmm_(asked, left_IO[first:middle], alpha=-1)
            self._round(left_IO, codes_IO, scale_GO, middle, last)
            return
        low, high = _LIMITS[self.bits]
        # a scale of zero is that of zeros
        divisor_GO = scale_GO.masked_fill(scale_GO == 0, math.inf)
        groups = (self.order[first:last] // group_of(self.bits, len(left_IO))).tolist()
        steps = self.factor_II[first:last, first:last]
        pivots = steps.diagonal().tolist()
        for at, (group, pivot) in enumerate(zip(groups, pivots, strict=True)):
            column = left_IO[first + at]
            code = (column / divisor_GO[group]).round_().clamp_(low, high)
            codes_IO[first + at] = code
            column.addcmul_(code, scale_GO[group], value=-1).div_(pivot)
            left_IO[first + at + 1 : last].addr_(steps[at, at + 1 :], column, alpha=-1)


@torch.no_grad()
def lost_by(one: SliceStatistics, product_OI: Tensor) -> float:
    """``½ tr(A (W − Ŵ) G (W − Ŵ)ᵀ)`` of any Ŵ; where only ``Wᵀ A W`` was kept, with the multiple of
    the identity for A that has its trace: codes are no ``W X``."""
    gap_OI = (one.weight_OI.double() - product_OI).to(product_OI.dtype)
    return lost_of_gap(one, gap_OI)


@torch.no_grad()
def lost_of_gap(
    one: SliceStatistics,
    gap_OI: Tensor,
    *,
    rows: Tensor | None = None,
    gram_II: Tensor | None = None,
) -> float:
    """:func:`lost_by` of an error, in its dtype; of some ``rows`` of the slice, or under the moment
    of some of its inputs, where these are given."""
    moment = one.moment_OO
    if one.is_projected:
        left_OI = gap_OI * (one.trace / len(one.weight_OI))
    elif moment is None:
        left_OI = gap_OI
    elif moment.ndim == 1:
        left_OI = (moment if rows is None else moment[rows])[:, None].to(gap_OI) * gap_OI
    else:
        left_OI = (moment if rows is None else moment[rows][:, rows]).to(gap_OI) @ gap_OI
    right_OI = one.times_gram(left_OI) if gram_II is None else left_OI @ gram_II.to(gap_OI)
    return 0.5 * float((right_OI * gap_OI).sum(dtype=torch.float64))


@torch.no_grad()
def rounded(
    one: SliceStatistics,
    bits: int,
    *,
    feedback: bool = True,
    dtype: torch.dtype = torch.float64,
    elimination: Elimination | None = None,
) -> Quantised:
    """A slice's own weight in so many bits, by nearest codes or, where that loses less, with
    feedback; ``dtype`` is that of the arithmetic, ``elimination`` that of its inputs' moment."""
    weight_OI, gram_II = one.weight_OI.to(dtype), one.gram_II
    plain = nearest(weight_OI, bits, one.weight_OI.dtype, gram_II.diagonal())
    if not feedback:
        return plain
    other = with_feedback(weight_OI, gram_II, bits, one.weight_OI.dtype, elimination)
    return min(plain, other, key=lambda codes: lost_by(one, codes.values(dtype)))


def shift_of(one: SliceStatistics, codes: Quantised) -> Tensor | None:
    """What the bias of a slice with these codes takes up; None where it takes up no mean."""
    if one.mean_I is None:
        return None
    return one.image_of_mean - codes.values(torch.float64) @ one.mean_I


@torch.no_grad()
def rounded_group(made: GroupFactors, bits: int, *, bias: bool = True) -> GroupFactors:
    """The factors of a group in so many bits; what they lose is that of truncation and rounding
    together, in the metric."""
    work = made.basis_RI.dtype
    members = {name: made.spectra.slices[name] for name in made.coefficients}
    stored = next(iter(members.values())).weight_OI.dtype
    pooled = made.spectra.pooled(made.group.slices)
    pivoted = made.pivoted
    if pivoted is None:
        basis_RI, coefficients = _balanced(made, pooled.moment)
        table = better_codes(basis_RI, pooled.moment, bits, stored, pooled.elimination)
        whole_RI, kept = table.values(work), None
    else:
        coefficients = {
            name: c @ pivoted.block_RR.to(work) for name, c in made.coefficients.items()
        }
        rest = complement(pivoted.kept_J, made.group.in_features)
        moment = pooled.moment[rest][:, rest]
        table = better_codes(pivoted.table_RT.to(work), moment, bits, stored)
        whole_RI = made.group.stored_as.whole_basis(table.values(work), pivoted.kept_J)
        block = torch.eye(len(whole_RI), dtype=torch.float64, device=whole_RI.device)
        kept = Pivoted(
            pivoted.kept_J, table.values(torch.float64), block, pivoted.largest, pivoted.swaps
        )
    quantised = {"": table}
    values = {}
    inner: dict[Hashable, tuple[Tensor, Elimination]] = {}  # of what the basis computes of an input
    for name, one in members.items():
        fitted = fitted_to(one, whole_RI, coefficients[name], pooled.floor)
        if one.input not in inner:
            moment = one.times_gram(whole_RI.double()) @ whole_RI.double().T
            inner[one.input] = moment, Elimination.of(moment)
        moment, elimination = inner[one.input]
        candidates = (
            nearest(fitted, bits, stored, moment.diagonal()),
            with_feedback(fitted, moment, bits, stored, elimination),
        )
        losses = [lost_by(one, codes.values(work) @ whole_RI) for codes in candidates]
        quantised[name] = candidates[losses.index(min(losses))]
        values[name] = quantised[name].values(work)
    found = replace(
        made,
        basis_RI=whole_RI,
        coefficients=values,
        bias_shift={},
        quantised=quantised,
        kept_form=kept,
    )
    found.lost = sum(lost_by(one, found.product(name, work)) for name, one in members.items())
    return replace(found, bias_shift=shifts_of(found)) if bias else found


@torch.no_grad()
def better_codes(
    matrix: Tensor,
    moment: Tensor,
    bits: int,
    stored: torch.dtype,
    elimination: Elimination | None = None,
) -> Quantised:
    """Of nearest codes and those with feedback the ones that lose less under a moment, whose
    ``elimination`` may be given."""
    found = (
        nearest(matrix, bits, stored, moment.diagonal()),
        with_feedback(matrix, moment, bits, stored, elimination),
    )

    def lost(codes: Quantised) -> float:
        gap = matrix.double() - codes.values(torch.float64)
        return float(((gap @ moment) * gap).sum())

    return min(found, key=lost)


def _balanced(made: GroupFactors, moment: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The factors with every row of the basis as large in what it computes as its column of the
    coefficients is: the errors of the coefficients' codes then come from equal parts."""
    basis = made.basis_RI.double()
    computed = ((basis @ moment) * basis).sum(1).clamp(min=0.0).sqrt()
    columns = torch.cat(list(made.coefficients.values())).double().norm(dim=0)
    usable = (computed > 0) & (columns > 0)
    scale = torch.where(usable, (columns / computed.clamp(min=1e-300)).sqrt(), 1.0)
    scale = scale.clamp(1e-6, 1e6).to(made.basis_RI)
    return made.basis_RI * scale[:, None], {
        name: c / scale for name, c in made.coefficients.items()
    }


def _codes(weight: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    # a scale of zero is that of zeros
    codes = torch.where(scale > 0, weight / scale, 0.0)
    return codes.round_().clamp_(low, high)


def _groups(bits: int, width: int) -> Iterator[slice]:
    step = width if bits == 8 else GROUP
    for first in range(0, width, step):
        yield slice(first, min(first + step, width))


def _spread(scale_OG: Tensor, bits: int, width: int) -> Tensor:
    if bits == 8:
        return scale_OG.expand(-1, width)
    places = torch.arange(width, device=scale_OG.device) // GROUP
    return scale_OG.index_select(1, places)


__all__ = [
    "better_codes",
    "lost_by",
    "lost_of_gap",
    "nearest",
    "rounded",
    "rounded_group",
    "scales_for",
    "shift_of",
    "with_feedback",
]
