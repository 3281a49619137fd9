"""Let the nodes of an attention name another width: the edit that goes with ``heads``."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from passes.graph.graph import erase_dead
from passes.graph.heads import Heads, leading, reads_size
from passes.graph.hidden import name_of
from passes.graph.layouts import Layout
from passes.graph.moved import Moved, given, sizes_of, tensor_of, with_sizes

SIZED = frozenset({"view", "reshape", "_unsafe_view", "expand", "broadcast_to", "unflatten"})


def narrow(gm: fx.GraphModule, found: Heads, kept: int) -> None:
    """Let everything between name the width ``kept``, and take slices from the linears that compute
    them, each by itself; those linears must be narrower already. ``found`` is of the graph as it
    was before."""
    moved = found.moved
    assert moved is not None
    for node, layout in found.between.items():
        _resize(moved, node, layout, found, kept)
    calls = {names[0]: node for node, names in moved.leaves.items() if len(names) == 1}
    for node, names in found.taken.items():
        own = set(names) <= set(found.slices)
        sizes = [d for d in moved.layout(node).dims if d is not None]
        if own:
            sizes[-1] = sizes[-1] // found.width * kept
        take(moved, node, [calls[name] for name in names], sizes)
    leave_products(gm.graph, found, calls[next(iter(found.slices))])


def leave_products(graph: fx.Graph, found: Heads, call: fx.Node) -> None:
    """Erase what took slices from a product of several, and the product; who reads the sizes of it
    reads those of a linear's ``call`` instead."""
    moved = found.moved
    assert moved is not None
    for node in found.products:
        reads = [u for u in node.users if reads_size(u)]
        if reads and moved.layout(node).is_flat:
            with graph.inserting_before(reads[0]):
                alone = as_in(moved, call, node)
            for user in reads:
                user.replace_input_with(node, alone)
    old = {*found.taken, *found.products} - {*found.leaves}
    old |= {user for node in found.products for user in node.users}
    erase_dead(graph, [node for node in graph.nodes if node in old])


def _resize(moved: Moved, node: fx.Node, layout: Layout, found: Heads, kept: int) -> None:
    """Give a view that names the width in numbers, or by a size of something else, another."""
    if node in moved.leaves or node.op not in ("call_method", "call_function"):
        return
    name = name_of(node)
    last = layout.dims[-1]
    if name not in SIZED or last is None:
        return
    size = last // found.width * kept
    sizes = given(node, 2, "sizes") if name == "unflatten" else sizes_of(node)[1]
    named = sizes[-1]
    if isinstance(named, fx.Node) and name_of(named) in ("size", "shape"):
        if tensor_of(named) in found.between:
            return  # sizes of another tensor of values
        dims = [-1 if d is None else abs(d) for d in layout.dims]
        node.args, node.kwargs = (node.args[0], (*dims[:-1], size)), {}
        return
    follows = (
        isinstance(named, fx.Node) and moved.size(named) is not None and _reads(moved, named, found)
    )
    if not follows and named != -1:
        with_sizes(node, {-1: size})


def _reads(moved: Moved, size: fx.Node, found: Heads) -> bool:
    """Whether a size is computed from those of values alone."""
    read = moved.read_size(size)
    if read is not None:
        return read[0] in found.between and moved.size(size) is not None
    inputs = size.all_input_nodes
    return bool(inputs) and all(_reads(moved, one, found) for one in inputs)


def as_in(moved: Moved, new: fx.Node, node: fx.Node) -> fx.Node:
    """A product with batch and positions as a node has them, which was made of another one: by the
    same views, with the rows for what is left."""
    views: list[fx.Node] = []
    while node not in moved.leaves and name_of(node) != "cat":
        before = moved.layouts.get(tensor_of(node))
        if name_of(node) in SIZED and moved.layout(node).is_flat and before is not None:
            views += [node] if before.is_flat else []
        node = tensor_of(node)
    for view in reversed(views):
        copy = new.graph.node_copy(view)
        copy.args = (new, *copy.args[1:])
        with_sizes(copy, {-1: -1})
        new = copy
    return new


def take(moved: Moved, node: fx.Node, calls: list[fx.Node], sizes: list[int]) -> None:
    """Put a node that takes slices out of a product of several in terms of their own linears;
    ``sizes`` are those of the rows, as they are to be."""
    graph, layout = node.graph, moved.layout(node)
    new: Any = calls[0]
    with graph.inserting_before(node):
        if len(calls) > 1:
            new = graph.call_function(torch.cat, (list(calls),), {"dim": -1})
            new.meta.update(calls[0].meta)
        new = as_in(moved, new, node)
        if len(sizes) > 1:
            whole = graph.call_method("size", (new,))
            front = graph.call_function(operator.getitem, (whole, slice(None, -1)))
            shape = graph.call_function(operator.add, (front, tuple(sizes)))
            new = graph.call_method("view", (new, shape))
            if not layout.open:
                new.meta["ndim"] = len(layout.dims)
            if leading(layout):
                new = graph.call_method("transpose", (new, 1, 2))
            new.meta.update(node.meta)
            new.meta.pop("shape", None)  # of rows that may have gone
    node.replace_all_uses_with(new)


__all__ = ["SIZED", "as_in", "leave_products", "narrow", "take"]
