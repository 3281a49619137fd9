"""Other numbers of hidden units, where nodes between linears name how many there are."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from passes.graph.hidden import SPLITS, name_of


def resize(node: fx.Node, units: int, kept: int) -> None:
    """Let a node that names the number of units (:attr:`passes.graph.hidden.Hidden.sized`) name
    another."""
    if node.target is operator.getitem:
        given: Any = node.args
        source, (dots, taken) = given
        ends = [None if end is None else end // units * kept for end in (taken.start, taken.stop)]
        node.args = (source, (dots, slice(*ends)))
        return
    if name_of(node) in SPLITS:
        _resize_pieces(node, units, kept)
        return
    sizes: Any = node.args[1:]
    if len(sizes) == 1 and isinstance(sizes[0], fx.Node):
        old = sizes[0]
        end: Any
        front, end = old.args
        new_end = (*end[:-1], _scaled(end[-1], units, kept))
        with node.graph.inserting_before(node):
            new = node.graph.call_function(operator.add, (front, new_end))
        new.meta.update(old.meta)
        node.args = (node.args[0], new)
        if not old.users:
            node.graph.erase_node(old)
    elif len(sizes) == 1 and isinstance(sizes[0], (list, tuple)):
        front = sizes[0][:-1]
        node.args = (node.args[0], [*front, _scaled(sizes[0][-1], units, kept)])
    elif sizes:
        node.args = (*node.args[:-1], _scaled(sizes[-1], units, kept))
    else:
        key = "size" if "size" in node.kwargs else "shape"
        named: Any = node.kwargs[key]
        new_sizes = [*named[:-1], _scaled(named[-1], units, kept)]
        node.kwargs = {**node.kwargs, key: new_sizes}


def _resize_pieces(node: fx.Node, units: int, kept: int) -> None:
    named = [key for key in ("split_size_or_sections", "split_size") if key in node.kwargs]
    sizes: Any = node.kwargs[named[0]] if named else node.args[1]
    new = (
        _scaled(sizes, units, kept)
        if isinstance(sizes, int)
        else [_scaled(size, units, kept) for size in sizes]
    )
    if named:
        node.kwargs = {**node.kwargs, named[0]: new}
    else:
        node.args = (node.args[0], new, *node.args[2:])


def _scaled(size: Any, units: int, kept: int) -> int:
    return int(size) // units * kept


__all__ = ["resize"]
