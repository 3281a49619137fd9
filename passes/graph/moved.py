"""Which rows of some linears each node has, that only moves numbers about: see ``layouts``."""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn

from passes.graph.hidden import name_of
from passes.graph.layouts import Layout, Unknown, flattened, indexed, joined, pieces
from passes.graph.modes import crossing

# fmt: off
_SAME = frozenset({
    "alias", "bfloat16", "clone", "contiguous", "detach", "double", "float", "half", "to", "type",
    "type_as", "_to_copy",
})
# fmt: on
_VIEWS = frozenset({"view", "reshape", "_unsafe_view"})
_SPLITS = frozenset({"split", "split_with_sizes", "chunk", "unbind"})
_MIXING = frozenset({"matmul", "bmm"})
ATTENTION = "scaled_dot_product_attention"
_UPDATE = "update"
"""Of a key-value cache: what it is given, and what it had before, along the positions."""

Leaf = Callable[[fx.Node], "Mapping[str, int] | None"]
"""The slices that a node computes side by side, and their numbers of rows; None of another node."""


def given(node: fx.Node, at: int, name: str, default: Any = None) -> Any:
    """An operand by its place or its name."""
    return node.args[at] if len(node.args) > at else node.kwargs.get(name, default)


def tensor_of(node: fx.Node) -> fx.Node:
    """The tensor that an operation moves."""
    first = node.args[0] if node.args else node.kwargs.get("input", node.kwargs.get("self"))
    if not isinstance(first, fx.Node):
        raise Unknown(f"reads {node.name!r}, which is computed from no tensor")
    return first


def _ndim(node: fx.Node) -> int | None:
    """How many dimensions a node has, where its capture noted it: torch.export an example."""
    found = node.meta.get("ndim", getattr(node.meta.get("val"), "ndim", None))
    return found if isinstance(found, int) else None


@dataclass(eq=False)
class Moved:
    """The layouts of nodes, found when they are asked for.

    ``inputs`` is what the reader at the end takes. ``mixed`` are the nodes that sum what other
    positions have, with weights that are the same for a whole head, and the width of a head there.
    """

    gm: fx.GraphModule
    leaf: Leaf
    inputs: int
    starts: dict[str, int] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    layouts: dict[fx.Node, Layout] = field(default_factory=dict)
    leaves: dict[fx.Node, tuple[str, ...]] = field(default_factory=dict)
    mixed: dict[fx.Node, int] = field(default_factory=dict)
    tables: dict[fx.Node, fx.Node] = field(default_factory=dict)
    """Operations with a table that has as many numbers as rows, and it."""

    def layout(self, node: fx.Node) -> Layout:
        """The rows of a node. Raises :class:`Unknown` with the reason."""
        if node not in self.layouts:
            found = self._found(node)
            ndim = _ndim(node)
            if found.open and ndim is not None and ndim >= len(found.dims):
                before = (None,) * (ndim - len(found.dims))
                found = replace(found, dims=(*before, *found.dims), open=False)
            self.layouts[node] = found
        return self.layouts[node]

    def resolved(self, index: Any) -> Any:
        """An index with its ends as numbers, where they can be told."""
        return index

    def _found(self, node: fx.Node) -> Layout:
        slices = self.leaf(node)
        if slices is not None:
            self.leaves[node] = tuple(slices)
            return Layout((sum(slices.values()),), self._rows(slices))
        if node.op == "call_module":
            if type(self.gm.get_submodule(str(node.target))) is nn.Identity:
                return self.layout(tensor_of(node))
        elif node.op in ("call_function", "call_method"):
            name = name_of(node)
            if name in _SAME or node.target is crossing:
                return self.layout(tensor_of(node))
            if name in _VIEWS:
                return self._view(node)
            if node.target is operator.getitem:
                return self._item(node)
            if name == ATTENTION:
                return self._attention(node, given(node, 2, "value"))
            if name in _MIXING:
                return self._attention(node, given(node, 1, "mat2", given(node, 1, "other")))
            if name == "cat":
                return self._cat(node)
            found = self._other(node, name)
            if found is not None:
                return found
        raise Unknown(
            f"reads what is computed by {node.name!r} ({node.op}), which moves no rows and is no "
            "attention"
        )

    def _rows(self, slices: Mapping[str, int]) -> Any:
        rows = []
        for name, size in slices.items():
            start = self.starts.setdefault(name, sum(self.sizes.values()))
            self.sizes[name] = size
            rows.append(torch.arange(start, start + size, device="cpu"))
        return torch.cat(rows)

    def _other(self, node: fx.Node, name: str) -> Layout | None:
        known = self.layout
        if name in ("transpose", "swapaxes", "swapdims"):
            return known(tensor_of(node)).swapped(given(node, 1, "dim0"), given(node, 2, "dim1"))
        if name == "permute":
            order = given(node, 1, "dims")
            order = list(order) if isinstance(order, (list, tuple)) else list(node.args[1:])
            source = known(tensor_of(node))
            return source.moved([source.axis(at) for at in order])
        if name in ("slice", "select"):
            return self._part(node, name)
        if name == "unsqueeze":
            return known(tensor_of(node)).inserted(given(node, 1, "dim"))
        if name in ("expand", "broadcast_to"):
            return self._expanded(node)
        if name == "repeat_interleave":
            times = given(node, 1, "repeats")
            if not isinstance(times, int):
                raise Unknown(f"repeats rows by numbers that are computed, in {node.name!r}")
            return known(tensor_of(node)).repeated(given(node, 2, "dim"), times)
        if name == "flatten":
            source = known(tensor_of(node))
            return flattened(source, given(node, 1, "start_dim", 0), given(node, 2, "end_dim", -1))
        if name == "unflatten":
            source = known(tensor_of(node))
            if source.axis(given(node, 1, "dim")) != len(source.dims) - 1:
                raise Unknown(f"divides another dimension than the last one, in {node.name!r}")
            front = [None] * (len(source.dims) - 1)
            sizes = [*front, *given(node, 2, "sizes")]
            return replace(replace(source, open=False).reshaped(sizes), open=source.open)
        return None

    def _part(self, node: fx.Node, name: str) -> Layout:
        """``aten.slice`` and ``aten.select``."""
        source, dim = self.layout(tensor_of(node)), given(node, 1, "dim", 0)
        if name == "select":
            axis = source.axis(dim)
            if source.dims[axis] is None:
                return replace(source, dims=(*source.dims[:axis], *source.dims[axis + 1 :]))
            return source.taken(axis - len(source.dims), int(given(node, 2, "index")))
        start, stop = given(node, 2, "start"), given(node, 3, "end")
        step = given(node, 4, "step", 1)
        if start in (0, None) and (stop is None or stop == sys.maxsize) and step == 1:
            return source
        axis = source.axis(dim)
        if source.dims[axis] is None:
            return source  # some positions: rows stay where they are
        if not all(end is None or isinstance(end, int) for end in (start, stop, step)):
            raise Unknown(f"takes a part whose ends are computed, in {node.name!r}")
        return source.taken(axis - len(source.dims), slice(start, stop, step))

    def _view(self, node: fx.Node) -> Layout:
        source = self.layout(tensor_of(node))
        front, sizes = sizes_of(node)
        known = [self.size(size) for size in sizes]
        if not front:
            return source.reshaped(known)
        # ``x.size()[:-1] + (n,)``: the dimensions in front stay
        ndim = _ndim(node)
        before = ndim - len(known) if ndim is not None else 0
        found = replace(source, open=True).reshaped([None] * before + known)
        return replace(found, open=ndim is None)

    def _item(self, node: fx.Node) -> Layout:
        source: Any = node.args[0]
        at: Any = node.args[1]
        if not isinstance(source, fx.Node) or source.op not in ("call_function", "call_method"):
            return indexed(self.layout(source), at)
        name = name_of(source)
        if name == _UPDATE and source.op == "call_method" and at in (0, 1):
            return self.layout(source.args[1 + at])
        if name not in _SPLITS or not isinstance(at, int):
            return indexed(self.layout(source), at)
        whole = self.layout(tensor_of(source))
        if name == "unbind":
            return whole.taken(whole.axis(given(source, 1, "dim", 0)) - len(whole.dims), at)
        dim = given(source, 2, "dim", 0)
        size = abs(whole.dims[whole.axis(dim)] or 0)
        named = given(source, 1, "split_size_or_sections", given(source, 1, "split_size"))
        if name == "chunk":
            count = given(source, 1, "chunks")
            named = size // count if isinstance(count, int) and size % count == 0 else None
        if isinstance(named, fx.Node):
            # a size of something else: equal parts, as many as are taken
            indices = sorted(user.args[1] for user in source.users)  # type: ignore[type-var]
            count = len(indices)
            named = size // count if indices == list(range(count)) and size % count == 0 else None
        if isinstance(named, int) and named > 0 and size % named == 0:
            named = [named] * (size // named)
        if not isinstance(named, (list, tuple)) or not all(isinstance(n, int) for n in named):
            raise Unknown(f"cuts rows in pieces of sizes that cannot be told, in {source.name!r}")
        return pieces(whole, dim, [int(n) for n in named])[at]

    def _cat(self, node: fx.Node) -> Layout:
        parts: Any = given(node, 0, "tensors")
        if given(node, 1, "dim", 0) != -1 or not all(isinstance(p, fx.Node) for p in parts):
            raise Unknown(f"puts together what is no linear alone, in {node.name!r}")
        return joined([self.layout(part) for part in parts])

    def _expanded(self, node: fx.Node) -> Layout:
        source = self.layout(tensor_of(node))
        _, sizes = sizes_of(node)
        whole = sizes[0] if len(sizes) == 1 else None
        if isinstance(whole, fx.Node) and name_of(whole) == "size":
            sizes = list(self.layout(tensor_of(whole)).dims)
        if source.open or len(sizes) != len(source.dims):
            raise Unknown(f"repeats dimensions that cannot be counted, in {node.name!r}")
        for at, size in enumerate(sizes):
            times, have = self.size(size), source.dims[at]
            if times is not None and times > 1 and have in (None, 1):
                source = source.repeated(at, times)
        return source

    def _attention(self, node: fx.Node, value: object) -> Layout:
        """A sum over positions: of the value's rows none is moved."""
        if not isinstance(value, fx.Node):
            raise Unknown(f"reads {node.name!r}, which multiplies by no tensor")
        if value.op == "get_attr":
            raise Unknown(f"reads {node.name!r}, which multiplies by a tensor of the model")
        found = self.layout(value)
        width = found.last
        if len(found.dims) < 2 or found.dims[-2] is not None:
            raise Unknown(f"reads {node.name!r}, which mixes rows and no positions")
        self.mixed[node] = width
        times = self.inputs // max(found.rows.numel(), 1)
        if times > 1 and self.inputs % found.rows.numel() == 0 and len(found.dims) > 2:
            # fewer heads than the queries have, repeated by the attention itself
            head = found.dims[-3]
            if head == 1 or (head is not None and head > 0 and name_of(node) == ATTENTION):
                found = found.repeated(-3, times)
        return found

    def size(self, size: object) -> int | None:
        """A size that is a number, or that of rows; None for one of batch or positions."""
        if isinstance(size, int) or size is None:
            return size
        if not isinstance(size, fx.Node):
            return None
        if size.target is operator.mul or size.target is operator.floordiv:
            a, b = (self.size(one) for one in size.args)
            if a is None or b is None or b < 1:
                return None
            return a * b if size.target is operator.mul else a // b
        read = self.read_size(size)
        if read is None or read[0] not in self.layouts:
            return None
        dims, dim = self.layouts[read[0]].dims, read[1]
        inside = -len(dims) <= dim < len(dims) and (dim < 0 or not self.layouts[read[0]].open)
        return (dims[dim] if inside else None) or None

    @staticmethod
    def read_size(size: fx.Node) -> tuple[fx.Node, int] | None:
        """The tensor and the dimension whose size a node is."""
        if size.target is operator.getitem:
            whole, dim = size.args
            is_shape = isinstance(whole, fx.Node) and (
                name_of(whole) == "size" or whole.args[1:] == ("shape",)
            )
            if is_shape and isinstance(dim, int) and len(whole.args) < 3:  # type: ignore[union-attr]
                return tensor_of(whole), dim  # type: ignore[arg-type]
        elif size.op in ("call_method", "call_function") and name_of(size) in ("size", "sym_size"):
            dim = given(size, 1, "dim")
            if isinstance(dim, int):
                return tensor_of(size), dim
        return None


def sizes_of(node: fx.Node) -> tuple[bool, list[object]]:
    """The sizes that a view names, and whether unnamed ones stand before them."""
    sizes: Any = node.args[1:] or (node.kwargs.get("size", node.kwargs.get("shape")),)
    if len(sizes) == 1 and isinstance(sizes[0], (list, tuple)):
        sizes = sizes[0]
    if len(sizes) == 1 and isinstance(sizes[0], fx.Node):
        only = sizes[0]
        if only.target in (operator.add, torch.add) and isinstance(only.args[1], (tuple, list)):
            return True, list(only.args[1])
    return False, list(sizes)


def with_sizes(node: fx.Node, changed: Mapping[int, int]) -> None:
    """Let a view name other sizes, by their place from the end."""

    def new(sizes: Any) -> list[Any]:
        return [changed.get(at - len(sizes), size) for at, size in enumerate(sizes)]

    rest = node.args[1:]
    if name_of(node) == "unflatten":
        node.args = (node.args[0], -1, tuple(new(given(node, 2, "sizes"))))
        node.kwargs = {}
    elif not rest:
        key = "size" if "size" in node.kwargs else "shape"
        node.kwargs = {**node.kwargs, key: new(node.kwargs[key])}
    elif len(rest) == 1 and isinstance(rest[0], fx.Node):
        old = rest[0]
        with node.graph.inserting_before(node):
            fresh = node.graph.call_function(operator.add, (old.args[0], tuple(new(old.args[1]))))
        fresh.meta.update(old.meta)
        node.args = (node.args[0], fresh)
        if not old.users:
            node.graph.erase_node(old)
    elif len(rest) == 1 and isinstance(rest[0], (list, tuple)):
        node.args = (node.args[0], new(rest[0]))
    else:
        node.args = (node.args[0], *new(rest))


__all__ = ["ATTENTION", "Moved", "given", "sizes_of", "tensor_of", "with_sizes"]
