"""The factors of a plan and the weights that they stand for, made when they are asked for.

All factors of a plan in float64, and its weights multiplied out, are several times the model. They
are made group by group instead, and kept as far as there is room.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from fxshare.factors.group import GroupFactors, factorise_group, refitted
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
        size = self.dtype.itemsize * group.rank * (group.in_features + group.out_features)

        def plain() -> GroupFactors:
            return factorise_group(
                group, self.spectra, refit=False, bias=self.bias, dtype=self.dtype
            )

        def fitted() -> GroupFactors:
            return refitted(kept.get((key, False), plain, size), bias=self.bias)

        kept = self.spectra.made
        key = group.slices, group.rank, group.storage, self.bias, self.dtype
        made: GroupFactors = kept.get((key, self.refit), fitted if self.refit else plain, size)
        return replace(made, group=group)

    @property
    def what(self) -> object:
        """What tells these factors apart from others of the same weights, named statistics and
        options; None where the statistics have no name."""
        if not self.spectra.name:
            return None
        groups = sorted((g.slices, g.rank, g.storage) for g in self.groups)
        return self.spectra.key_of_options, self.refit, self.bias, groups

    def shifts(self, name: str) -> bool:
        """Whether a slice is in a group and its bias takes up a mean."""
        return self.bias and name in self._grouped and self.spectra.slices[name].mean_I is not None

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


__all__ = ["Factored"]
