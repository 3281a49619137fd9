"""Watch what is looked up: the other half of the calibrating stage for embeddings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import fx, nn

from passes.base import Pass
from passes.graph.graph import named_node, read_instead
from passes.graph.lookups import lookups

_KEY = "lookups observed"


@dataclass(frozen=True, eq=False)
class ObserveLookups(Pass):
    """A counter of row numbers, and a tap for the gradient, at every lookup of the named weights.

    Before::

        e = self.wte(ids)

    After::

        counter_0 = self.counter_0(ids, attention_mask)
        e = self.wte(ids)
        lookup_tap_0 = self.lookup_tap_0(e, attention_mask)   # the identity

    Every reader of ``e`` reads the tap instead. ``new_counter`` makes a module from the number of
    rows, ``new_tap`` one from their width, or is None for no taps; ``mask`` names the node that is
    given to both as the second argument.
    """

    name: ClassVar[str] = "observe-lookups"
    exact: ClassVar[bool] = True

    sites: tuple[str, ...] = ()
    new_counter: Callable[[int], nn.Module] = nn.Identity
    new_tap: Callable[[int], nn.Module] | None = None
    mask: str | None = None

    def requires(self, gm: fx.GraphModule) -> None:
        named_node(gm, self.mask, self.name)

    def rewrite(self, gm: fx.GraphModule) -> int:
        mask = named_node(gm, self.mask, self.name)
        rest = () if mask is None else (mask,)
        found: dict[str, tuple[tuple[str, str | None], ...]] = {}
        number = 0
        for lookup in lookups(gm):
            if lookup.name not in self.sites:
                continue
            while hasattr(gm, f"counter_{number}") or hasattr(gm, f"lookup_tap_{number}"):
                number += 1
            counter, tap = f"counter_{number}", None
            rows, width = lookup.weight_VI.shape
            gm.add_module(counter, self.new_counter(rows))
            with gm.graph.inserting_before(lookup.node):
                gm.graph.call_module(counter, (lookup.ids, *rest))
            if self.new_tap is not None:
                tap = f"lookup_tap_{number}"
                gm.add_module(tap, self.new_tap(width))
                with gm.graph.inserting_after(lookup.node):
                    tapped = gm.graph.call_module(tap, (lookup.node, *rest))
                read_instead(lookup.node, tapped)
            found[lookup.name] = (*found.get(lookup.name, ()), (counter, tap))
        gm.meta[_KEY] = found
        return sum(len(names) for names in found.values())


def observed_lookups(gm: fx.GraphModule) -> Mapping[str, tuple[tuple[str, str | None], ...]]:
    """The names of the counter and the tap at every lookup of each weight."""
    found: Mapping[str, tuple[tuple[str, str | None], ...]] = gm.meta.get(_KEY, {})
    return found
