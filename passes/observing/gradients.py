"""Tap the outputs of linears for their gradients: the second half of the calibrating stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import fx, nn

from passes.base import Pass
from passes.graph.graph import linear_calls, named_node, read_instead

_KEY = "tapped"


@dataclass(frozen=True, eq=False)
class ObserveGradients(Pass):
    """One tap per call of the named linears.

    Before::

        q = self.q_proj(x)

    After::

        q = self.q_proj(x)
        tap_0 = self.tap_0(q, attention_mask)         # the identity; sees the gradient on its way

    Every reader of ``q`` reads ``tap_0`` instead. ``new_tap`` makes a module from the name of the
    linear; ``mask`` names the node that is given to it as the second argument.
    """

    name: ClassVar[str] = "observe-gradients"
    exact: ClassVar[bool] = True

    sites: tuple[str, ...] = ()
    new_tap: Callable[[str], nn.Module] = nn.Identity
    mask: str | None = None

    def requires(self, gm: fx.GraphModule) -> None:
        named_node(gm, self.mask, self.name)

    def rewrite(self, gm: fx.GraphModule) -> int:
        mask = named_node(gm, self.mask, self.name)
        found: dict[str, tuple[str, ...]] = {}
        count = 0
        for call in linear_calls(gm):
            if call.name not in self.sites:
                continue
            while hasattr(gm, f"tap_{count}"):
                count += 1
            name = f"tap_{count}"
            gm.add_module(name, self.new_tap(call.name))
            arguments = (call.node,) if mask is None else (call.node, mask)
            with gm.graph.inserting_after(call.node):
                tap = gm.graph.call_module(name, arguments)
            read_instead(call.node, tap)
            found[call.name] = (*found.get(call.name, ()), name)
        gm.meta[_KEY] = found
        return sum(len(names) for names in found.values())


def tapped(gm: fx.GraphModule) -> Mapping[str, tuple[str, ...]]:
    """The names of the taps that see the output gradients of each linear."""
    found: Mapping[str, tuple[str, ...]] = gm.meta.get(_KEY, {})
    return found
