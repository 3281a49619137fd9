"""How the rows of experts are put together, and taken apart again."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from passes.graph.stacks import ndim_of
from passes.sharing.unstack_experts import expert_rows, joined_rows

_ENDS = ("cpu", torch.int64)
_SPLITS = (torch.split, torch.functional.split, torch.ops.aten.split_with_sizes.default, "split")
_CATS = (torch.cat, torch.ops.aten.cat.default)
Way = tuple[object, ...]
"""Equal for a join and for what undoes it: by the rows that a routing gives each expert, in a
dimension of their own, or in runs that end somewhere or have some sizes."""


def cut_of(node: fx.Node) -> tuple[Way, dict[fx.Node, int], list[fx.Node]] | None:
    """How a node takes a part of its first argument, the parts by node, and the sizes that are read
    of what is no part."""
    arguments: Any = node.args
    if not arguments or not isinstance(arguments[0], fx.Node):
        return None
    if (node.op, node.target) == ("call_method", "index_select") and len(arguments) == 3:
        _, dim, rows = arguments
        at = _number_of(rows)
        return None if at is None or dim != 0 else (("rows", at[0]), {node: at[1]}, [])
    if (node.op, node.target) == ("call_method", "select") and len(arguments) == 3:
        source, dim, number = arguments
        if not isinstance(dim, int) or not isinstance(number, int) or number < 0:
            return None
        return ("stack", _from_end(dim, ndim_of(source))), {node: number}, []
    if node.target is operator.getitem and type(arguments[1]) is int and arguments[1] >= 0:
        ndim = ndim_of(arguments[0])
        return None if ndim is None else (("stack", -ndim), {node: arguments[1]}, [])
    ends, sizes = _ends(node), _sizes(node)
    items: Any = [(user, user.args[1]) for user in node.users if user.target is operator.getitem]
    if len(items) < len(node.users):
        return None
    if sizes is not None:
        return ("split", *sizes), dict(items), []
    if ends is None:
        return None
    last = max((number for _, number in items), default=0)
    rest = [size for user, number in items if number == last for size in user.users]
    if not all(size.target == "size" and size.args[1:] == (0,) for size in rest):
        return None
    parts = {user: number for user, number in items if number < last}
    return ("runs", ends, last), parts, rest


def _number_of(rows: object) -> tuple[fx.Node, int] | None:
    """Of which routing some rows are, and those of which expert."""
    if not isinstance(rows, fx.Node) or rows.target is not operator.getitem:
        return None
    routing: Any = rows.args[0]
    number: Any = rows.args[1]
    return (routing, number) if routing.target is expert_rows else None


def _from_end(dim: int, ndim: int | None) -> int:
    return dim if ndim is None or dim < 0 else dim - ndim


def _ends(node: fx.Node) -> fx.Node | None:
    """Where a node cuts rows into runs: at the ends that another node has."""
    if node.target is not torch.tensor_split or len(node.args) != 2:
        return None
    ends = node.args[1]
    if not isinstance(ends, fx.Node) or ends.target != "to" or ends.args[1:] != _ENDS:
        return None
    return ends.args[0] if isinstance(ends.args[0], fx.Node) else None


def _sizes(node: fx.Node) -> list[object] | None:
    """The sizes of the runs that a node cuts rows into."""
    arguments: Any = [*node.args[1:], *node.kwargs.values()]
    if node.target not in _SPLITS or len(arguments) not in (1, 2) or arguments[1:] not in ([], [0]):
        return None
    return list(arguments[0]) if isinstance(arguments[0], (list, tuple)) else None


@dataclass(frozen=True)
class Join:
    """The parts of experts in their order, and how they are put together."""

    way: Way
    parts: tuple[fx.Node, ...]
    rest: fx.Node | None = None
    """The number of rows that are no expert's."""


def join_of(node: fx.Node) -> Join | None:
    """What a node puts together, and how; None where it does not."""
    arguments: Any = node.args
    if node.target is joined_rows:
        rows, parts = arguments
        found = [_number_of(one) for one in rows]
        routing = found[0][0] if found and found[0] is not None else None
        if routing is None or found != [(routing, n) for n in range(len(parts))]:
            return None
        if routing.args[1:] != (len(parts),):
            return None
        return Join(("rows", routing), tuple(parts))
    if not arguments or not isinstance(arguments[0], (list, tuple)) or not arguments[0]:
        return None
    if node.target is torch.stack:
        dim: Any = arguments[1] if len(arguments) > 1 else node.kwargs.get("dim", 0)
        return Join(("stack", _from_end(dim, ndim_of(node))), tuple(arguments[0]))
    dims = [*arguments[1:], *node.kwargs.values()]
    return _of_runs(arguments[0]) if node.target in _CATS and dims in ([], [0]) else None


def _of_runs(found: Sequence[fx.Node]) -> Join | None:
    """The products of the runs of some rows, put together in their order."""
    run = _run_of(found[0])
    source: Any = None if run is None else run.args[0]
    if source is None:
        return None
    sizes, ends = _sizes(source), _ends(source)
    parts = found if sizes is not None else found[:-1]
    runs = [_run_of(part) for part in parts]
    if any(run is None or run.args != (source, number) for number, run in enumerate(runs)):
        return None
    if sizes is not None:
        return Join(("split", *sizes), tuple(parts)) if len(parts) == len(sizes) else None
    shape: Any = found[-1].args[1] if found[-1].target == "new_zeros" else (None,)
    left = shape[0]
    if not isinstance(left, fx.Node) or left.target != "size" or left.args[1:] != (0,):
        return None
    rest: Any = left.args[0]
    if rest.target is not operator.getitem or rest.args != (source, len(parts)):
        return None
    return Join(("runs", ends, len(parts)), tuple(parts), left)


def _run_of(part: fx.Node) -> fx.Node | None:
    """The run of rows that a product of an expert, or one in slices, is computed from."""
    while part.op == "call_module" or part.target in (*_CATS, operator.getitem):
        first: Any = part.args[0]
        if part.target is operator.getitem and (_ends(first) or _sizes(first)):
            return part
        part = first[0] if isinstance(first, (list, tuple)) else first
    return None


__all__ = ["Join", "Way", "cut_of", "join_of"]
