"""Concatenate the coefficients that read one basis product."""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import fx, nn

from passes.base import Pass
from passes.graph import (
    calls_by_target,
    common_parent,
    is_written,
    linear_at,
    new_linear,
    put_module,
)
from passes.slices import set_slices, slices


@dataclass(frozen=True)
class FuseCoefficients(Pass):
    """One matmul for all coefficients of one basis product.

    Before::

        q = getattr(self.c_attn, 'q')(z);  k = getattr(self.c_attn, 'k')(z)
        y = torch.cat([q, k], dim = -1)

    After::

        y = self.c_attn(z)                            # Linear(R, out_q + out_k)

    Readers that are not such a ``cat`` get views of the fused product (``torch.split``). Outside
    the heads' names nothing is lost: ``passes.slices(gm)`` says which rows are whose.
    A coefficient that is called with two different sets of neighbours (a tied module) stays apart,
    because fusing it would store it twice.
    """

    name: ClassVar[str] = "fuse-coefficients"
    exact: ClassVar[bool] = True

    def rewrite(self, gm: fx.GraphModule) -> int:
        coefficients = {place.module for place in slices(gm).values() if place.basis}
        readers: dict[fx.Node, list[fx.Node]] = {}
        for target, nodes in calls_by_target(gm, lambda m: isinstance(m, nn.Linear)).items():
            for node in nodes if target in coefficients else []:
                z = node.args[0]
                assert isinstance(z, fx.Node)
                readers.setdefault(z, []).append(node)
        order = {node: at for at, node in enumerate(gm.graph.nodes)}
        sets: dict[fx.Node, tuple[str, ...]] = {}
        for z, nodes in readers.items():
            nodes.sort(key=lambda node: order[node])
            sets[z] = tuple(str(node.target) for node in nodes)
        fused: dict[tuple[str, ...], str] = {}
        count = 0
        for z, names in sets.items():
            if not self._may_fuse(gm, z, names, readers[z], sets):
                continue
            if names not in fused:
                fused[names] = _fuse_modules(gm, names)
            _fuse_calls(gm, fused[names], readers[z])
            count += 1
        return count

    def _may_fuse(
        self,
        gm: fx.GraphModule,
        z: fx.Node,
        names: tuple[str, ...],
        nodes: list[fx.Node],
        sets: dict[fx.Node, tuple[str, ...]],
    ) -> bool:
        if len(names) < 2 or len(set(names)) < len(names):
            return False
        if is_written(z) or any(is_written(node) for node in nodes):
            return False
        if any(set(names) & set(other) and other != names for other in sets.values()):
            return False
        linears = [linear_at(gm, name) for name in names]
        alike = {(m.bias is None, m.weight.dtype, m.weight.requires_grad) for m in linears}
        return len(alike) == 1


def _fuse_modules(gm: fx.GraphModule, names: tuple[str, ...]) -> str:
    linears = [linear_at(gm, name) for name in names]
    first = linears[0]
    fused = new_linear(
        torch.cat([m.weight.detach() for m in linears]),
        None if first.bias is None else torch.cat([m.bias.detach() for m in linears]),
        requires_grad=first.weight.requires_grad,
        training=gm.training,
    )
    name = _fused_name(gm, names)
    places = {}
    for slice_name, place in slices(gm).items():
        if place.module in names:
            start = sum(m.out_features for m in linears[: names.index(place.module)]) + place.start
            stop = start + place.stop - place.start
            places[slice_name] = replace(place, module=name, start=start, stop=stop)
    for old in names:
        parent, _, leaf = old.rpartition(".")
        delattr(gm.get_submodule(parent), leaf)
    put_module(gm, name, fused)
    set_slices(gm, places)
    return name


def _fused_name(gm: fx.GraphModule, names: tuple[str, ...]) -> str:
    """The common parent itself where it holds nothing else (``c_attn``), else a new child of it."""
    parent = common_parent(names)
    held = {
        name for name, module in gm.get_submodule(parent).named_modules() if not module._modules
    }
    if parent and {f"{parent}.{name}" for name in held} == set(names):
        return parent
    prefix = f"{parent}." if parent else ""
    leaves = [name.removeprefix(prefix).replace(".", "_") for name in names]
    joined = "_".join(leaves) if len(leaves) <= 4 else f"{leaves[0]}_to_{leaves[-1]}"
    return f"{prefix}{joined}"


def _fuse_calls(gm: fx.GraphModule, fused: str, nodes: list[fx.Node]) -> None:
    graph = gm.graph
    sizes = [
        place.stop - place.start
        for place in sorted(
            (p for p in slices(gm).values() if p.module == fused), key=lambda p: p.start
        )
    ]
    z = nodes[0].args[0]
    with graph.inserting_before(nodes[0]):
        y = graph.call_module(fused, (z,))
    y.meta.update(nodes[0].meta)
    for user in {user for node in nodes for user in node.users}:
        _shorten_cat(user, nodes, y)
    if any(node.users for node in nodes):
        with graph.inserting_after(y):
            pieces = graph.call_function(torch.split, (y, sizes), {"dim": -1})
        previous = pieces
        for at, node in enumerate(nodes):
            with graph.inserting_after(previous):
                piece = graph.call_function(operator.getitem, (pieces, at))
            previous = piece
            node.replace_all_uses_with(piece)
    for node in nodes:
        graph.erase_node(node)


def _shorten_cat(user: fx.Node, nodes: list[fx.Node], y: fx.Node) -> None:
    """Replace the run ``nodes`` in ``cat([..., *nodes, ...], dim=-1)`` by ``y``."""
    if user.op != "call_function" or user.target is not torch.cat or user.kwargs != {"dim": -1}:
        return
    parts = user.args[0]
    if not isinstance(parts, (list, tuple)):
        return
    parts = list(parts)
    for at in range(len(parts) - len(nodes) + 1):
        if parts[at : at + len(nodes)] == nodes:
            parts[at : at + len(nodes)] = [y]
            break
    else:
        return
    if len(parts) == 1:
        user.replace_all_uses_with(y)
        user.graph.erase_node(user)
    else:
        user.args = (parts,)
