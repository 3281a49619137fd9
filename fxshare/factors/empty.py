"""Factors without values, of a plan's shapes: what loading fills."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fxshare.plans.plan import Plan
from passes import PivotedGroup, SharedGroup


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
