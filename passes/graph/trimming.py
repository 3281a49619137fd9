"""Leave rows out of all that lies between linears and what reads them: the edit that goes with
``scores``, of numbers of a head, and with ``whole_heads``."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import _disable_current_modes

from passes.graph.heads import Heads, reads_size
from passes.graph.hidden import name_of
from passes.graph.layouts import Layout, Rows, Unknown
from passes.graph.moved import ATTENTION, Moved, given, sizes_of, tensor_of, with_sizes
from passes.graph.narrowing import SIZED, leave_products, take
from passes.graph.noted import shape_of
from passes.graph.scores import NotScores, Scores, is_repeated

Edit = Callable[[], None]


def trim(gm: fx.GraphModule, found: Scores, kept: Sequence[int]) -> Callable[[], None]:
    """What lets everything between name the numbers ``kept`` of a head, once the linears compute no
    others; nothing is changed before it is called. ``found`` is of the graph as it was before.

    Raises :class:`NotScores` where something between cannot do with fewer.
    """
    with _disable_current_modes():
        stays = torch.zeros(found.width, dtype=torch.bool, device="cpu")
        stays[list(kept)] = True
        try:
            edit = trimmed(gm, found, lambda rows: stays[found.places(rows)])
        except Unknown as fault:
            raise NotScores(str(fault)) from fault

    def apply() -> None:
        for call in found.calls:
            _keep_scale(call, found.width)
        edit()

    return apply


def trimmed(gm: fx.GraphModule, found: Heads, stay: Callable[[Rows], Tensor]) -> Edit:
    """What leaves rows out between, and takes slices from the linears that compute them, each by
    itself. ``stay`` says which rows of what was found stay.

    Raises :class:`Unknown` where something between cannot do with fewer.
    """
    assert found.moved is not None
    trimming = _Trimming(gm, found, found.moved, stay)
    edits = [edit for node in found.between for edit in trimming.edits(node)]
    sizes = {node: trimming.sizes(node) for node in found.taken}

    def apply() -> None:
        for edit in edits:
            edit()
        _take_slices(gm, found, sizes)

    return apply


def _keep_scale(call: fx.Node, width: int) -> None:
    """The scale that attention takes from the width of a head, as a number."""
    if name_of(call) == ATTENTION and call.kwargs.get("scale") is None:
        call.kwargs = {**call.kwargs, "scale": width**-0.5}


def _take_slices(gm: fx.GraphModule, found: Heads, sizes: Mapping[fx.Node, list[int]]) -> None:
    moved = found.moved
    assert moved is not None
    calls = {names[0]: node for node, names in moved.leaves.items() if len(names) == 1}
    for node, names in found.taken.items():
        take(moved, node, [calls[name] for name in names], sizes[node])
    own = found.query_slices if isinstance(found, Scores) else found.slices
    leave_products(gm.graph, found, calls[next(iter(own))])


@dataclass(eq=False)
class _Trimming:
    gm: fx.GraphModule
    found: Heads
    moved: Moved
    stay: Callable[[Rows], Tensor]
    tables: dict[tuple[fx.Node, tuple[tuple[int, int], ...]], fx.Node] = field(default_factory=dict)

    def along(self, layout: Layout) -> list[Tensor]:
        """Which entries of each labelled dimension stay; they must do so independently."""
        stays = self.stay(layout.rows)
        if not stays.numel():  # nothing is left beside what is turned
            return [torch.ones(size, dtype=torch.bool, device="cpu") for size in stays.shape]
        if not stays.any():  # nothing of what is turned
            all_ = [torch.ones(size, dtype=torch.bool, device="cpu") for size in stays.shape]
            return [*all_[:-1], ~all_[-1]]
        found = []
        whole = torch.ones((), dtype=torch.bool, device="cpu")
        for dim in range(stays.ndim):
            one = stays.movedim(dim, 0).reshape(stays.shape[dim], -1).any(1)
            found.append(one)
            whole = whole[..., None] & one
        if not torch.equal(whole, stays):
            raise Unknown("has numbers that stay, and others that do not, in no rows of their own")
        return found

    def sizes(self, node: fx.Node) -> list[int]:
        """The sizes of the labelled dimensions of a node, as they are after."""
        layout = self.moved.layout(node)
        if node not in self.found.between:
            return [d for d in layout.dims if d is not None]
        return [int(one.sum()) for one in self.along(layout)]

    def edits(self, node: fx.Node) -> list[Edit]:
        """What changes about a node, and about those that read its sizes."""
        layout = self.found.between[node]
        along = self.along(layout)
        edits = [
            edit
            for user in list(node.users)
            if reads_size(user)
            for edit in self._sizes(user, layout, along)
        ]
        if node in self.moved.leaves or node in self.found.taken:
            return edits
        name = name_of(node) if node.op in ("call_function", "call_method") else ""
        if name in SIZED:
            return edits + self._view(node, name, layout, along)
        if node.target is operator.getitem:
            return edits + self._item(node)
        if name == "slice":
            return edits + self._slice(node)
        if name == "select":
            self._selected(node, given(node, 1, "dim", 0))
        if node in self.moved.tables:
            return edits + self._table(node, along)
        return edits

    def _sizes(self, user: fx.Node, layout: Layout, along: list[Tensor]) -> list[Edit]:
        """Sizes that are not those of a view between are what they were: a scale is."""
        reads: list[tuple[fx.Node, Any]] = []
        if user.target is not getattr and given(user, 1, "dim") is not None:
            reads.append((user, given(user, 1, "dim")))
        else:
            reads += [(x, x.args[1]) for x in user.users if x.target is operator.getitem]
        edits: list[Edit] = []
        for read in user.users:
            if read not in self.found.between and is_repeated(self.moved, read):
                dims = self.moved.layout(read).dims
                own = [-1 if d is None else abs(d) for d in dims]
                edits.append(partial(_with_args, read, (read.args[0], tuple(own))))
        for read, dim in reads:
            if not isinstance(dim, int) or (layout.open and dim >= 0):
                continue
            axis = layout.axis(dim)
            size = layout.dims[axis]
            if size is None or size < 0 or bool(along[layout.labelled(axis)].all()):
                continue
            edits.append(partial(_make_number, read, size))
        return edits

    def _view(self, node: fx.Node, name: str, layout: Layout, along: list[Tensor]) -> list[Edit]:
        sizes = given(node, 2, "sizes") if name == "unflatten" else sizes_of(node)[1]
        changed = {}
        for axis, size in enumerate(layout.dims):
            if size is None or bool(along[layout.labelled(axis)].all()):
                continue
            if size < 0:
                raise Unknown(f"has batch and rows together in {node.name!r}")
            changed[axis - len(layout.dims)] = int(along[layout.labelled(axis)].sum())
        named = sizes[-1]
        if isinstance(named, fx.Node) and len(sizes) == 1 and _is_whole_size(named):
            dims = [-1 if d is None else abs(d) for d in layout.dims]
            for at, size in changed.items():
                dims[at] = size
            return [partial(_with_args, node, (node.args[0], tuple(dims)))]
        changed = {at: size for at, size in changed.items() if sizes[at] != -1}
        return [lambda: with_sizes(node, changed)] if changed else []

    def _item(self, node: fx.Node) -> list[Edit]:
        source: Any = node.args[0]
        moved = self.moved
        if source.op in ("call_function", "call_method") and source not in self.found.between:
            name = name_of(source)
            if name in ("split", "split_with_sizes", "chunk", "unbind"):
                return self._pieces(source, name)
            return []  # of a key-value cache
        before = moved.layout(source)
        along = self.along(before)
        index = moved.resolved(node.args[1])
        entries = list(index) if isinstance(index, tuple) else [index]
        new, edits = list(entries), []
        for at, axis in _axes(before, entries):
            if axis >= len(before.dims) or before.dims[axis] is None:
                continue
            stays = along[before.labelled(axis)]
            if bool(stays.all()) or entries[at] == slice(None):
                continue
            if not isinstance(entries[at], slice):
                raise Unknown(f"reads one number of a head by itself, {node.name!r}")
            new[at] = _part(entries[at], stays, node)
        if new != entries:
            result = tuple(new) if isinstance(index, tuple) else new[0]
            edits.append(lambda: _with_index(node, result))
        return edits

    def _slice(self, node: fx.Node) -> list[Edit]:
        """``aten.slice``."""
        before = self.moved.layout(tensor_of(node))
        dim = given(node, 1, "dim", 0)
        axis = before.axis(dim)
        if before.dims[axis] is None:
            return []
        stays = self.along(before)[before.labelled(axis)]
        if bool(stays.all()):
            return []
        ends = slice(given(node, 2, "start"), given(node, 3, "end"), given(node, 4, "step", 1))
        part = _part(ends, stays, node)
        return [
            lambda: _with_args(node, (node.args[0], dim, part.start, part.stop, part.step or 1))
        ]

    def _selected(self, node: fx.Node, dim: int) -> None:
        before = self.moved.layout(tensor_of(node))
        axis = before.axis(dim)
        if before.dims[axis] is not None and not self.along(before)[before.labelled(axis)].all():
            raise Unknown(f"reads one number of a head by itself, {node.name!r}")

    def _pieces(self, split: fx.Node, name: str) -> list[Edit]:
        before = self.found.between.get(tensor_of(split))
        if before is None:
            return []
        dim = given(split, 1, "dim", 0) if name == "unbind" else given(split, 2, "dim", 0)
        stays = self.along(before)[before.labelled(before.axis(dim))]
        if bool(stays.all()):
            return []
        if name == "unbind":
            raise Unknown(f"reads one number of a head by itself, {split.name!r}")
        named: Any = given(split, 1, "split_size_or_sections", given(split, 1, "split_size"))
        if name == "chunk":
            named = len(stays) // given(split, 1, "chunks")
        if not isinstance(named, (int, list, tuple)):
            raise Unknown(f"cuts a head in pieces of sizes that cannot be told, in {split.name!r}")
        sizes = [named] * (len(stays) // named) if isinstance(named, int) else list(named)
        counts = [int(piece.sum()) for piece in torch.split(stays, sizes)]
        if name == "chunk":
            if len(set(counts)) > 1:
                raise Unknown(f"cuts a head in equal pieces, in {split.name!r}")
            return []
        return [lambda: _with_pieces(split, counts)]

    def _table(self, node: fx.Node, along: list[Tensor]) -> list[Edit]:
        table, layout = self.moved.tables[node], self.found.between[node]
        labelled = [at - len(layout.dims) for at, d in enumerate(layout.dims) if d is not None]
        shape = shape_of(self.gm, table)
        for at, one in zip(labelled[:-1], along[:-1], strict=True):
            if not bool(one.all()) and (shape is None or (len(shape) >= -at and shape[at] != 1)):
                raise Unknown(f"multiplies each head by numbers of its own in {node.name!r}")
        stays = along[-1]
        if bool(stays.all()):
            return []
        runs = _runs(stays) or ((0, 0),)

        def edit() -> None:
            key = table, runs
            if key not in self.tables:
                self.tables[key] = _some_of(table, runs)
            node.replace_input_with(table, self.tables[key])

        return [edit]


def _runs(stays: Tensor) -> tuple[tuple[int, int], ...]:
    found: list[list[int]] = []
    for place in stays.nonzero().flatten().tolist():
        if found and found[-1][1] == place:
            found[-1][1] = place + 1
        else:
            found.append([place, place + 1])
    return tuple((low, high) for low, high in found)


def _some_of(table: fx.Node, runs: Sequence[tuple[int, int]]) -> fx.Node:
    """Some of the numbers of a table, as slices side by side: nothing that would have to be stored,
    or moved to a device."""
    graph = table.graph
    after = table.next
    while after.op in ("placeholder", "get_attr"):
        after = after.next
    with graph.inserting_before(after):
        parts = []
        for low, high in runs:
            index: Any = (Ellipsis, slice(low, high))
            parts.append(graph.call_function(operator.getitem, (table, index)))
        if len(parts) == 1:
            return parts[0]
        return graph.call_function(torch.cat, (parts,), {"dim": -1})


def _part(entry: slice, stays: Tensor, node: fx.Node) -> slice:
    """A part of a dimension among what stays of it."""
    before = range(len(stays))[entry]
    place = stays.cumsum(0) - 1
    after = [int(place[at]) for at in before if bool(stays[at])]
    step = entry.step or 1
    if step == 1:
        low = int(stays[: before.start].sum())
        return slice(low or None, low + len(after) if before.stop < len(stays) else None, None)
    if not after or after != list(range(after[0], after[-1] + 1, step)):
        raise Unknown(f"takes every {step}th number of a head in {node.name!r}")
    ends = slice(after[0] or None, entry.stop and after[-1] + 1, step)
    if list(range(int(stays.sum()))[ends]) != after:
        raise Unknown(f"takes every {step}th number of a head in {node.name!r}")
    return ends


def _axes(layout: Layout, entries: Sequence[Any]) -> list[tuple[int, int]]:
    """The dimension that each entry of an index is of, by its place among them."""
    dots = next((at for at, entry in enumerate(entries) if entry is Ellipsis), None)
    if dots is None and layout.open:
        raise Unknown("takes a part of a tensor whose dimensions cannot be counted")
    front = entries if dots is None else entries[:dots]
    back = [] if dots is None else entries[dots + 1 :]
    found, axis = [], 0
    for at, entry in enumerate(front if not layout.open else ()):
        if entry is not None:
            found.append((at, axis))
            axis += 1
    axis = len(layout.dims) - sum(entry is not None for entry in back)
    for at, entry in enumerate(back):
        if entry is not None:
            found.append((len(front) + 1 + at, axis))
            axis += 1
    return found


def _is_whole_size(node: fx.Node) -> bool:
    return name_of(node) == "size" and given(node, 1, "dim") is None


def _make_number(read: fx.Node, size: int) -> None:
    """Let the readers of a size have a number."""

    def number(argument: fx.Node) -> Any:
        return size if argument is read else argument

    for reader in list(read.users):
        reader.args = fx.node.map_arg(reader.args, number)
        reader.kwargs = fx.node.map_arg(reader.kwargs, number)


def _with_index(node: fx.Node, index: Any) -> None:
    node.args = (node.args[0], index)


def _with_args(node: fx.Node, arguments: tuple[Any, ...]) -> None:
    node.args, node.kwargs = arguments, {}


def _with_pieces(split: fx.Node, counts: Sequence[int]) -> None:
    name = "split_size_or_sections" if "split_size_or_sections" in split.kwargs else "split_size"
    if name in split.kwargs:
        split.kwargs = {**split.kwargs, name: list(counts)}
    else:
        split.args = (split.args[0], list(counts), *split.args[2:])


__all__ = ["trim", "trimmed"]
