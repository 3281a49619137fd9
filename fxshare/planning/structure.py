"""Whether a graph has what an entry of a plan takes."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from fxshare.plans.heads import Heads
from fxshare.plans.keys import Keys
from fxshare.plans.units import Units
from fxshare.sites.attention import attentions
from fxshare.sites.mlps import mlps
from fxshare.sites.scores import all_scores
from fxshare.sites.site import Site


def fault_in_graph(
    one: Units, graph: fx.GraphModule, sites: Sequence[Site], *, side_by_side: bool = False
) -> str | None:
    """Why an entry of a plan is none of a captured graph; None where it is."""
    if isinstance(one, Heads):
        return _fault_of_heads(one, graph, sites, side_by_side)
    if isinstance(one, Keys):
        return _fault_of_keys(one, graph, sites, side_by_side)
    known = mlps(graph, sites, side_by_side=side_by_side)
    found = known.of(one.consumer)
    if found is None:
        return f"{one.consumer!r} {known.reasons[one.consumer]}; leave the entry out"
    producers = {site.name for site in found.producers}
    if producers != set(one.producers):
        return (
            f"{one.consumer!r} reads what {sorted(producers)} compute, found the producers "
            f"{sorted(one.producers)}"
        )
    return None


def _fault_of_heads(
    one: Heads, graph: fx.GraphModule, sites: Sequence[Site], side_by_side: bool
) -> str | None:
    known = attentions(graph, sites, side_by_side=side_by_side)
    found = known.of(one.consumer)
    if found is None:
        return f"{one.consumer!r} {known.reasons[one.consumer]}; leave the entry out"
    values = [s.name for _, s in found.values]
    if (found.width, found.kv_heads, values) != (one.of, one.kv_heads, list(one.values)):
        return (
            f"{one.consumer!r} reads {found.kv_heads} heads of {found.width} from {values}, found "
            f"{one.kv_heads} of {one.of} from {list(one.values)}"
        )
    return None


def _fault_of_keys(
    one: Keys, graph: fx.GraphModule, sites: Sequence[Site], side_by_side: bool
) -> str | None:
    known = all_scores(graph, sites, side_by_side=side_by_side)
    found = known.of(one.queries)
    if found is None:
        reason = known.reasons.get(one.consumer, "has other queries")
        return f"{one.consumer!r} {reason}; leave the entry out"
    keys = [s.name for _, s in found.keys]
    there = found.kv_heads, found.width, found.rotary, found.rotated
    if (*there, keys) != (one.kv_heads, one.of, one.rotary, one.rotated, list(one.keys)):
        return (
            f"{one.queries[0]!r} is multiplied by {found.kv_heads} keys of {found.width} from "
            f"{keys[:4]}, of which {found.rotated} numbers are turned ({found.rotary}); found "
            f"{one.kv_heads} of {one.of} from {list(one.keys)[:4]}, {one.rotated} ({one.rotary})"
        )
    return None


__all__ = ["fault_in_graph"]
