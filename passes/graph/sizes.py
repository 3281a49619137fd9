"""Sizes of stored tensors: constants, although a graph asks for them."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from torch import fx


def make_constant(size: fx.Node, shape: Sequence[int]) -> None:
    """Let the readers of ``w.size()`` or ``w.size(0)`` have numbers in its place, and erase it."""
    graph = size.graph
    numbers = tuple(shape)
    if size.args[1:]:
        (dim,) = size.args[1:]
        assert isinstance(dim, int)
        _read(size, numbers[dim])
    else:
        for entry in list(size.users):
            number = entry.args[1] if entry.target is operator.getitem else None
            if isinstance(number, int):
                _read(entry, numbers[number])
                graph.erase_node(entry)
        _read(size, numbers)
    graph.erase_node(size)


def _read(node: fx.Node, value: Any) -> None:
    """Let the readers of ``node`` have ``value`` in its place."""

    def constant(argument: fx.Node) -> Any:
        return value if argument is node else argument

    for reader in list(node.users):
        reader.args = fx.node.map_arg(reader.args, constant)
        reader.kwargs = fx.node.map_arg(reader.kwargs, constant)
