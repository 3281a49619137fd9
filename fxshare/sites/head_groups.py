"""The attention calls of a captured graph of which whole heads may go, found by structure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from fxshare.sites.attention import Attentions, attentions
from fxshare.sites.called import Called
from fxshare.sites.mlps import SIDE_BY_SIDE
from fxshare.sites.site import Site, SliceSpec
from passes import NotWhole, whole_heads
from passes.graph.whole_heads import without

Owned = tuple[Site, SliceSpec]


@dataclass(frozen=True)
class HeadGroups:
    """The slices that compute the queries, keys and values of one attention, and the site that
    reads its heads. Query heads that share one key and one value are a group, which goes whole;
    where each has its own, that is a head."""

    queries: tuple[Owned, ...]
    keys: tuple[Owned, ...]
    values: tuple[Owned, ...]
    """All three in the order of their heads."""
    consumer: Site
    heads: int
    """How many the queries have."""
    kv_heads: int
    """How many keys and values have: so many groups there are."""

    @property
    def owned(self) -> tuple[Owned, ...]:
        """Queries, keys and values."""
        return *self.queries, *self.keys, *self.values

    @property
    def slices(self) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
        """The slices of queries, keys and values by name."""
        q, k, v = (tuple(s.name for _, s in own) for own in (self.queries, self.keys, self.values))
        return q, k, v

    @property
    def sites(self) -> dict[str, Site]:
        """All sites by name, the consumer last."""
        return {site.name: site for site, _ in self.owned} | {self.consumer.name: self.consumer}


@dataclass(frozen=True)
class AllHeadGroups:
    """The attention calls of a graph of which whole heads may go, and why of others none may, by
    the name of the site that reads the heads."""

    found: tuple[HeadGroups, ...]
    reasons: Mapping[str, str]

    def of(self, consumer: str) -> HeadGroups | None:
        """Those of a consumer."""
        return next((one for one in self.found if one.consumer.name == consumer), None)


def head_groups(
    gm: fx.GraphModule,
    sites: Sequence[Site],
    *,
    side_by_side: bool = False,
    among: Attentions | None = None,
) -> AllHeadGroups:
    """The attention calls among the sites of a captured graph, before it is rewritten; ``among``
    are those that were found in it already."""
    if side_by_side:
        return AllHeadGroups((), {site.name: SIDE_BY_SIDE for site in sites})
    narrower = among or attentions(gm, sites)
    called = Called.of(gm, sites)
    found, reasons = [], dict(narrower.reasons)
    for one in narrower.found:
        try:
            found.append(_groups(gm, one.consumer, called))
        except NotWhole as fault:
            reasons[one.consumer.name] = str(fault)
    return AllHeadGroups(tuple(found), reasons)


def _groups(gm: fx.GraphModule, consumer: Site, called: Called) -> HeadGroups:
    nodes = {call.node for call in called.calls[consumer.name]}
    found = whole_heads(gm, nodes, called.leaf, consumer.in_features)
    # what lies between must do with fewer heads, whichever these are
    for gone in (0, found.groups - 1):
        for heads in (found.values, found.scores):
            without(gm, heads, [n for n in range(found.groups) if n != gone])
    leaves = {**found.values.leaves, **found.scores.leaves}
    sites = dict.fromkeys(called.made[node] for node in leaves)
    for site in sites:
        if any(call.node not in leaves for call in called.calls[site.name]):
            raise NotWhole(f"reads what {site.name!r} computes for something else as well")
    slices = {s.name: (site, s) for site in sites for s in site.slices}
    queries, keys, values = (tuple(slices[name] for name in own) for own in found.slices)
    return HeadGroups(queries, keys, values, consumer, found.values.heads, found.groups)


__all__ = ["AllHeadGroups", "HeadGroups", "head_groups"]
