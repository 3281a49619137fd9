"""Where a captured graph calls the linears of sites: what structures are looked for from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import fx

from fxshare.sites.site import Site
from passes import LinearCall, linear_calls


@dataclass(frozen=True, eq=False)
class Called:
    """The linears of a graph; sites whose rows are looked up are left out."""

    sites: tuple[Site, ...]
    calls: dict[str, list[LinearCall]] = field(default_factory=dict)
    """Of every site, by its name."""
    made: dict[fx.Node, Site] = field(default_factory=dict)
    """The site of each product of one."""
    products: dict[fx.Node, fx.Node] = field(default_factory=dict)
    """What each product reads, those of linears that are no sites as well."""

    @staticmethod
    def of(gm: fx.GraphModule, sites: Sequence[Site]) -> Called:
        """Of a captured graph, before it is rewritten."""
        known = {name: site for site in sites if not site.lookups for name in site.calls}
        found = Called(tuple(dict.fromkeys(known.values())))
        for call in linear_calls(gm):
            found.products[call.node] = call.input
            if call.name in known:
                found.calls.setdefault(known[call.name].name, []).append(call)
                found.made[call.node] = known[call.name]
        return found

    def leaf(self, node: fx.Node) -> dict[str, int] | None:
        """The slices that a node computes with the rows of each; None where it is no product of a
        site."""
        site = self.made.get(node)
        return None if site is None else {s.name: s.out_features for s in site.slices}
