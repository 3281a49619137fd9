"""The default passes for a plan, applied to a captured graph."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from torch import fx

from fxshare.base.progress import stage
from fxshare.plans.plan import Plan
from fxshare.plans.storage import PIVOTED
from passes import (
    Applied,
    LookedUp,
    Pass,
    PivotedGroup,
    Rows,
    SharedGroup,
    SplitSite,
    StoreCodes,
    default_passes,
    run,
)
from passes.pipeline import Narrower

_LOG = logging.getLogger(__name__)


def rewrite(
    graph: fx.GraphModule,
    plan: Plan,
    groups: Sequence[SharedGroup],
    fuse: bool,
    extra: Sequence[Pass] = (),
    *,
    pivots: Sequence[PivotedGroup] = (),
    units: Sequence[Narrower] = (),
    codes: StoreCodes | None = None,
    apart: bool = False,
) -> tuple[fx.GraphModule, tuple[Applied, ...]]:
    """Apply the default passes for a plan to a captured graph; the result has no code of its own,
    and is to be put into another module. ``apart`` says that the graph has its linears side by
    side."""
    sites = [
        SplitSite(site.calls, tuple(Rows(s.name, s.start, s.stop) for s in site.slices))
        for site in plan.sites
        if not site.lookups
    ]
    looked_up = [
        LookedUp(site.slices[0].name, site.lookups, site.calls)
        for site in plan.sites
        if site.lookups
    ]
    passes = default_passes(
        sites,
        groups,
        PIVOTED.passes(pivots),
        fuse=fuse,
        extra=extra,
        looked_up=looked_up,
        units=units,
        codes=codes,
        apart=apart,
    )
    with stage("rewrite", _LOG) as running:
        result, applied = run(graph, passes, code=False)
        running.found(f"{sum(a.rewrites for a in applied)} rewrites by {len(applied)} passes")
    return result, applied
