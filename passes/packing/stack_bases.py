"""One matmul for several bases that read one input."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import fx, nn

from passes.base import Pass
from passes.graph.graph import linear_at, put_module
from passes.graph.lookups import only_called
from passes.graph.origins import moved
from passes.graph.slices import Slice, set_slices, slices
from passes.graph.writes import Written
from passes.packing.fuse_coefficients import fused_name, joined, kind_of

Places = list[list[fx.Node]]


@dataclass(frozen=True)
class StackBases(Pass):
    """The bases that read one input become the rows of one linear.

    Before::

        z_q = self.basis_q(x);  q = self.q_proj(z_q)
        z_k = self.basis_k(x);  k = self.k_proj(z_k)

    After::

        z = self.basis_q_basis_k(x)                     # Linear(I, R_q + R_k)
        z_q, z_k = torch.split(z, [R_q, R_k], -1)       # views
        q = self.q_proj(z_q);  k = self.k_proj(z_k)

    Only bases that are read together wherever they are read; with ``duplicate`` each set of bases
    that some input meets is stacked, and a basis of several sets is stored several times. Pivoted
    bases stay, because each reads the inputs in an order of its own.
    """

    name: ClassVar[str] = "stack-bases"
    exact: ClassVar[bool] = True

    duplicate: bool = False

    def rewrite(self, gm: fx.GraphModule) -> int:
        calls = _basis_calls(gm)
        sets = _sets(calls)
        if not self.duplicate:
            members = [name for names in sets for name in names]
            sets = {
                names: places
                for names, places in sets.items()
                if all(members.count(name) == 1 for name in names)
            }
        sets = {names: places for names, places in sets.items() if len(names) > 1}
        old = {name: linear_at(gm, name) for names in sets for name in names}
        for names, places in sets.items():
            _stack(gm, names, [old[name] for name in names], places)
        called = only_called(gm)
        for name, linear in old.items():
            if name in called:
                moved(gm, [name], name, [linear.out_features])
            else:
                delattr(gm, name)
        return sum(len(places) for places in sets.values())


def _basis_calls(gm: fx.GraphModule) -> Mapping[str, list[fx.Node]]:
    """The calls of bases that may be stacked: all of a basis' calls, or none."""
    bases = {p.basis for p in slices(gm).values() if p.basis and not p.pivoted and not p.basis_rows}
    calls, written = only_called(gm), Written()
    return {
        name: nodes
        for name, nodes in calls.items()
        if name in bases and not any(written[n] for m in nodes for n in (m, *m.all_input_nodes))
    }


def _sets(calls: Mapping[str, Iterable[fx.Node]]) -> dict[tuple[str, ...], Places]:
    """The sets of bases that meet at an input, and their calls there, in the sets' order."""
    meeting: dict[tuple[object, ...], list[fx.Node]] = {}
    for nodes in calls.values():
        for node in nodes:
            owner = node.graph.owning_module
            assert owner is not None
            kind = kind_of(linear_at(owner, str(node.target)))
            found = meeting.setdefault((node.args[0], *kind), [])
            # called twice with one input: the second call is for ReuseBasis
            if all(n.target != node.target for n in found):
                found.append(node)
    sets: dict[tuple[str, ...], Places] = {}
    for nodes in meeting.values():
        sets.setdefault(tuple(str(n.target) for n in nodes), []).append(nodes)
    return sets


def _stack(
    gm: fx.GraphModule, names: tuple[str, ...], linears: list[nn.Linear], places: Places
) -> None:
    sizes = [linear.out_features for linear in linears]
    stacked = fused_name(gm, names)
    put_module(gm, stacked, joined(linears, torch.cat, training=gm.training))
    moved(gm, names, stacked, sizes)
    order = {node: at for at, node in enumerate(gm.graph.nodes)}
    for nodes in places:
        first = min(nodes, key=lambda node: order[node])
        with gm.graph.inserting_before(first):
            z = gm.graph.call_module(stacked, (first.args[0],))
            pieces = gm.graph.call_function(torch.split, (z, sizes), {"dim": -1})
            parts = [
                gm.graph.call_function(operator.getitem, (pieces, at)) for at in range(len(names))
            ]
        for new in (z, *parts):
            new.meta.update(first.meta)
        for node, part in zip(nodes, parts, strict=True):
            node.replace_all_uses_with(part)
            gm.graph.erase_node(node)
    set_slices(gm, dict(_new_places(gm, names, stacked, sizes)))


def _new_places(
    gm: fx.GraphModule, names: tuple[str, ...], stacked: str, sizes: list[int]
) -> Iterable[tuple[str, Slice]]:
    for name, place in slices(gm).items():
        if place.basis in names:
            at = sum(sizes[: names.index(place.basis)])
            rows = (at, at + sizes[names.index(place.basis)])
            yield name, replace(place, basis=stacked, basis_rows=rows)
