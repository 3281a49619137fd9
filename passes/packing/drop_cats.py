"""Hand parts to their readers without putting them together first."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx, nn

from passes.base import Pass
from passes.graph.graph import erase_dead
from passes.graph.writes import is_written
from passes.packing.group_coefficients import grouped_width

_SPLITS = (
    torch.split,
    torch.ops.aten.split.Tensor,
    torch.ops.aten.split_with_sizes.default,
)
_CHUNKS = (torch.chunk, torch.ops.aten.chunk.default)
_VIEWS = (torch.ops.aten.view.default, torch.ops.aten.reshape.default, torch.reshape)
_LAST = -1


@dataclass(frozen=True)
class DropCats(Pass):
    """A ``cat`` that is only split again goes away where its parts make up the pieces.

    Before::

        y = torch.cat([q0, q1, k, v], dim = -1)
        q, k_, v_ = y.split((8, 8, 8), dim = 2)

    After::

        q = torch.cat([q0, q1], dim = -1)              # k_ is k, v_ is v

    Between the two there may be a ``view`` that leaves the last dimension as it is: each part gets
    one of its own. A ``cat`` of all pieces of one ``torch.split``, in order, is what was split.
    """

    name: ClassVar[str] = "drop-cats"
    exact: ClassVar[bool] = True

    def rewrite(self, gm: fx.GraphModule) -> int:
        count = 0
        for node in list(gm.graph.nodes):
            if _is_cat(node):
                count += _undo_split(node) or _split_after(gm, node)
        return count


def _is_cat(node: fx.Node) -> bool:
    return (
        node.op == "call_function"
        and node.target is torch.cat
        and node.kwargs == {"dim": _LAST}
        and isinstance(node.args[0], (list, tuple))
        and len(node.args[0]) > 1
        and not is_written(node)
    )


def _parts(cat: fx.Node) -> list[fx.Node]:
    parts = cat.args[0]
    assert isinstance(parts, (list, tuple))
    return [part for part in parts if isinstance(part, fx.Node)]


def _undo_split(cat: fx.Node) -> bool:
    parts = _parts(cat)
    split = parts[0].args[0] if parts[0].target is operator.getitem else None
    if not isinstance(split, fx.Node):
        return False
    if split.target is not torch.split or split.kwargs != {"dim": _LAST}:
        return False
    sizes = split.args[1]
    wanted = [(split, at) for at in range(len(sizes))] if isinstance(sizes, (list, tuple)) else []
    if any(p.target is not operator.getitem for p in parts) or [p.args for p in parts] != wanted:
        return False
    whole = split.args[0]
    assert isinstance(whole, fx.Node)
    cat.replace_all_uses_with(whole)
    cat.graph.erase_node(cat)
    erase_dead(cat.graph, [split, *dict.fromkeys(parts)])
    return True


def _split_after(gm: fx.GraphModule, cat: fx.Node) -> bool:
    widths = [_width(gm, part) for part in _parts(cat)]
    if len(cat.users) != 1 or None in widths:
        return False
    known = [width for width in widths if width is not None]
    view: fx.Node | None = None
    (split,) = cat.users
    if _keeps_last(split, sum(known)):
        view = split
        if len(view.users) != 1:
            return False
        (split,) = view.users
    sizes = _pieces(split, sum(known), view or cat)
    if sizes is None or any(
        user.target is not operator.getitem or not isinstance(user.args[1], int)
        for user in split.users
    ):
        return False
    runs = _runs(known, sizes)
    if runs is None or len(runs) < 2:
        return False
    _rewire(cat, view, split, runs, sizes)
    return True


def _width(gm: fx.GraphModule, part: fx.Node) -> int | None:
    """The size of the last dimension, where a linear or ``torch.split`` says it."""
    if part.op == "call_module":
        module = gm.get_submodule(str(part.target))
        return module.out_features if isinstance(module, nn.Linear) else None
    if part.target is not operator.getitem or not isinstance(part.args[0], fx.Node):
        return grouped_width(gm, part)
    split = part.args[0]
    if split.target is not torch.split or split.kwargs != {"dim": _LAST}:
        return None
    sizes, at = split.args[1], part.args[1]
    size = sizes[at] if isinstance(sizes, (list, tuple)) and isinstance(at, int) else None
    return size if isinstance(size, int) else None


def _keeps_last(node: fx.Node, width: int) -> bool:
    """Whether ``node`` is a view whose last dimension is that of its input, ``width``."""
    if node.op == "call_method" and node.target in ("view", "reshape"):
        sizes: object = node.args[1] if isinstance(node.args[1], (list, tuple)) else node.args[1:]
    elif node.op == "call_function" and node.target in _VIEWS and not node.kwargs:
        sizes = node.args[1]
    else:
        return False
    # a `-1` among the others is the same number for a narrower tensor
    return isinstance(sizes, (list, tuple)) and len(sizes) > 1 and sizes[-1] == width


def _pieces(node: fx.Node, width: int, of: fx.Node) -> list[int] | None:
    """The sizes of the pieces that ``node`` splits the last dimension, ``width``, into."""
    names: tuple[str, ...]
    if node.op == "call_method" and node.target in ("split", "chunk"):
        chunks, names = node.target == "chunk", ("size", "dim")
    elif node.op == "call_function" and node.target in (*_SPLITS, *_CHUNKS):
        chunks, names = node.target in _CHUNKS, ("size", "dim")
    else:
        return None
    given = dict(zip(names, node.args[1:], strict=False))
    aliases = {"chunks": "size", "split_size": "size", "split_size_or_sections": "size"}
    given |= {aliases.get(key, key): value for key, value in node.kwargs.items()}
    size, dim = given.get("size"), given.get("dim", 0)
    rank = _rank(node.args[0] if isinstance(node.args[0], fx.Node) else of)
    if dim != _LAST and (rank is None or dim != rank - 1):
        return None
    if isinstance(size, (list, tuple)):
        sizes = [s for s in size if isinstance(s, int)]
        return sizes if len(sizes) == len(size) and sum(sizes) == width else None
    if not isinstance(size, int) or size < 1:
        return None
    step = -(-width // size) if chunks else size
    return [min(step, width - at) for at in range(0, width, step)]


def _rank(node: fx.Node) -> int | None:
    """The number of dimensions, where the front end wrote it down."""
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        return value.ndim
    found = node.meta.get("ndim")
    return found if isinstance(found, int) else None


def _runs(widths: Sequence[int], sizes: Sequence[int]) -> list[range] | None:
    """Which parts make up each piece; None where a piece ends inside a part."""
    runs, at = [], 0
    for size in sizes:
        start, left = at, size
        while left > 0 and at < len(widths):
            left -= widths[at]
            at += 1
        if left:
            return None
        runs.append(range(start, at))
    return runs


def _rewire(
    cat: fx.Node, view: fx.Node | None, split: fx.Node, runs: list[range], sizes: list[int]
) -> None:
    graph = cat.graph
    parts = _parts(cat)
    for reader in list(split.users):
        number = reader.args[1]
        assert isinstance(number, int)
        run = [parts[at] for at in runs[number]]
        with graph.inserting_before(split):
            piece = run[0]
            if len(run) > 1:
                piece = graph.call_function(torch.cat, (run,), {"dim": _LAST})
            if view is not None:
                piece = _view_like(view, piece, sizes[number])
        if len(run) > 1 or view is not None:
            piece.meta.update(reader.meta)
        reader.replace_all_uses_with(piece)
        graph.erase_node(reader)
    erase_dead(graph, [node for node in (cat, view, split) if node is not None])


def _view_like(view: fx.Node, x: fx.Node, width: int) -> fx.Node:
    """The same view of ``x``, whose last dimension is ``width``."""
    old = view.args[1] if isinstance(view.args[1], (list, tuple)) else view.args[1:]
    sizes = [*old[:-1], width]
    args = (x, sizes) if isinstance(view.args[1], (list, tuple)) else (x, *sizes)
    return view.graph.create_node(view.op, view.target, args)
