"""What a plan of the search is made of, and the dense weights that it stands for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fxshare.base.lazily import Lazily
from fxshare.base.placement import multiplies_bfloat16
from fxshare.base.spent import part
from fxshare.factors.codes import CodedSlices, producer_rows, units_in_bits
from fxshare.factors.factored import Factored
from fxshare.factors.metric import SliceStatistics
from fxshare.factors.spectra import Spectra
from fxshare.factors.units import UnitFactors
from fxshare.planning.kinds.kind import Kind
from fxshare.plans.units import Units
from fxshare.sites.site import Site


@dataclass(frozen=True, eq=False)
class CarriedOut(Mapping[str, UnitFactors]):
    """What carries out the entries of other kinds, by their names, made when it is asked for and
    kept with the spectra."""

    units: tuple[Units, ...]
    spectra: Spectra
    kinds: tuple[Kind, ...]
    sites: Mapping[str, Site]
    bias: bool

    def __getitem__(self, name: str) -> UnitFactors:
        entry = self._by_name[name]
        kind = next(kind for kind in self.kinds if kind.name == entry.kind)
        consumer = self.consumer(entry)
        size = 8 * entry.kept * sum(len(one.weight_OI) for one in consumer.values())

        def make() -> UnitFactors:
            made = kind.carry_out(entry, consumer, self.spectra, bias=self.bias)
            return units_in_bits(made, self.sites, self.spectra.slices)

        key = (entry.kind, entry.consumer, entry.kept, entry.bits, self.bias)
        made: UnitFactors = self.spectra.made.get(key, make, size)
        return made

    def consumer(self, entry: Units) -> dict[str, SliceStatistics]:
        """The slices that read the units of an entry."""
        names = entry.read_by(self.sites[entry.consumer])
        return {name: self.spectra.slices[name] for name in names}

    def shifts(self, entry: Units) -> bool:
        """Whether the bias of the consumer takes up a mean, or is combined as its rows are."""
        slices = self.consumer(entry).values()
        if entry.turns_biases:
            return any(x.bias_O is not None for x in slices) and entry.kept < entry.of
        means = [one.mean_I is not None for one in slices]
        return self.bias and any(means) and entry.kept < entry.of

    @property
    def what(self) -> object:
        """What tells these apart from others of the same statistics."""
        return sorted(
            (one.name, one.kind, one.consumer, one.kept, one.bits or 0) for one in self.units
        )

    @cached_property
    def _by_name(self) -> dict[str, Units]:
        return {one.name: one for one in self.units}

    def __iter__(self) -> Iterator[str]:
        return (one.name for one in self.units)

    def __len__(self) -> int:
        return len(self.units)


def stored_in(weights: Mapping[str, Tensor]) -> torch.dtype:
    """What the factors of weights are kept in to judge plans by: float32, or bfloat16 where that is
    what all are stored in."""
    is_half = {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    return torch.bfloat16 if is_half else torch.float32


def dense(
    sites: Sequence[Site],
    weights: Mapping[str, Tensor],
    biases: Mapping[str, Tensor],
    factors: Factored,
    units: CarriedOut | None = None,
    coded: CodedSlices | None = None,
) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
    """The sites' weights multiplied out, in float32 at least unless the model computes in bfloat16,
    and their shifted biases; each is computed when it is asked for. Of an MLP whose units go the
    producers stay as they are, and the consumer has zeros in its columns: the same function,
    whatever an activation makes of zero."""
    group_of = {name: group.name for group in factors.groups for name in group.slices}
    in_codes = {} if coded is None else coded
    taken = {*group_of, *in_codes}
    grouped = {x.name: x for x in sites if any(s.name in taken for s in x.slices)}
    every = () if units is None else units.units
    computing = {n: one for one in every if one.bits is not None for n in one.producers}
    known = {site.name: site for site in sites}
    reading = {} if units is None else {n: one for one in units.units for n in units.consumer(one)}
    readers = {x.name: x for x in sites if any(s.name in reading for s in x.slices)}

    @part("multiply out")
    def weight(site: str) -> Tensor:
        whole, rows = weights[site], []
        # the model's own matrix products are no finer
        dtype = torch.promote_types(whole.dtype, torch.float32)
        if whole.dtype == torch.bfloat16 and multiplies_bfloat16(whole.device):
            dtype = torch.bfloat16
        for s in known[site].slices:
            if s.name in reading:
                assert units is not None
                rows.append(units[reading[s.name].name].whole(s.name, dtype))
            elif site in computing:
                assert units is not None
                own = whole[s.start : s.stop].to(dtype)
                rows.append(producer_rows(units[computing[site].name], site, s.name, own))
            elif s.name in in_codes:
                rows.append(in_codes[s.name].values(dtype))
            elif s.name in group_of:
                rows.append(factors[group_of[s.name]].product(s.name, dtype))
            else:
                rows.append(whole[s.start : s.stop].to(dtype))
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def shift_of(name: str) -> Tensor | None:
        if name in reading:
            assert units is not None
            return units[reading[name].name].bias_shift.get(name)
        if coded is not None and name in coded:
            return coded.shift(name)
        return factors[group_of[name]].bias_shift.get(name) if name in group_of else None

    def bias(site: str) -> Tensor:
        shifts = []
        for s in known[site].slices:
            shift = shift_of(s.name)
            device = weights[site].device
            still = torch.zeros(s.out_features, dtype=torch.float64, device=device)
            shifts.append(still if shift is None else shift)
        return biases[site].double() + torch.cat(shifts)

    def moves(name: str) -> bool:
        return factors.shifts(name) or (coded is not None and coded.shifts(name))

    shifted = [x.name for x in grouped.values() if any(moves(s.name) for s in x.slices)]
    if units is not None:
        shifted += [one.consumer for one in units.units if units.shifts(one)]
    return Lazily(tuple({**grouped, **readers, **computing}), weight), Lazily(
        tuple(dict.fromkeys(shifted)), bias
    )


__all__ = ["CarriedOut", "dense", "stored_in"]
