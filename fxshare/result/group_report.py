"""A row of the report: a group, an entry of another kind, or what stays dense."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fxshare.plans.bits import matrix_bytes
from fxshare.plans.cost import Shape, flops
from fxshare.plans.plan import Group, Plan
from fxshare.plans.units import Units
from fxshare.sites.site import Site


@dataclass(frozen=True)
class GroupReport:
    """One group, or in exact mode one site.

    ``flops_*`` are floating-point operations per token (a multiply-add counts 2), the basis
    product counted once per distinct input. ``weighted_error`` is ``Σ‖(W − C B) S‖² / Σ‖W S‖²``;
    None where nothing was factorised. ``refined`` is how far refining moved the weights that the
    group stands for, ``‖C' B' − C B‖ / ‖C B‖``; None where it was not refined. ``cache_bytes_*``
    are those that a key-value cache has for one token of what the group computes, where that is
    another number after; 0 elsewhere.
    """

    name: str
    type: str
    label: str
    layers: tuple[int, ...]
    slices: int
    in_features: int
    out_features: int
    rank: int | None
    storage: str
    numbers_before: int
    numbers_after: int
    bytes_before: int
    bytes_after: int
    flops_before: int
    flops_after: int
    weighted_error: float | None
    floored: int
    seconds: float
    refined: float | None = None
    bits: int | None = None
    """Of each stored number, where it has fewer than the model's dtype."""
    cache_bytes_before: int = 0
    cache_bytes_after: int = 0


def group_reports(
    plan: Plan,
    element_size: int,
    *,
    errors: dict[str, float] | None = None,
    floored: dict[str, int] | None = None,
    seconds: dict[str, float] | None = None,
) -> tuple[GroupReport, ...]:
    """A row per group of the plan, and one per site outside every group."""
    site_of = {s.name: site for site in plan.sites for s in site.slices}
    grouped = plan.rewritten
    rows = [
        _group_row(
            group,
            shape=_shape(group, [site_of[name] for name in group.slices]),
            element_size=element_size,
            error=(errors or {}).get(group.name),
            floored=(floored or {}).get(group.name, 0),
            seconds=(seconds or {}).get(group.name, 0.0),
        )
        for group in plan.groups
    ]
    rows += [
        _units_row(one, plan, element_size, errors=errors or {}, seconds=seconds or {})
        for one in plan.units
    ]
    for site in plan.sites:
        by_bits: dict[int | None, int] = {}
        counts: dict[int | None, int] = {}
        for s in site.slices:
            if s.name not in grouped:
                bits = plan.dense_bits.get(s.name)
                by_bits[bits] = by_bits.get(bits, 0) + s.out_features
                counts[bits] = counts.get(bits, 0) + 1
        rows += [
            _dense_row(site, counts[bits], out, bits, element_size) for bits, out in by_bits.items()
        ]
    return tuple(rows)


def _dense_row(
    site: Site, slices: int, out_features: int, bits: int | None, element_size: int
) -> GroupReport:
    """The row of those slices of a site that stay dense in so many bits."""
    numbers = site.in_features * out_features
    return GroupReport(
        name=site.name,
        type=site.type,
        label="",
        layers=() if site.layer is None else (site.layer,),
        slices=slices,
        in_features=site.in_features,
        out_features=out_features,
        rank=None,
        storage="dense",
        numbers_before=numbers,
        numbers_after=numbers,
        bytes_before=numbers * element_size,
        bytes_after=matrix_bytes(bits, out_features, site.in_features, element_size),
        flops_before=2 * numbers if site.calls else 0,
        flops_after=2 * numbers if site.calls else 0,
        weighted_error=None,
        floored=0,
        seconds=0.0,
        bits=bits,
    )


def _shape(group: Group, sites: Sequence[Site]) -> Shape:
    """The shape of a group whose slices are in these sites; each site that multiplies reads the
    basis with an input of its own."""
    distinct = {site.name: site for site in sites}.values()
    return Shape(
        group.in_features,
        group.out_features,
        sum(bool(site.calls) for site in distinct),
        sum(len(site.lookups) for site in distinct),
        sum(site.out_features for site in distinct if not site.calls),
    )


def _units_row(
    one: Units,
    plan: Plan,
    element_size: int,
    *,
    errors: Mapping[str, float],
    seconds: Mapping[str, float],
) -> GroupReport:
    """A row of an entry of another kind: its rank is how much stays."""
    sites = {site.name: site for site in plan.sites}
    before, after = one.dense_numbers, one.stored_numbers
    return GroupReport(
        name=one.name,
        type=one.type,
        label="",
        layers=one.layers,
        slices=len(one.slices_among(plan.sites)),
        in_features=sites[one.producers[0]].in_features,
        out_features=sites[one.consumer].out_features,
        rank=one.kept,
        storage=one.words.storage,
        numbers_before=before,
        numbers_after=after,
        bytes_before=before * element_size,
        bytes_after=one.stored_bytes(plan.sites, element_size),
        flops_before=2 * before,
        flops_after=2 * after,
        weighted_error=errors.get(one.name),
        floored=0,
        seconds=seconds.get(one.name, 0.0),
        bits=one.bits,
        cache_bytes_before=one.cached[0] * element_size,
        cache_bytes_after=one.cached[1] * element_size,
    )


def _group_row(
    group: Group,
    *,
    shape: Shape,
    element_size: int,
    error: float | None,
    floored: int,
    seconds: float,
) -> GroupReport:
    rank = np.array([group.rank])
    return GroupReport(
        name=group.name,
        type=group.type,
        label=group.label,
        layers=group.layers,
        slices=len(group.slices),
        in_features=group.in_features,
        out_features=group.out_features,
        rank=group.rank,
        storage=group.storage,
        numbers_before=group.dense_numbers,
        numbers_after=group.stored_numbers,
        bytes_before=group.dense_numbers * element_size,
        bytes_after=group.stored_bytes(element_size),
        flops_before=shape.dense_flops,
        flops_after=int(flops(shape, rank, group.stored_as)[0]),
        weighted_error=error,
        floored=floored,
        seconds=seconds,
        bits=group.bits,
    )
