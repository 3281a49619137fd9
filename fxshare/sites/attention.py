"""The attention calls of a captured graph: heads that may be narrower, found by structure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from fxshare.sites.called import Called
from fxshare.sites.mlps import SIDE_BY_SIDE
from fxshare.sites.site import Site, SliceSpec
from passes import NotHeads, attention_heads, reads_own


@dataclass(frozen=True)
class Attention:
    """The site that reads heads, and the slices that compute the values, with how many key-value
    heads each has, in their order."""

    values: tuple[tuple[Site, SliceSpec], ...]
    consumer: Site
    width: int
    """Of a head."""

    @property
    def heads(self) -> int:
        """How many the consumer reads."""
        return self.consumer.in_features // self.width

    @property
    def kv_heads(self) -> int:
        """How many the values have."""
        return sum(s.out_features for _, s in self.values) // self.width


@dataclass(frozen=True)
class Attentions:
    """The attention calls of a graph, and why other sites read no heads, by the site's name."""

    found: tuple[Attention, ...]
    reasons: Mapping[str, str]

    def of(self, consumer: str) -> Attention | None:
        """The attention of a consumer."""
        return next((one for one in self.found if one.consumer.name == consumer), None)


def attentions(
    gm: fx.GraphModule, sites: Sequence[Site], *, side_by_side: bool = False
) -> Attentions:
    """The attention calls among the sites of a captured graph, before it is rewritten."""
    if side_by_side:
        return Attentions((), {site.name: SIDE_BY_SIDE for site in sites})
    called = Called.of(gm, sites)
    found, reasons = [], {}
    for site in called.sites:
        try:
            found.append(_attention(gm, site, called))
        except NotHeads as fault:
            reasons[site.name] = str(fault)
    return Attentions(tuple(found), reasons)


def _attention(
    gm: fx.GraphModule,
    consumer: Site,
    called: Called,
) -> Attention:
    own = {call.node for call in called.calls.get(consumer.name, ())}
    if not own:
        raise NotHeads("is not called")
    found = attention_heads(gm, own, called.leaf, consumer.in_features)
    if not reads_own(found, called.products):
        raise NotHeads(
            "reads values of other tokens than its queries are (cross-attention): they are "
            "computed once and kept, by graphs that do not have both"
        )
    sites = dict.fromkeys(called.made[node] for node in found.leaves)
    if consumer in sites:
        raise NotHeads("reads what it computes itself")
    slices = {s.name: (site, s) for site in sites for s in site.slices}
    for site in sites:
        if any(call.node not in found.leaves for call in called.calls[site.name]):
            raise NotHeads(f"reads what {site.name!r} computes for something else as well")
    values = tuple(slices[name] for name in found.slices)
    return Attention(values, consumer, found.width)


__all__ = ["Attention", "Attentions", "attentions"]
