"""Insert observers: the calibrating stage of a graph."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import fx, nn

from passes.base import Pass
from passes.graph.graph import LinearCall, linear_calls, named_node
from passes.graph.writes import is_written

_KEY = "observed"


@dataclass(frozen=True, eq=False)
class ObserveInputs(Pass):
    """One observer per distinct input of the named linears.

    Before::

        q = self.q_proj(x);  k = self.k_proj(x)

    After::

        observer_0 = self.observer_0(x, attention_mask)
        q = self.q_proj(x);  k = self.k_proj(x)

    ``new_observer`` makes a module from the number of input features; ``mask`` names the node that
    is given to it as the second argument. :func:`observed` says who saw what.
    """

    name: ClassVar[str] = "observe-inputs"
    exact: ClassVar[bool] = True

    sites: tuple[str, ...] = ()
    new_observer: Callable[[int], nn.Module] = nn.Identity
    mask: str | None = None

    def requires(self, gm: fx.GraphModule) -> None:
        named_node(gm, self.mask, self.name)

    def rewrite(self, gm: fx.GraphModule) -> int:
        mask = named_node(gm, self.mask, self.name)
        seen: dict[object, str] = {}
        found: dict[str, tuple[str, ...]] = {}
        for key, call in reads(gm, self.sites):
            if key not in seen:
                number = len(seen)
                while hasattr(gm, f"observer_{number}"):  # the model's own, or an earlier run's
                    number += 1
                name = f"observer_{number}"
                observer = self.new_observer(call.weight_OI.shape[1])
                gm.add_module(name, observer)
                arguments = (call.input,) if mask is None else (call.input, mask)
                with gm.graph.inserting_before(call.node):
                    gm.graph.call_module(name, arguments)
                seen[key] = name
            if seen[key] not in found.get(call.name, ()):
                found[call.name] = (*found.get(call.name, ()), seen[key])
        gm.meta[_KEY] = found
        return len(seen)


def reads(gm: fx.GraphModule, sites: Collection[str]) -> Iterator[tuple[object, LinearCall]]:
    """The calls of the named linears in order, each with what is equal for those that read one
    activation."""
    for call in linear_calls(gm):
        if call.name in sites:
            # an input that is written into in place may differ from one read to the next
            yield (call.input, call.node) if is_written(call.input) else call.input, call


def observed(gm: fx.GraphModule) -> Mapping[str, tuple[str, ...]]:
    """The names of the observers that saw the inputs of each linear."""
    found: Mapping[str, tuple[str, ...]] = gm.meta.get(_KEY, {})
    return found
