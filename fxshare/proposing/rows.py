"""Which rows of a fused weight end up together, read from a captured graph.

The numbers of a fused projection's rows are sent through the operations that only move them
(``view``, ``split``, ``transpose``, ...). Whatever reads them then reads rows of q, of k or of v:
blocks ``[q | k | v]`` and ``[q k v]`` per head give different sets.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from fxshare.capture import Captured, quiet
from passes import linear_calls

Rows = frozenset[int]
_MOVING = {
    *("view", "reshape", "unflatten", "flatten", "expand", "broadcast_to"),
    *("transpose", "permute", "movedim", "swapaxes", "squeeze", "unsqueeze", "t"),
    *("split", "split_with_sizes", "chunk", "tensor_split", "unbind", "getitem", "select", "slice"),
    *("narrow", "unsafe_split", "alias", "_unsafe_view", "expand_as"),
}
_CONVERTING = {"to", "float", "type", "type_as", "_to_copy", "contiguous", "clone"}


def rows_read_together(captured: Captured, names: Iterable[str]) -> dict[str, list[Rows]]:
    """For each linear the sets of its rows that one operation reads; a set of all rows, which tells
    nothing, is left out. Empty where the graph could not be run."""
    wanted = set(names)
    calls = {c.node: c.name for c in linear_calls(captured.graph) if c.name in wanted}
    if not calls or captured.shapes is None:
        return {}
    given = captured.shapes.base
    inputs = [
        given.get(str(n.target), n.args[0] if n.args else None)
        for n in captured.graph.graph.nodes
        if n.op == "placeholder"
    ]
    follow = _Follow(captured.graph, calls)
    try:
        with quiet():  # in training mode it has random numbers
            follow.run(*inputs)
    except Exception:  # the model's own code runs in here; without an answer names have to do
        return {}
    return follow.read


class _Follow(fx.Interpreter):
    """Runs a graph, and beside it the moving operations on row numbers ``(..., rows)``."""

    def __init__(self, gm: fx.GraphModule, calls: Mapping[fx.Node, str]) -> None:
        super().__init__(gm)
        self.calls = calls
        self.read: dict[str, list[Rows]] = {}
        self._moved: dict[fx.Node, tuple[str, int, Any]] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n in self.calls and isinstance(result, Tensor):
            rows = result.shape[-1]
            self._moved[n] = (self.calls[n], rows, torch.arange(rows).expand(result.shape))
            return result
        for source in n.all_input_nodes:
            if source in self._moved:
                self._follow(n, source)
        return result

    def _follow(self, n: fx.Node, source: fx.Node) -> None:
        name, rows, numbers = self._moved[source]
        if n.args and n.args[0] is source and _operation(n) in _MOVING | _CONVERTING:
            self._moved[n] = (name, rows, self._move(n, numbers))
        elif isinstance(numbers, Tensor):
            found = frozenset(numbers.flatten().tolist())
            if 0 < len(found) < rows and found not in self.read.setdefault(name, []):
                self.read[name].append(found)

    def _move(self, n: fx.Node, numbers: Any) -> Any:
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        if _operation(n) in _CONVERTING:  # the numbers stay integers, and where they are
            return numbers
        if n.op == "call_method":
            return getattr(numbers, str(n.target))(*args[1:], **kwargs)
        return n.target(numbers, *args[1:], **kwargs)  # type: ignore[operator]


def _operation(n: fx.Node) -> str:
    """``view`` for a method, a function or an aten overload of that name."""
    name = n.target if isinstance(n.target, str) else getattr(n.target, "__name__", "")
    return name.partition(".")[0] if n.op in ("call_method", "call_function") else ""
