"""Factors without values, of a plan's shapes: what loading fills."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from fxshare.base.quantised import Quantised
from fxshare.plans.heads import Heads
from fxshare.plans.keys import Keys
from fxshare.plans.plan import Plan
from fxshare.plans.units import Units
from fxshare.plans.whole_heads import WholeHeads
from passes import (
    DroppedHeads,
    NarrowedHeads,
    NarrowedKeys,
    PivotedGroup,
    SelectedUnits,
    SharedGroup,
)
from passes.pipeline import Narrower


def empty_factors(
    plan: Plan, dtype_of: Callable[[str], torch.dtype], device: torch.device
) -> tuple[list[SharedGroup], list[PivotedGroup]]:
    """Factors of the plan's shapes without values worth reading, for a graph that is filled, or
    only looked at, afterwards. ``dtype_of`` gives the dtype of a site by its name."""
    site_of = {s.name: (site, s) for site in plan.sites for s in site.slices}
    groups, pivots = [], []
    for group in plan.groups:
        members = [site_of[name] for name in group.slices]
        dtype = dtype_of(members[0][0].name)
        basis_RI = torch.empty(group.rank, group.in_features, dtype=dtype, device=device)
        coefficients = {
            s.name: torch.empty(s.out_features, group.rank, dtype=dtype, device=device)
            for _, s in members
        }
        groups.append(SharedGroup(group.name, basis_RI, coefficients))
        if group.stored_as.keeps_inputs:
            kept_J = torch.arange(group.rank, dtype=torch.int32, device=device)
            table_RT = basis_RI[:, group.rank :]
            pivots.append(PivotedGroup(group.name, kept_J, table_RT, coefficients))
    return groups, pivots


def empty_units(
    plan: Plan,
    dtype_of: Callable[[str], torch.dtype],
    device: torch.device,
    kept: Mapping[str, Sequence[int]] | None = None,
) -> list[Narrower]:
    """As :func:`empty_factors`, of the MLPs whose units go; ``kept`` are those that stay where they
    are known, else the first ones."""
    found: list[Narrower] = []
    for one in plan.units:
        if isinstance(one, Heads):
            found.append(_empty_heads(plan, one, dtype_of, device))
            continue
        stay = tuple((kept or {}).get(one.name, range(one.kept)))
        if isinstance(one, Keys):
            found.append(_empty_keys(plan, one, stay, dtype_of, device))
            continue
        if isinstance(one, WholeHeads):
            found.append(_empty_whole_heads(plan, one, stay, dtype_of, device))
            continue
        weights = {
            s.name: torch.empty(
                s.out_features, one.kept, dtype=dtype_of(one.consumer), device=device
            )
            for site in plan.sites
            if site.name == one.consumer
            for s in site.slices
        }
        found.append(selected(plan, one, stay, weights))
    return found


def empty_codes(
    plan: Plan, dtype_of: Callable[[str], torch.dtype], device: torch.device
) -> dict[str, Quantised]:
    """As :func:`empty_factors`, of what the plan stores in few bits."""
    site_of = {s.name: (site, s) for site in plan.sites for s in site.slices}
    found = {}
    for group in plan.groups:
        if group.bits is None:
            continue
        dtype = dtype_of(site_of[group.slices[0]][0].name)
        width = group.stored_as.basis_width(group.rank, group.in_features)
        found[group.name] = Quantised.empty(group.rank, width, group.bits, dtype, device)
        for name in group.slices:
            rows = site_of[name][1].out_features
            found[name] = Quantised.empty(rows, group.rank, group.bits, dtype, device)
    for one in plan.units:
        for name in one.sites if one.bits is not None else ():
            site = next(site for site in plan.sites if site.name == name)
            for s in site.slices:
                rows, width = s.out_features // one.of * one.kept, site.in_features
                if name == one.consumer:
                    rows, width = s.out_features, one.kept
                assert one.bits is not None
                found[s.name] = Quantised.empty(rows, width, one.bits, dtype_of(name), device)
    for name, bits in plan.dense_bits.items():
        if name not in site_of:  # a part of a plan
            continue
        site, s = site_of[name]
        rows, width = s.out_features, site.in_features
        found[name] = Quantised.empty(rows, width, bits, dtype_of(site.name), device)
    return found


def _empty_heads(
    plan: Plan, one: Heads, dtype_of: Callable[[str], torch.dtype], device: torch.device
) -> NarrowedHeads:
    """Of the heads of one attention."""
    sites = {s.name: (site, s) for site in plan.sites for s in site.slices}
    values: dict[str, torch.Tensor] = {}
    consumers: dict[str, torch.Tensor] = {}
    biases: dict[str, torch.Tensor] = {}
    for name in one.slices_among(plan.sites):
        site, s = sites[name]
        is_value = name in one.values
        shape = (
            (s.out_features // one.of * one.kept, site.in_features)
            if is_value
            else (s.out_features, one.heads * one.kept)
        )
        weight = torch.empty(*shape, dtype=dtype_of(site.name), device=device)
        (values if is_value else consumers)[name] = weight
        if is_value and site.bias:
            biases[name] = weight.new_empty(shape[0])
    return NarrowedHeads(one.name, one.kept, one.of, values, consumers, biases)


def _empty_keys(
    plan: Plan,
    one: Keys,
    kept: tuple[int, ...],
    dtype_of: Callable[[str], torch.dtype],
    device: torch.device,
) -> NarrowedKeys:
    """Of the queries and keys of one attention."""
    sites = {s.name: (site, s) for site in plan.sites for s in site.slices}
    weights, biases = {}, {}
    for name in one.slices_among(plan.sites):
        site, s = sites[name]
        rows = s.out_features // one.of * one.kept
        weights[name] = torch.empty(
            rows, site.in_features, dtype=dtype_of(site.name), device=device
        )
        if site.bias:
            biases[name] = weights[name].new_empty(rows)
    queries = {name: weights.pop(name) for name in one.queries}
    return NarrowedKeys(one.name, kept, one.of, queries, weights, biases)


def _empty_whole_heads(
    plan: Plan,
    one: WholeHeads,
    kept: tuple[int, ...],
    dtype_of: Callable[[str], torch.dtype],
    device: torch.device,
) -> DroppedHeads:
    """Of the heads of one attention."""
    sites = {s.name: (site, s) for site in plan.sites for s in site.slices}
    units = one.units_of({name: sites[name][1].out_features for name in one.own}, kept)
    weights, biases, consumers = {}, {}, {}
    for name in one.slices_among(plan.sites):
        site, s = sites[name]
        dtype = dtype_of(site.name)
        if name not in units:
            inputs = site.in_features // one.of * one.kept
            consumers[name] = torch.empty(s.out_features, inputs, dtype=dtype, device=device)
            continue
        rows = units[name].size
        weights[name] = torch.empty(rows, site.in_features, dtype=dtype, device=device)
        if site.bias:
            biases[name] = weights[name].new_empty(rows)
    queries, keys, values = (
        {name: weights[name] for name in names} for names in (one.queries, one.keys, one.values)
    )
    return DroppedHeads(one.name, kept, one.of, queries, keys, values, consumers, biases)


def selected(
    plan: Plan,
    one: Units,
    kept: tuple[int, ...],
    weights: Mapping[str, torch.Tensor],
    biases: Mapping[str, torch.Tensor] | None = None,
) -> SelectedUnits:
    """What the pass takes: which units stay, and the consumer's tensors by slice."""
    rows = {
        s.name: (s.stop - s.start) // one.of
        for site in plan.sites
        if site.name in one.producers
        for s in site.slices
    }
    turns = frozenset(
        s.name for site in plan.sites if site.name in one.alternating for s in site.slices
    )
    return SelectedUnits(one.name, kept, one.of, rows, dict(weights), dict(biases or {}), turns)
