"""Factors without values have a plan's shapes and each site's dtype."""

from __future__ import annotations

import torch

from fxshare.factors.empty import empty_factors
from tests.planning.models import FEW, compiled, llama


def test_shapes_are_the_plans_and_dtypes_the_sites() -> None:
    q = {**FEW["weight_types"]["q"], "split": "heads", "n_head": 2}
    cfg = {**FEW, "weight_types": {"q": q}}
    planner = {"storage": "pivoted", "search": "off"}
    plan = compiled(llama(), cfg, {"params_kept": 0.6}, planner).fxshare.plan
    sites = {site.name: torch.float64 for site in plan.sites}
    groups, pivots = empty_factors(plan, sites.__getitem__, torch.device("meta"))
    outputs = {s.name: s.out_features for site in plan.sites for s in site.slices}
    assert [g.name for g in groups] == [g.name for g in pivots] == [g.name for g in plan.groups]
    for group, factors, stored in zip(plan.groups, groups, pivots, strict=True):
        assert factors.basis_RI.shape == (group.rank, group.in_features)
        assert factors.basis_RI.dtype == torch.float64
        assert factors.basis_RI.is_meta
        assert list(factors.coefficients) == list(group.slices)
        for name, one in factors.coefficients.items():
            assert one.shape == (outputs[name], group.rank)
            assert one.dtype == torch.float64
        assert stored.kept_J.shape == (group.rank,)
        assert stored.table_RT.shape == (group.rank, group.in_features - group.rank)
