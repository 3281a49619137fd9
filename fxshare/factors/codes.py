"""Codes of what is not in a group: dense slices, and the linears of MLPs whose hidden units go."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fxshare.base.quantised import Quantised
from fxshare.factors.elimination import Elimination
from fxshare.factors.metric import SliceStatistics
from fxshare.factors.rounding import better_codes, lost_of_gap, rounded, shift_of
from fxshare.factors.spectra import Spectra
from fxshare.factors.units import UnitFactors
from fxshare.sites.site import Site


@dataclass(frozen=True, eq=False)
class CodedSlices(Mapping[str, Quantised]):
    """The codes of dense slices by name, made when they are asked for and kept with the spectra;
    ``dtype`` is that of the arithmetic."""

    bits: Mapping[str, int]
    spectra: Spectra
    bias: bool = True
    dtype: torch.dtype = torch.float64

    def __getitem__(self, name: str) -> Quantised:
        one, bits = self.spectra.slices[name], self.bits[name]

        def make() -> Quantised:
            elimination = self.spectra.pooled((name,)).elimination
            return rounded(one, bits, dtype=self.dtype, elimination=elimination)

        key = "dense", name, bits, self.dtype
        made: Quantised = self.spectra.made.get(key, make, one.weight_OI.numel())
        return made

    def shifts(self, name: str) -> bool:
        """Whether the bias of a slice takes up a mean."""
        return self.bias and name in self.bits and self.spectra.slices[name].mean_I is not None

    def shift(self, name: str) -> Tensor | None:
        """What the bias of a slice takes up; None where it takes up no mean."""
        return shift_of(self.spectra.slices[name], self[name]) if self.shifts(name) else None

    @property
    def what(self) -> object:
        """What tells these apart from others of the same statistics."""
        return sorted(self.bits.items())

    def __iter__(self) -> Iterator[str]:
        return iter(self.bits)

    def __len__(self) -> int:
        return len(self.bits)


@torch.no_grad()
def units_in_bits(
    made: UnitFactors, sites: Mapping[str, Site], slices: Mapping[str, SliceStatistics]
) -> UnitFactors:
    """What carries out an entry of units, in the bits that it says: of the consumer its new weight,
    in the moment of the units that stay, of the producers the rows that stay."""
    entry = made.entry
    bits = entry.bits
    if bits is None:
        return made
    quantised, values, lost = {}, {}, made.lost
    at = torch.tensor(made.kept)
    for name, weight_OK in made.weights.items():
        one = slices[name]
        there = at.to(weight_OK.device)
        gram_KK = one.gram_II.index_select(0, there).index_select(1, there)
        quantised[name] = better_codes(weight_OK, gram_KK, bits, one.weight_OI.dtype)
        values[name] = quantised[name].values(torch.float64)
        lost += lost_of_gap(one, values[name] - weight_OK, gram_II=gram_KK)
    eliminations: dict[Hashable, Elimination] = {}
    for producer in entry.producers:
        site = sites[producer]
        for s in site.slices:
            one = slices[s.name]
            rows = entry.rows(producer, s.out_features, made.kept).places()
            rows = rows.to(one.weight_OI.device)
            weight_KI = one.weight_OI.double().index_select(0, rows)
            if one.input not in eliminations:
                eliminations[one.input] = Elimination.of(one.gram_II)
            quantised[s.name] = better_codes(
                weight_KI, one.gram_II, bits, one.weight_OI.dtype, eliminations[one.input]
            )
            gap = quantised[s.name].values(torch.float64) - weight_KI
            lost += lost_of_gap(one, gap, rows=rows)
    shifts = {}
    for name in made.bias_shift:
        one = slices[name]
        assert one.mean_I is not None
        shifts[name] = one.image_of_mean - values[name] @ one.mean_I[at.to(one.mean_I.device)]
    return replace(made, weights=values, quantised=quantised, bias_shift=shifts, lost=lost)


def producer_rows(made: UnitFactors, site: str, name: str, whole_OI: Tensor) -> Tensor:
    """The rows of a producer's slice with the values of its codes where units stay."""
    codes = made.quantised[name]
    rows = made.entry.rows(site, len(whole_OI), made.kept).places()
    return whole_OI.index_copy(0, rows.to(whole_OI.device), codes.values(whole_OI.dtype))


__all__ = ["CodedSlices", "producer_rows", "units_in_bits"]
