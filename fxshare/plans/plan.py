"""What a plan is: sites, their slices, groups with ranks. Data only; no torch in it.

Names cross stages, fx nodes do not: everything here is named by qualified module names.
"""

from __future__ import annotations

import difflib
import json
import reprlib
from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, Discriminator, Tag, ValidationError, model_validator

from fxshare.base.json_text import parse_json
from fxshare.base.names import as_group_name
from fxshare.errors import PlanError
from fxshare.plans.bits import (
    Bits,
    Rounded,
    bits_of_slices,
    factor_bytes,
    fault_of,
    few_bits,
    without_none,
)
from fxshare.plans.heads import Heads
from fxshare.plans.keys import Keys
from fxshare.plans.outlook import Outlook
from fxshare.plans.storage import PLAIN, Storage, StorageName, storage_named
from fxshare.plans.units import Units
from fxshare.plans.whole_heads import WholeHeads
from fxshare.sites.site import Frozen, Label, ModulePath, Site, Skipped, TypeNames

VERSION = 3
"""What this version reads; a plan without bits is written as version 2, and one without hidden
units as well as version 1, which earlier ones read."""


class Group(Frozen):
    """Slices that share one basis."""

    name: Annotated[str, AfterValidator(as_group_name)]
    """Module name of the basis at the root of the graph module."""
    type: TypeNames
    label: Label
    """Which slices of a site: ``q.3``, ``q``, or empty for whole sites."""
    layers: tuple[int, ...]
    slices: tuple[ModulePath, ...]
    in_features: int
    out_features: int
    """Stacked output width of all slices."""
    rank: int
    storage: StorageName = PLAIN.name
    """The name of how basis and coefficients are stored, see :attr:`stored_as`."""
    bits: Bits | None = None
    """Of each of their numbers; None for those of the model's dtype."""
    loss: float | None = None
    """Predicted increase of the model's loss per token; None where it was not predicted."""

    @property
    def dense_numbers(self) -> int:
        """Stored numbers before: ``in · O``."""
        return self.in_features * self.out_features

    @property
    def stored_numbers(self) -> int:
        """Stored numbers after, index entries included."""
        return self.stored_as.numbers(self.rank, self.in_features, self.out_features)

    def stored_bytes(self, itemsize: int) -> int:
        """Stored bytes after, of a model whose numbers have ``itemsize``; index entries and scales
        included."""
        rank, width = self.rank, self.in_features
        return int(
            factor_bytes(self.stored_as, rank, width, self.out_features, self.bits, itemsize)
        )

    @property
    def stored_as(self) -> Storage:
        """What the name of the storage stands for."""
        return storage_named(self.storage)


def _which(given: Any) -> str:
    """Which class an entry is of."""
    if not isinstance(given, dict):
        return next((kind for kind, own in _OWN.items() if isinstance(given, own)), "units")
    if {"values", "queries"} <= given.keys():
        return "whole heads"
    return "heads" if "values" in given else "keys" if "queries" in given else "units"


_OWN = {"whole heads": WholeHeads, "heads": Heads, "keys": Keys}


Entry: TypeAlias = Annotated[
    Annotated[WholeHeads, Tag("whole heads")]
    | Annotated[Heads, Tag("heads")]
    | Annotated[Keys, Tag("keys")]
    | Annotated[Units, Tag("units")],
    Discriminator(_which),
]
"""What a kind beside the basis leaves in a plan."""


class Plan(Frozen):
    """Everything that rewriting needs to know, and nothing that depends on weights."""

    version: int = 1
    mode: Literal["exact", "sharing", "planned"]
    sites: tuple[Site, ...]
    groups: tuple[Group, ...] = ()
    units: tuple[Entry, ...] = ()
    """Of which MLPs hidden units go, and which heads, or their queries and keys, are narrower;
    planned mode only."""
    rounded: tuple[Rounded, ...] = ()
    """Dense slices in few bits; planned mode only."""
    skipped: tuple[Skipped, ...] = ()
    outlook: Outlook | None = None
    """What was predicted, and how good the plan can be; planned mode only."""

    @model_validator(mode="before")
    @classmethod
    def _with_its_version(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        least = 3 if few_bits(given) else 2 if given.get("units") else 1
        version = given.get("version", 1)
        return {**given, "version": least} if version in (1, 2) and version < least else given

    @model_validator(mode="after")
    def _is_partition(self) -> Plan:
        known = {s.name: site for site in self.sites for s in site.slices}
        home: dict[str, str] = {}
        for group in self.groups:
            for name in group.slices:
                if name not in known:
                    near = difflib.get_close_matches(name, known, n=1)
                    hint = f"; did you mean {near[0]!r}?" if near else ""
                    raise ValueError(
                        f"group {group.name!r}: {name!r} is not a slice of any site{hint}"
                    )
                if name in home:
                    raise ValueError(
                        f"slice {name!r} is in group {home[name]!r} and in {group.name!r}; a slice "
                        "has one basis, once"
                    )
                home[name] = group.name
        names = Counter(group.name for group in self.groups)
        if names and max(names.values()) > 1:
            raise ValueError(f"two groups are named {names.most_common(1)[0][0]!r}")
        for group in self.groups:
            looked_up = [name for name in group.slices if known[name].lookups]
            if looked_up and not group.stored_as.looks_rows_up:
                raise ValueError(
                    f"group {group.name!r}: the rows of {looked_up[0]!r} are looked up, and its "
                    f"basis is stored plain; found storage {group.storage!r}"
                )
            widths = {known[name].in_features for name in group.slices}
            if widths != {group.in_features}:
                raise ValueError(
                    f"group {group.name!r} says in_features {group.in_features}, its slices read "
                    f"{sorted(widths)}"
                )
            out = sum(
                s.out_features
                for site in self.sites
                for s in site.slices
                if s.name in set(group.slices)
            )
            if out != group.out_features:
                raise ValueError(
                    f"group {group.name!r} says out_features {group.out_features}, its slices "
                    f"have {out}"
                )
            if not 1 <= group.rank <= min(group.in_features, group.out_features):
                raise ValueError(
                    f"group {group.name!r}: rank {group.rank} is outside 1.."
                    f"{min(group.in_features, group.out_features)}"
                )
        self._check_units(home)
        return self

    def _check_units(self, home: Mapping[str, str]) -> None:
        """Every entry has its slices to itself. ``home`` are the groups of slices."""
        known = {site.name: site for site in self.sites}
        owner: dict[str, str] = {}
        names = {group.name for group in self.groups}
        for one in self.units:
            fault = one.fault(known)
            if fault is None and one.alternating and type(one) is not Units:
                fault = "alternating is of hidden units alone"
            if fault is not None:
                raise ValueError(f"units {one.name!r}: {fault}")
            if one.name in names:
                raise ValueError(f"two groups or MLPs are named {one.name!r}")
            names.add(one.name)
            for name in one.slices_among(self.sites):
                if name in owner:
                    raise ValueError(
                        f"slice {name!r} is in units {owner[name]!r} and in {one.name!r}"
                    )
                owner[name] = one.name
                if name in home:
                    raise ValueError(
                        f"slice {name!r} is in group {home[name]!r}, and units "
                        f"{one.name!r} go from its site; leave it out of one of the two"
                    )
        if self.units and self.mode != "planned":
            raise ValueError(f"mode {self.mode!r}: hidden units are chosen in planned mode only")
        if self.mode != "planned" and self.has_bits:
            raise ValueError(f"mode {self.mode!r}: weights are rounded in planned mode only")
        fault = fault_of(self.rounded, self.sites, self.rewritten)
        if fault is not None:
            raise ValueError(fault)

    @property
    def rewritten(self) -> frozenset[str]:
        """The slices that do not stay as they are: in a group, or in an entry of units."""
        found = {name for group in self.groups for name in group.slices}
        return frozenset(found.union(*(one.slices_among(self.sites) for one in self.units)))

    @property
    def others(self) -> dict[str, int]:
        """How many entries of other kinds than a basis there are, by what tables call several."""
        return dict(Counter(one.words.several for one in self.units))

    @property
    def is_dense(self) -> bool:
        """Whether nothing is rewritten."""
        return not self.groups and not self.units and not self.rounded

    @property
    def has_bits(self) -> bool:
        """Whether anything is stored in few bits."""
        parts: tuple[Group | Units, ...] = (*self.groups, *self.units)
        return bool(self.rounded) or any(part.bits is not None for part in parts)

    @property
    def dense_bits(self) -> Mapping[str, int]:
        """The bits of dense slices that have few, by name."""
        return bits_of_slices(self.rounded)

    @property
    def dense_numbers(self) -> int:
        """Numbers in the matched weights before rewriting."""
        return sum(site.weights for site in self.sites)

    @property
    def stored_numbers(self) -> int:
        """Numbers after rewriting, of bases, coefficients, what is left of MLPs, and the slices
        that stay as they are."""
        parts: tuple[Group | Units, ...] = (*self.groups, *self.units)
        before = sum(part.dense_numbers for part in parts)
        return self.dense_numbers - before + sum(part.stored_numbers for part in parts)

    @property
    def params_kept(self) -> float:
        """Stored numbers after over weights before."""
        return self.stored_numbers / self.dense_numbers

    def site_of(self, slice_name: str) -> Site:
        """The site that a slice belongs to; :class:`PlanError` if there is none."""
        for site in self.sites:
            if any(s.name == slice_name for s in site.slices):
                return site
        raise PlanError(f"the plan has no slice named {slice_name!r}")

    def to_json(self) -> str:
        """The plan as a JSON document that people can edit."""
        plain = self.model_dump(mode="json")
        if not self.units:
            del plain["units"]
        for one in plain.get("units", ()):
            if not one["alternating"]:
                del one["alternating"]
        without_none(plain)
        return json.dumps(plain, indent=1) + "\n"

    @staticmethod
    def from_json(text: str) -> Plan:
        """Read and check a plan; :class:`PlanError` says what does not hold."""
        try:
            version = parse_json(text).get("version", VERSION)
            if version > VERSION:
                raise PlanError(
                    f"the plan has version {version}, this fxshare reads up to {VERSION}; upgrade "
                    "fxshare"
                )
            return Plan.model_validate_json(text)
        except ValidationError as error:
            raise PlanError(_fault(error, text)) from error
        except (ValueError, AttributeError, TypeError) as error:
            raise PlanError(f"not a plan: {error}") from error


def _fault(error: ValidationError, text: str) -> str:
    """The first fault, with the name of the group or site that has it."""
    first = error.errors(include_url=False)[0]
    loc = list(first["loc"])
    if first["type"] == "value_error" and not loc:
        return str(first["ctx"]["error"])
    where = []
    if len(loc) > 1 and isinstance(loc[1], int):
        entry = json.loads(text)[loc[0]][loc[1]]
        named = isinstance(entry, dict) and isinstance(entry.get("name"), str)
        name = reprlib.repr(entry["name"]) if named else ""
        where.append(f"{str(loc[0])[:-1]} {name}" if named else f"{loc[0]}.{loc[1]}")
        loc = loc[3:] if loc[0] == "units" else loc[2:]
    where.append(".".join(str(step) for step in loc))
    if first["type"] == "value_error":
        return ": ".join((*where, str(first["ctx"]["error"])))
    found = "" if first["type"] == "missing" else f"; found {reprlib.repr(first['input'])}"
    said = "unknown key" if first["type"] == "extra_forbidden" else first["msg"]
    return ": ".join(filter(None, (*where, said))) + found
