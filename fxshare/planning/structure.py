"""Whether a graph has what the entries of a plan take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import fx

from fxshare.plans.heads import Heads
from fxshare.plans.keys import Keys
from fxshare.plans.units import Units
from fxshare.plans.whole_heads import WholeHeads
from fxshare.sites.attention import Attentions, attentions
from fxshare.sites.head_groups import AllHeadGroups, head_groups
from fxshare.sites.mlps import Mlps, mlps
from fxshare.sites.scores import AllScores, all_scores
from fxshare.sites.site import Site


@dataclass(frozen=True)
class Structure:
    """What of a captured graph the entries of a plan may take, found when it is asked for."""

    graph: fx.GraphModule
    sites: Sequence[Site]
    side_by_side: bool = False

    def fault(self, one: Units) -> str | None:
        """Why an entry of a plan is none of the graph; None where it is."""
        if isinstance(one, Heads):
            return self._fault_of_heads(one)
        if isinstance(one, Keys):
            return self._fault_of_keys(one)
        if isinstance(one, WholeHeads):
            return self._fault_of_whole_heads(one)
        found = self._mlps.of(one.consumer)
        if found is None:
            return f"{one.consumer!r} {self._mlps.reasons[one.consumer]}; leave the entry out"
        producers = {site.name for site in found.producers}
        if producers != set(one.producers):
            return (
                f"{one.consumer!r} reads what {sorted(producers)} compute, found the producers "
                f"{sorted(one.producers)}"
            )
        if set(found.alternating) != set(one.alternating):
            return (
                f"{one.consumer!r} reads the rows of {sorted(found.alternating)} in turn, found "
                f"the alternating {sorted(one.alternating)}"
            )
        return None

    @cached_property
    def _mlps(self) -> Mlps:
        return mlps(self.graph, self.sites, side_by_side=self.side_by_side)

    @cached_property
    def _attentions(self) -> Attentions:
        return attentions(self.graph, self.sites, side_by_side=self.side_by_side)

    @cached_property
    def _scores(self) -> AllScores:
        return all_scores(self.graph, self.sites, side_by_side=self.side_by_side)

    @cached_property
    def _head_groups(self) -> AllHeadGroups:
        by_side = self.side_by_side
        return head_groups(self.graph, self.sites, side_by_side=by_side, among=self._attentions)

    def _fault_of_whole_heads(self, one: WholeHeads) -> str | None:
        found = self._head_groups.of(one.consumer)
        if found is None:
            reason = self._head_groups.reasons[one.consumer]
            return f"{one.consumer!r} {reason}; leave the entry out"
        own = one.queries, one.keys, one.values
        if (found.heads, found.kv_heads, found.slices) != (one.heads, one.of, own):
            names = [s.name for _, s in found.owned]
            return (
                f"{one.consumer!r} reads {found.heads} heads with {found.kv_heads} keys and values "
                f"from {names[:6]}, found {one.heads} with {one.of} from {list(one.own)[:6]}"
            )
        return None

    def _fault_of_heads(self, one: Heads) -> str | None:
        found = self._attentions.of(one.consumer)
        if found is None:
            return f"{one.consumer!r} {self._attentions.reasons[one.consumer]}; leave the entry out"
        values = [s.name for _, s in found.values]
        if (found.width, found.kv_heads, values) != (one.of, one.kv_heads, list(one.values)):
            return (
                f"{one.consumer!r} reads {found.kv_heads} heads of {found.width} from {values}, "
                f"found {one.kv_heads} of {one.of} from {list(one.values)}"
            )
        return None

    def _fault_of_keys(self, one: Keys) -> str | None:
        found = self._scores.of(one.queries)
        if found is None:
            reason = self._scores.reasons.get(one.consumer, "has other queries")
            return f"{one.consumer!r} {reason}; leave the entry out"
        keys = [s.name for _, s in found.keys]
        there = found.kv_heads, found.width, found.rotary, found.rotated
        if (*there, keys) != (one.kv_heads, one.of, one.rotary, one.rotated, list(one.keys)):
            return (
                f"{one.queries[0]!r} is multiplied by {found.kv_heads} keys of {found.width} from "
                f"{keys[:4]}, of which {found.rotated} numbers are turned ({found.rotary}); found "
                f"{one.kv_heads} of {one.of} from {list(one.keys)[:4]}, {one.rotated} "
                f"({one.rotary})"
            )
        return None


__all__ = ["Structure"]
