"""Concatenate the coefficients that read one basis product."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, fx, nn

from passes.base import Pass
from passes.graph.graph import bits_of, common_parent, linear_at, new_linear, put_module
from passes.graph.lookups import only_called
from passes.graph.origins import moved
from passes.graph.slices import set_slices, slices
from passes.graph.writes import is_written


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
        for target, nodes in only_called(gm).items():
            for node in nodes if target in coefficients else []:
                z = node.args[0]
                assert isinstance(z, fx.Node)
                readers.setdefault(z, []).append(node)
        order = {node: at for at, node in enumerate(gm.graph.nodes)}
        for nodes in readers.values():
            nodes.sort(key=lambda node: order[node])
        count = 0
        for names, places in fusible(gm, readers.values()):
            sizes = [linear_at(gm, name).out_features for name in names]
            fused = fuse_modules(gm, names)
            for nodes in places:
                fuse_calls(gm, fused, sizes, nodes)
            count += len(places)
        return count


def fusible(
    gm: fx.GraphModule, runs: Iterable[list[fx.Node]]
) -> Iterator[tuple[tuple[str, ...], list[list[fx.Node]]]]:
    """The sets of linears called side by side in ``runs`` that may become one, each with all of its
    places: a module that is called twice has its neighbours in two, the same set, two products."""
    sets: dict[tuple[str, ...], list[list[fx.Node]]] = {}
    for nodes in runs:
        sets.setdefault(tuple(str(node.target) for node in nodes), []).append(nodes)
    for names, places in sets.items():
        if may_fuse(gm, names, places, sets):
            yield names, places


def may_fuse(
    gm: fx.GraphModule,
    names: tuple[str, ...],
    places: list[list[fx.Node]],
    sets: Iterable[tuple[str, ...]],
) -> bool:
    """Whether the linears ``names``, called side by side in each of ``places``, may become one."""
    if len(names) < 2 or len(set(names)) < len(names):
        return False
    if any(set(names) & set(other) and other != names for other in sets):
        return False
    for nodes in places:
        if any(is_written(node) for node in [*nodes[0].all_input_nodes, *nodes]):
            return False
    return len({kind_of(linear_at(gm, name)) for name in names}) == 1


def kind_of(linear: nn.Linear) -> tuple[object, ...]:
    """What one module cannot have two of."""
    bias = None if linear.bias is None else linear.bias.requires_grad
    weight = linear.weight
    return weight.dtype, weight.device, weight.requires_grad, bias, bits_of(weight)


def fuse_modules(
    gm: fx.GraphModule,
    names: tuple[str, ...],
    *,
    join: Callable[[list[Tensor]], Tensor] = torch.cat,
) -> str:
    """Put one linear with all rows of ``names`` in their place, and return its name.

    ``join`` makes one tensor of the weights, and of the biases, in order.
    """
    linears = [linear_at(gm, name) for name in names]
    fused = joined(linears, join, training=gm.training)
    name = fused_name(gm, names)
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
    moved(gm, names, name, [m.out_features for m in linears])
    return name


def joined(
    linears: Sequence[nn.Linear], join: Callable[[list[Tensor]], Tensor], *, training: bool
) -> nn.Linear:
    """One linear with the rows of all, which must be alike in all else."""
    first = linears[0]
    result = new_linear(
        join([m.weight.detach() for m in linears]),
        None if first.bias is None else join([m.bias.detach() for m in linears]),
        requires_grad=first.weight.requires_grad,
        training=training,
    )
    if first.bias is not None:
        result.bias.requires_grad_(first.bias.requires_grad)
    return result


def fused_name(gm: fx.GraphModule, names: Sequence[str]) -> str:
    """The common parent itself where it holds nothing else (``c_attn``), else a new child of it."""
    parent = common_parent(names)
    prefix = f"{parent}." if parent else ""
    if parent and _held(gm.get_submodule(parent), prefix) == set(names):
        return parent
    leaves = [name.removeprefix(prefix).replace(".", "_") for name in names]
    joined = "_".join(leaves) if len(leaves) <= 4 else f"{leaves[0]}_to_{leaves[-1]}"
    while hasattr(gm.get_submodule(parent), joined):
        joined += "_"
    return f"{prefix}{joined}"


def _held(parent: nn.Module, prefix: str) -> set[str]:
    """The leaves below ``parent``, and whatever below it has tensors of its own."""
    return {
        f"{prefix}{name}".rstrip(".")
        for name, module in parent.named_modules(remove_duplicate=False)
        if not module._modules or module._parameters or module._buffers
    }


def fuse_calls(gm: fx.GraphModule, fused: str, sizes: list[int], nodes: list[fx.Node]) -> None:
    """Call ``fused`` once instead of ``nodes``, whose readers get the whole or views of it."""
    graph = gm.graph
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
    if user.op == "call_function" and user.target is torch.cat and user.kwargs == {"dim": -1}:
        replace_run(user, nodes, y)


def replace_run(cat: fx.Node, nodes: Sequence[fx.Node], y: fx.Node) -> None:
    """Put ``y`` in the place of the first run ``nodes`` among the parts of a ``cat``, if there is
    one; the ``cat`` of one part is that part."""
    parts = cat.args[0]
    if not isinstance(parts, (list, tuple)):
        return
    parts = list(parts)
    for at in range(len(parts) - len(nodes) + 1):
        if parts[at : at + len(nodes)] == list(nodes):
            parts[at : at + len(nodes)] = [y]
            break
    else:
        return
    if len(parts) == 1:
        cat.replace_all_uses_with(y)
        cat.graph.erase_node(cat)
    else:
        cat.args = (parts,)
