"""What computes the scores of an attention in a captured graph: queries and keys that may be
narrower, found by structure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from fxshare.sites.called import Called
from fxshare.sites.mlps import SIDE_BY_SIDE
from fxshare.sites.site import Site, SliceSpec
from passes import (
    LinearCall,
    NotScores,
    attention_scores,
    calls_by_slices,
    operands_of,
    score_calls,
    together,
)
from passes.graph.heads import inputs_before, linears_before
from passes.graph.layouts import Unknown
from passes.graph.moved import Leaf
from passes.graph.scores import Rotary
from passes.graph.scores import Scores as Found
from passes.graph.trimming import trim
from passes.graph.turned import Turned

Owned = tuple[Site, SliceSpec]


@dataclass(frozen=True)
class Scores:
    """The slices that compute queries, of one site, and those that compute keys, both in the order
    of their heads."""

    queries: tuple[Owned, ...]
    keys: tuple[Owned, ...]
    width: int
    """Of a head."""
    rotary: Rotary = "none"
    rotated: int = 0
    """How many numbers of a head are turned by rotary embeddings, the first ones."""

    @property
    def consumer(self) -> Site:
        """The site of the queries."""
        return self.queries[0][0]

    @property
    def heads(self) -> int:
        """How many heads the queries have."""
        return sum(s.out_features for _, s in self.queries) // self.width

    @property
    def kv_heads(self) -> int:
        """How many the keys have."""
        return sum(s.out_features for _, s in self.keys) // self.width

    @property
    def sites(self) -> dict[str, Site]:
        """All sites by name."""
        return {site.name: site for site, _ in (*self.keys, *self.queries)}

    @property
    def slices(self) -> tuple[str, ...]:
        """All slices by name."""
        return tuple(s.name for _, s in (*self.queries, *self.keys))


@dataclass(frozen=True)
class AllScores:
    """The queries and keys of a graph, and why those of other products are none, by the name of
    the first site that something computes there."""

    found: tuple[Scores, ...]
    reasons: Mapping[str, str]

    def of(self, queries: Sequence[str]) -> Scores | None:
        """Those whose queries are these slices."""
        names = list(queries)
        return next((x for x in self.found if [s.name for _, s in x.queries] == names), None)


def all_scores(
    gm: fx.GraphModule, sites: Sequence[Site], *, side_by_side: bool = False
) -> AllScores:
    """The queries and keys among the sites of a captured graph, before it is rewritten."""
    if side_by_side:
        return AllScores((), {site.name: SIDE_BY_SIDE for site in sites})
    called = Called.of(gm, sites)
    leaf, made = called.leaf, called.made
    found: list[Scores] = []
    reasons: dict[str, str] = {}
    seen: set[fx.Node] = set()
    for nodes in calls_by_slices(gm, leaf).values():
        seen.update(nodes)
        queries = _source(gm, nodes[0], leaf, made)
        try:
            found.append(
                _scores(gm, attention_scores(gm, nodes, leaf), called.calls, made, called.products)
            )
        except NotScores as fault:
            reasons.setdefault(queries, str(fault))
    for node in score_calls(gm):
        if node not in seen:
            _add_reason(gm, node, leaf, made, reasons)
    for site in called.sites:
        reasons.setdefault(site.name, "computes no queries that are multiplied by keys")
    return AllScores(tuple(found), reasons)


def _source(gm: fx.GraphModule, call: fx.Node, leaf: Leaf, made: Mapping[fx.Node, Site]) -> str:
    """The site that the first operand of a product comes from."""
    moved = Turned(gm, leaf, 0)
    moved.layout(operands_of(call)[0])
    return made[next(iter(moved.leaves))].name


def _add_reason(
    gm: fx.GraphModule,
    call: fx.Node,
    leaf: Leaf,
    made: Mapping[fx.Node, Site],
    reasons: dict[str, str],
) -> None:
    """Why the linears next before a product are no queries or keys of it."""
    for end in operands_of(call):
        if not isinstance(end, fx.Node):
            continue
        try:
            Turned(gm, leaf, 0).layout(end)
        except Unknown as fault:
            for node in linears_before(end, made):
                reasons.setdefault(made[node].name, str(fault))


def _scores(
    gm: fx.GraphModule,
    found: Found,
    calls: Mapping[str, Sequence[LinearCall]],
    made: Mapping[fx.Node, Site],
    products: Mapping[fx.Node, fx.Node],
) -> Scores:
    for call in found.calls:
        query, key = (inputs_before(end, products) for end in operands_of(call))
        if not query & key:
            raise NotScores(
                "has keys of other tokens than its queries are (cross-attention): they are "
                "computed once and kept, by graphs that do not have both"
            )
    # what lies between must do with fewer numbers of a head, whichever these are
    numbers = together(found.rotary, found.rotated, found.width)
    for gone in (numbers[0], numbers[-1]) if len(numbers) > 1 else ():
        trim(gm, found, [n for group in numbers for n in group if n not in gone])
    sites = dict.fromkeys(made[node] for node in found.leaves)
    slices = {s.name: (site, s) for site in sites for s in site.slices}
    queries, keys = (
        tuple(slices[n] for n in names) for names in (found.query_slices, found.slices)
    )
    if len({site.name for site, _ in queries}) > 1:
        raise NotScores("has queries of several weights")
    for site in sites:
        if any(call.node not in found.leaves for call in calls[site.name]):
            raise NotScores(f"has queries or keys that {site.name!r} computes for something else")
    return Scores(queries, keys, found.width, found.rotary, found.rotated)


__all__ = ["AllScores", "Scores", "all_scores"]
