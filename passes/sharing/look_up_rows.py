"""Give a weight that is looked up, and perhaps multiplied by as well, one owner."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar, TypeVar

from torch import Tensor, fx, nn

from passes.base import Pass
from passes.errors import EnsuresError, RequiresError
from passes.graph.graph import (
    LinearCall,
    erase_dead,
    linear_calls,
    linear_input,
    new_linear,
    put_module,
)
from passes.graph.lookups import Lookup, look_up, lookups
from passes.graph.operands import chain, readers
from passes.graph.sizes import make_constant
from passes.graph.slices import Slice, set_slices
from passes.sharing.split_linear import same_memory

ReaderT = TypeVar("ReaderT", Lookup, LinearCall)


@dataclass(frozen=True)
class LookedUp:
    """One weight whose rows are looked up: the embeddings and the linears that read it, and the
    name of the linear that will own it."""

    name: str
    lookups: tuple[str, ...]
    calls: tuple[str, ...] = ()


@dataclass(frozen=True)
class LookUpRows(Pass):
    """An embedding, and a linear tied to it, read one ``nn.Linear``; nothing is copied.

    Before::

        e = self.wte(ids)                             # Embedding(V, I)
        logits = self.lm_head(x)                      # Linear(I, V), the same weight

    After::

        e = torch.nn.functional.embedding(ids, self.wte.weight)
        logits = self.wte(x)                          # Linear(I, V): the one owner

    The rows are a slice like any other then: :class:`passes.ShareBasis` gives it a basis.
    """

    name: ClassVar[str] = "look-up-rows"
    exact: ClassVar[bool] = True

    sites: tuple[LookedUp, ...] = ()

    def requires(self, gm: fx.GraphModule) -> None:
        found = lookups(gm)
        linears = linear_calls(gm)
        for site in self.sites:
            reading = [x for x in found if x.name in site.lookups]
            missing = set(site.lookups) - {x.name for x in reading}
            if missing or not site.lookups:
                raise RequiresError(
                    f"{self.name}: no node looks up rows of {min(missing, default=site.name)!r}; "
                    f"the graph has {sorted({x.name for x in found})[:6]}. Leave the site out, or "
                    "capture another way"
                )
            calls = [x for x in linears if x.name in site.calls]
            absent = set(site.calls) - {x.name for x in calls}
            if absent:
                raise RequiresError(f"{self.name}: no linear node reads {min(absent)!r}")
            first = reading[0].weight_VI
            tensors = [x.weight_VI for x in reading] + [x.weight_OI for x in calls]
            if not all(same_memory(first, t) for t in tensors):
                raise RequiresError(
                    f"{self.name}: the readers of site {site.name!r} have not one weight; a site "
                    "is one weight, make two sites"
                )
            if not all(same_memory(calls[0].bias_O, x.bias_O) for x in calls):
                raise RequiresError(f"{self.name}: the linears of {site.name!r} differ in bias")
            odd = other_reader(gm, site)
            if odd is not None:
                raise RequiresError(
                    f"{self.name}: the weight of {site.name!r} is also read by node {odd.name!r}, "
                    "which neither looks rows up nor multiplies; leave the site out"
                )

    def rewrite(self, gm: fx.GraphModule) -> int:
        by_lookup, by_call = _by_name(lookups(gm)), _by_name(linear_calls(gm))
        count = 0
        for site in self.sites:
            reading = [x for name in site.lookups for x in by_lookup[name]]
            calls = [x for name in site.calls for x in by_call[name]]
            _place(gm, site.name, reading[0].weight_VI, calls[0].bias_O if calls else None)
            for one in reading:
                with gm.graph.inserting_before(one.node):
                    rows = look_up(gm.graph, one.ids, f"{site.name}.weight", one.padding_idx)
                _replace(gm.graph, one.node, rows, keep=one.ids)
            for call in calls:
                # rewriting one may have changed the input of the next
                x = linear_input(call.node)
                assert isinstance(x, fx.Node)
                with gm.graph.inserting_before(call.node):
                    y = gm.graph.call_module(site.name, (x,))
                _replace(gm.graph, call.node, y, keep=x)
            for node in _shape_reads(gm, site):
                operand = node.args[0]
                assert isinstance(operand, fx.Node)
                make_constant(node, reading[0].weight_VI.shape)
                erase_dead(gm.graph, [operand])
            count += len(reading) + len(calls)
        return count

    def ensures(self, gm: fx.GraphModule) -> None:
        for site in self.sites:
            if not isinstance(gm.get_submodule(site.name), nn.Linear):
                raise EnsuresError(f"{self.name}: expected an nn.Linear at {site.name!r}")


def _by_name(found: list[ReaderT]) -> dict[str, list[ReaderT]]:
    named: dict[str, list[ReaderT]] = {}
    for one in found:
        named.setdefault(one.name, []).append(one)
    return named


def _place(gm: fx.GraphModule, name: str, weight_VI: Tensor, bias_V: Tensor | None) -> None:
    linear = new_linear(
        weight_VI, bias_V, requires_grad=weight_VI.requires_grad, training=gm.training
    )
    if bias_V is not None:
        linear.bias.requires_grad_(bias_V.requires_grad)
    put_module(gm, name, linear)
    set_slices(gm, {name: Slice(name, 0, len(weight_VI))})


def _replace(graph: fx.Graph, old: fx.Node, new: fx.Node, *, keep: fx.Node) -> None:
    operands = [n for read in old.all_input_nodes if read is not keep for n in chain(read)]
    new.meta.update(old.meta)
    old.replace_all_uses_with(new)
    graph.erase_node(old)
    erase_dead(graph, dict.fromkeys(operands))


def other_reader(gm: fx.GraphModule, site: LookedUp) -> fx.Node | None:
    """A node that reads the weight of a site, or its shape, in a way that has no counterpart once
    it is factors; None where there is none."""
    names = {*site.lookups, *site.calls}
    known = {x.node for x in lookups(gm) if x.name in names}
    known.update(x.node for x in linear_calls(gm) if x.name in names)
    known.update(_shape_reads(gm, site))
    for node in _weights(gm, site):
        for user in readers(node):
            if user not in known:
                return user
    return None


def _weights(gm: fx.GraphModule, site: LookedUp) -> list[fx.Node]:
    names = {f"{name}.weight" for name in (*site.lookups, *site.calls)}
    return [n for n in gm.graph.nodes if n.op == "get_attr" and str(n.target) in names]


def _shape_reads(gm: fx.GraphModule, site: LookedUp) -> list[fx.Node]:
    """Reads of the weight's shape, every entry by its number: constants, since weights keep it."""
    return [
        user
        for node in _weights(gm, site)
        for user in node.users
        if user.op == "call_method"
        and user.target == "size"
        and len(user.args) == 1
        and all(u.target is operator.getitem and isinstance(u.args[1], int) for u in user.users)
    ]
