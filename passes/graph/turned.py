"""Where rows are that are turned as well as moved: multiplied by tables, and added up in pairs.

What rotary embeddings do to queries and keys, whatever order their pairs lie in. See ``moved``.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from passes.graph.graph import attribute
from passes.graph.layouts import Layout, Rows, Unknown, indexed
from passes.graph.moved import Moved, given, tensor_of

_SAME = frozenset({"neg", "negative"})
_SCALED = frozenset({"mul", "multiply", "div", "truediv", "true_divide"})
_ADDED = frozenset({"add", "sub", "subtract", "iadd", "isub"})
_DEEPEST = 60


@dataclass(eq=False)
class Turned(Moved):
    """Layouts of rows that may be multiplied by tables, and added to one another in pairs."""

    pairs: list[tuple[Rows, Rows]] = field(default_factory=list)
    """Rows that were added up."""
    unknown: dict[fx.Node, Unknown] = field(default_factory=dict)
    _depth: int = 0

    def layout(self, node: fx.Node) -> Layout:
        """The rows of a node. Raises :class:`Unknown` with the reason."""
        if node in self.unknown:
            raise self.unknown[node]
        self._depth += 1
        try:
            if self._depth > _DEEPEST:
                raise Unknown("is computed from too much")
            return super().layout(node)
        except Unknown as fault:
            self.unknown[node] = fault
            raise
        finally:
            self._depth -= 1

    def _other(self, node: fx.Node, name: str) -> Layout | None:
        if name in _SAME:
            return self.layout(tensor_of(node))
        if name in _SCALED | _ADDED:
            return self._combined(node, name)
        if node.target is getattr and node.args[1] == "mT":
            return self.layout(tensor_of(node)).swapped(-1, -2)
        if name == "stack":
            return self._stacked(node)
        return super()._other(node, name)

    def _combined(self, node: fx.Node, name: str) -> Layout:
        operands = [given(node, 0, "input"), given(node, 1, "other")]
        if node.kwargs.get("alpha", 1) != 1:
            raise Unknown(f"reads a sum with a factor, {node.name!r}")
        found = [self._tried(one) for one in operands]
        first, second = found
        if first is not None and second is not None:
            if name in _SCALED:
                raise Unknown(f"reads rows multiplied by rows, in {node.name!r}")
            return self._sum(node, first, second)
        at = 0 if first is not None else 1
        known = found[at]
        if known is None:
            nodes = [x for x in operands if isinstance(x, fx.Node) and x.op != "get_attr"]
            raise next((self.unknown[x] for x in nodes if x in self.unknown), _moves_none(node))
        if at == 1 and name in ("div", "truediv", "true_divide"):
            raise _moves_none(node)
        if name in _ADDED:
            raise Unknown(f"reads {node.name!r}, which adds something else to rows")
        self._with_table(node, operands[1 - at], known)
        return known

    def _tried(self, operand: Any) -> Layout | None:
        if not isinstance(operand, fx.Node):
            return None
        try:
            return self.layout(operand)
        except Unknown:
            return None

    def _sum(self, node: fx.Node, first: Layout, second: Layout) -> Layout:
        if first.rows.shape != second.rows.shape or first.dims != second.dims:
            raise Unknown(f"reads a sum of rows that lie otherwise, {node.name!r}")
        self.pairs.append((first.rows, second.rows))
        return first

    def _with_table(self, node: fx.Node, table: Any, known: Layout) -> None:
        """Note an operand that is no rows: a number for all, or one for each row."""
        width = width_of(self.gm, table)
        if width == 0:
            return
        if width == 1 < known.last:
            raise Unknown(
                f"reads {node.name!r}, which combines all numbers of a head with one that is "
                "computed, as a norm of queries or keys does"
            )
        if width != known.last:
            raise Unknown(
                f"reads {node.name!r}, which combines {known.last} rows with "
                f"{'numbers that cannot be counted' if width is None else width}"
            )
        self.tables[node] = table

    def _stacked(self, node: fx.Node) -> Layout:
        parts: Any = given(node, 0, "tensors")
        layouts = [self.layout(part) for part in parts]
        first = layouts[0]
        if given(node, 1, "dim", 0) not in (-1, len(first.dims)) or first.open:
            raise Unknown(f"puts rows together otherwise than side by side, in {node.name!r}")
        if any(one.dims != first.dims for one in layouts) or first.dims[-1] is None:
            raise Unknown(f"puts together rows that lie otherwise, in {node.name!r}")
        rows = torch.stack([one.rows for one in layouts], -1)
        return replace(first, dims=(*first.dims, len(layouts)), rows=rows)

    def _cat(self, node: fx.Node) -> Layout:
        parts: Any = given(node, 0, "tensors")
        if not all(isinstance(part, fx.Node) for part in parts):
            raise Unknown(f"puts together what is no linear alone, in {node.name!r}")
        layouts = [self.layout(part) for part in parts]
        first, dim = layouts[0], given(node, 1, "dim", 0)
        if dim != -1 and (first.open or dim != len(first.dims) - 1):
            raise Unknown(f"puts rows together otherwise than side by side, in {node.name!r}")
        if any(one.dims[:-1] != first.dims[:-1] or one.last < 0 for one in layouts):
            raise Unknown(f"puts together rows that lie otherwise, in {node.name!r}")
        rows = torch.cat([one.rows for one in layouts], -1)
        return replace(first, dims=(*first.dims[:-1], rows.shape[-1]), rows=rows)

    def _item(self, node: fx.Node) -> Layout:
        resolved = self.resolved(node.args[1])
        if resolved is node.args[1]:
            return super()._item(node)
        source = node.args[0]
        assert isinstance(source, fx.Node)
        return indexed(self.layout(source), resolved)

    def resolved(self, index: Any) -> Any:
        """As :meth:`Moved.resolved`, of the sizes of rows and tables."""
        if isinstance(index, tuple):
            found = tuple(self.resolved(one) for one in index)
            return found if any(a is not b for a, b in zip(found, index, strict=True)) else index
        if not isinstance(index, slice):
            return index
        ends = [index.start, index.stop, index.step]
        if not any(isinstance(end, fx.Node) for end in ends):
            return index
        known = [self.size(end) if isinstance(end, fx.Node) else end for end in ends]
        told = all(b is not None or a is None for a, b in zip(ends, known, strict=True))
        return slice(*known) if told else index

    def size(self, size: object) -> int | None:
        """As :meth:`Moved.size`, and the last one of a table."""
        found = super().size(size)
        if found is not None or not isinstance(size, fx.Node):
            return found
        read = self.read_size(size)
        if read is None or read[0] in self.layouts or read[1] != -1:
            return None
        return width_of(self.gm, read[0]) or None


def _moves_none(node: fx.Node) -> Unknown:
    return Unknown(f"reads what is computed by {node.name!r}, which moves no rows")


def width_of(gm: fx.GraphModule, operand: Any) -> int | None:
    """How many numbers an operand has along its last dimension; 0 for a number, None where it
    cannot be told."""
    if not isinstance(operand, fx.Node):
        return 0
    if operand.op == "get_attr":
        value = attribute(gm, str(operand.target))
        shape = tuple(value.shape) if isinstance(value, Tensor) else None
        return None if shape is None else (shape[-1] if shape else 0)
    if operand.meta.get("ndim") == 0:
        return 0
    value = operand.meta.get("val")
    if isinstance(value, Tensor):
        last = value.shape[-1] if value.ndim else 0
        return last if isinstance(last, int) else None
    noted = operand.meta.get("last")
    return noted if isinstance(noted, int) else None


__all__ = ["Turned", "width_of"]
