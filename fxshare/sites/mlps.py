"""The MLPs of a captured graph: sites whose hidden units may go, found by structure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from fxshare.sites.called import Called
from fxshare.sites.site import Site
from passes import DropJoins, LinearCall, NotHidden, hidden_units, kept_joins, run, takes_apart


@dataclass(frozen=True)
class Mlp:
    """Sites that compute hidden units, in the graph's order, and the one that reads them."""

    producers: tuple[Site, ...]
    consumer: Site
    alternating: tuple[str, ...] = ()
    """The producers by name whose rows of one unit are neighbours: gate and up in turn."""

    @property
    def units(self) -> int:
        """How many hidden units there are."""
        return self.consumer.in_features


@dataclass(frozen=True)
class Mlps:
    """The MLPs of a graph, and why other sites read no hidden units, by the name of the site."""

    found: tuple[Mlp, ...]
    reasons: Mapping[str, str]

    def of(self, consumer: str) -> Mlp | None:
        """The MLP of a consumer."""
        return next((one for one in self.found if one.consumer.name == consumer), None)


SIDE_BY_SIDE = (
    "stands in no graph that shows what it reads (capture: modules); hidden units take capture: fx "
    "or export"
)


def mlps(gm: fx.GraphModule, sites: Sequence[Site], *, side_by_side: bool = False) -> Mlps:
    """The MLPs among the sites of a captured graph, before it is rewritten; those of experts are
    looked for in a graph that hands each expert what it made itself."""
    if side_by_side:
        return Mlps((), {site.name: SIDE_BY_SIDE for site in sites})
    joined: Mapping[fx.Node, str] = {}
    if takes_apart(gm):
        gm, _ = run(gm, [DropJoins()], code=False)
        joined = kept_joins(gm)
    called = Called.of(gm, sites)
    found, reasons = [], {}
    for site in called.sites:
        try:
            found.append(_mlp(gm, site, called.calls, called.made))
        except NotHidden as fault:
            whole = [
                joined[call.input]
                for call in called.calls.get(site.name, ())
                if call.input in joined
            ]
            reasons[site.name] = whole[0] if whole else str(fault)
    return Mlps(tuple(found), reasons)


def _mlp(
    gm: fx.GraphModule,
    consumer: Site,
    calls: Mapping[str, Sequence[LinearCall]],
    made: Mapping[fx.Node, Site],
) -> Mlp:
    own = {call.node for call in calls.get(consumer.name, ())}
    if not own:
        raise NotHidden("is not called")

    def leaf(node: fx.Node) -> tuple[str, int] | None:
        site = made.get(node)
        return None if site is None else (site.name, site.out_features)

    between = hidden_units(gm, own, leaf, consumer.in_features)
    producers = list(dict.fromkeys(made[node] for node in made if node in between.leaves))
    if consumer in producers:
        raise NotHidden("reads what it computes itself")
    for site in producers:
        if any(call.node not in between.leaves for call in calls[site.name]):
            raise NotHidden(f"reads what {site.name!r} computes for something else as well")
        if site.name in between.alternating:
            if len(site.slices) > 1:
                raise NotHidden(
                    f"reads rows of {site.name!r} in turn, which is split into "
                    f"{len(site.slices)} slices; leave its split out"
                )
            continue
        cut = [
            s
            for s in site.slices
            if s.start % consumer.in_features or s.stop % consumer.in_features
        ]
        if cut:
            raise NotHidden(f"reads {site.name!r}, whose slice {cut[0].name!r} is a part of a unit")
    turns = tuple(site.name for site in producers if site.name in between.alternating)
    return Mlp(tuple(producers), consumer, turns)


__all__ = ["SIDE_BY_SIDE", "Mlp", "Mlps", "mlps"]
