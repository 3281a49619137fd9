"""The factors of a plan and the weights that they stand for, made when they are asked for.

All factors of a plan in float64, and its weights multiplied out, are several times the model. They
are made group by group instead, and kept as far as there is room.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from fxshare.base.processes import here
from fxshare.factors.group import GroupFactors, factorise_group, refitted
from fxshare.factors.rounding import rounded_group
from fxshare.factors.spectra import Spectra
from fxshare.plans.plan import Group


@dataclass(frozen=True, eq=False)
class Factored(Mapping[str, GroupFactors]):
    """The factors of groups by name; with ``refit`` fitted to each slice's own inputs. What is made
    is kept with the spectra, for other plans that have the same group at the same rank."""

    groups: Sequence[Group]
    spectra: Spectra
    refit: bool
    bias: bool
    dtype: torch.dtype = torch.float64

    def __getitem__(self, name: str) -> GroupFactors:
        group = self._by_name[name]
        size = self._size(group)

        def plain() -> GroupFactors:
            return factorise_group(
                group, self.spectra, refit=False, bias=self.bias, dtype=self.dtype
            )

        def fitted() -> GroupFactors:
            return refitted(kept.get((key, False), plain, size), bias=self.bias)

        def in_bits() -> GroupFactors:
            assert group.bits is not None
            full = replace(self, groups=[group.model_copy(update={"bits": None})])[name]
            return rounded_group(full, group.bits, bias=self.bias)

        kept, key = self.spectra.made, self._key(group)
        make = in_bits if group.bits is not None else fitted if self.refit else plain
        made: GroupFactors = kept.get((key, self.refit), make, size)
        return replace(made, group=group)

    def share(self) -> None:
        """Of several processes let each make the factors of some groups, and send them to the
        others; nothing where not all can be kept."""
        together, kept = here(), self.spectra.made
        size = sum(self._size(group) for group in self.groups)
        if together.size == 1 or size > kept.most_bytes:
            return
        groups = [group for group in self.groups if group.bits is None]  # codes each makes itself
        keys = [(self._key(group), self.refit) for group in groups]
        what = hashlib.sha256(repr(keys).encode()).hexdigest()[:8]
        everybody = together.gather([key in kept for key in keys], f"the factors of plan {what}")
        wanted = [g for g, *has in zip(groups, *everybody, strict=True) if not all(has)]
        told = together.spread(wanted, self._told, owner=self._owner, at="factors")
        for group, (numbers, shifted) in zip(wanted, told, strict=True):
            source = self._owner(group) % together.size
            own = self[group.name] if source == together.rank else None
            tensors = together.sent(None if own is None else _tensors(own), source)
            of = group, self.spectra
            found = functools.partial(_restored, tensors, numbers, shifted, of)
            kept.get((self._key(group), self.refit), found, self._size(group))

    def _owner(self, group: Group) -> int:
        return self.spectra.owner(group.slices)

    def _told(self, group: Group) -> tuple[tuple[float, float], tuple[str, ...]]:
        """Make the factors of a group: what they lose of how much, and whose bias is shifted."""
        made = self[group.name]
        return (made.lost, made.total), tuple(made.bias_shift)

    @property
    def what(self) -> object:
        """What tells these factors apart from others of the same weights, named statistics and
        options; None where the statistics have no name."""
        if not self.spectra.name:
            return None
        groups = sorted((g.slices, g.rank, g.storage, g.bits or 0) for g in self.groups)
        return self.spectra.key_of_options, self.refit, self.bias, groups

    def shifts(self, name: str) -> bool:
        """Whether a slice is in a group and its bias takes up a mean."""
        return self.bias and name in self._grouped and self.spectra.slices[name].mean_I is not None

    def _key(self, group: Group) -> tuple[object, ...]:
        return group.slices, group.rank, group.storage, group.bits, self.bias, self.dtype

    def _size(self, group: Group) -> int:
        return self.dtype.itemsize * group.rank * (group.in_features + group.out_features)

    @cached_property
    def _by_name(self) -> dict[str, Group]:
        return {group.name: group for group in self.groups}

    @cached_property
    def _grouped(self) -> frozenset[str]:
        return frozenset(name for group in self.groups for name in group.slices)

    def __iter__(self) -> Iterator[str]:
        return (group.name for group in self.groups)

    def __len__(self) -> int:
        return len(self.groups)


def _tensors(made: GroupFactors) -> list[Tensor]:
    return [made.basis_RI, *made.coefficients.values(), *made.bias_shift.values()]


def _restored(
    tensors: Sequence[Tensor],
    numbers: tuple[float, float],
    shifted: Sequence[str],
    of: tuple[Group, Spectra],
) -> GroupFactors:
    """The factors whose tensors another process has sent."""
    group, spectra = of
    device = spectra.slices[group.slices[0]].weight_OI.device
    basis, *others = [one.to(device) for one in tensors]
    coefficients = dict(zip(group.slices, others, strict=False))
    shifts = dict(zip(shifted, others[len(group.slices) :], strict=True))
    return GroupFactors(group, basis, coefficients, *numbers, spectra, shifts)


__all__ = ["Factored"]
