"""The scores of an attention: what lies between the linears that compute queries and keys, and the
product of the two.

A number of the width of a head may go from queries and keys alike where nothing else is computed
from it. Rotary embeddings turn two numbers into one another: these go together. Which do is told by
the graph: an operation adds the two up, whatever the order that they lie in. Where queries and keys
are moved about and nothing else, any matrix may be taken from one to the other.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import fx
from torch.utils._python_dispatch import _disable_current_modes

from passes.graph.heads import (
    Heads,
    in_order,
    is_free,
    is_free_size,
    leading,
    parts_of,
    reads_dtype,
    reads_size,
)
from passes.graph.hidden import name_of
from passes.graph.layouts import Layout, Rows, Unknown
from passes.graph.moved import ATTENTION, Leaf, Moved, given
from passes.graph.turned import Turned

_PRODUCTS = {"matmul": (0, 1), "bmm": (0, 1), "baddbmm": (1, 2), ATTENTION: (0, 1)}
_NAMED = ("input", "query", "batch1"), ("mat2", "other", "key", "batch2")

Rotary = Literal["none", "halves", "neighbours"]
"""Which numbers of a head go together: none, so that any matrix may stand between queries and keys;
of the first numbers i and i + half of them; or 2 i and 2 i + 1."""


class NotScores(Exception):
    """Why what two linears compute are no queries and keys that may be narrower."""


@dataclass(eq=False)
class Scores(Heads):
    """What computes the scores of some calls of an attention: ``heads`` queries of that ``width``,
    neighbours in groups that share one of the keys (``values`` here are these; both by slice and
    first row there)."""

    queries: tuple[tuple[str, int], ...] = ()
    rotary: Rotary = "none"
    rotated: int = 0
    """How many numbers of a head are turned, the first ones."""
    calls: tuple[fx.Node, ...] = ()
    """The products of queries and keys."""
    within: Rows = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64), repr=False)
    """The place in its head of every row of queries and keys, -1 of others."""

    @property
    def query_slices(self) -> dict[str, int]:
        """The slices of the queries, and how many heads each has."""
        found: dict[str, int] = {}
        for name, _ in self.queries:
            found[name] = found.get(name, 0) + 1
        return found

    @property
    def turned(self) -> Turned:
        """The layouts that it was found in."""
        assert isinstance(self.moved, Turned)
        return self.moved

    def places(self, rows: Rows) -> Rows:
        """The place in its head of each of some rows, -1 of those of something else."""
        known = rows < len(self.within)
        found: Rows = torch.where(known, self.within[torch.where(known, rows, 0)], -1)
        return found

    def is_own(self, rows: Rows) -> bool:
        """Whether rows are of queries and keys alone."""
        return bool((self.places(rows) >= 0).all())

    def is_mixture(self, rows: Rows) -> bool:
        """Whether rows are of queries or keys, and of something else as well."""
        own = self.places(rows) >= 0
        return bool(own.any()) and not bool(own.all())


def score_calls(gm: fx.GraphModule) -> list[fx.Node]:
    """The nodes that may be the product of queries and keys."""
    return [
        node
        for node in gm.graph.nodes
        if node.op in ("call_function", "call_method") and name_of(node) in _PRODUCTS
    ]


def operands_of(call: fx.Node) -> tuple[Any, Any]:
    """What computes queries, and keys, of a product of the two."""
    at = _PRODUCTS[name_of(call)]
    found = []
    for place, names in zip(at, _NAMED, strict=True):
        default = next((call.kwargs[name] for name in names if name in call.kwargs), None)
        found.append(call.args[place] if len(call.args) > place else default)
    return found[0], found[1]


def attention_scores(gm: fx.GraphModule, calls: Iterable[fx.Node], leaf: Leaf) -> Scores:
    """What lies between linears and some products of queries and keys, all of the same linears.

    Raises :class:`NotScores` with the reason, in words that follow the name of the queries.
    """
    with _disable_current_modes():  # numbers of rows are no part of what is traced
        try:
            return _attention_scores(gm, tuple(calls), leaf)
        except Unknown as fault:
            raise NotScores(str(fault)) from fault


def calls_by_slices(gm: fx.GraphModule, leaf: Leaf) -> dict[tuple[str, ...], list[fx.Node]]:
    """The products whose operands both come from linears by moving rows about and turning them, by
    the slices that they come from."""
    found: dict[tuple[str, ...], list[fx.Node]] = {}
    with _disable_current_modes():
        for call in score_calls(gm):
            moved = Turned(gm, leaf, 0)
            try:
                layouts = [moved.layout(end) for end in operands_of(call)]
            except Unknown:
                continue
            rows = {row for layout in layouts for row in layout.rows.flatten().tolist()}
            names = [name for name, start in moved.starts.items() if start in rows]
            found.setdefault(tuple(sorted(names)), []).append(call)
    return found


def _attention_scores(gm: fx.GraphModule, calls: tuple[fx.Node, ...], leaf: Leaf) -> Scores:
    moved = Turned(gm, leaf, 0)
    found: Scores | None = None
    ends: list[tuple[Rows, Rows]] = []
    for call in calls:
        query, key = operands_of(call)
        if not isinstance(query, fx.Node) or not isinstance(key, fx.Node) or query is key:
            raise Unknown(f"reads {call.name!r}, which multiplies no two tensors")
        one, end = _scores(moved, call, moved.layout(query), moved.layout(key))
        ends.append(end)
        if found is not None and (one.width, one.queries, one.values) != (
            found.width,
            found.queries,
            found.values,
        ):
            raise Unknown("has other heads at each of its calls")
        found = one
    assert found is not None
    found.moved, found.calls = moved, calls
    _place_rows(moved, found)
    found.rotary, found.rotated = _rotary(found, ends)
    own = set(found.slices) | set(found.query_slices)
    found.leaves = {n: names for n, names in moved.leaves.items() if set(names) & own}
    _trace(moved, found)
    return found


def _scores(
    moved: Turned, call: fx.Node, query: Layout, key: Layout
) -> tuple[Scores, tuple[Rows, Rows]]:
    """The heads of one product, and which rows it multiplies: ``(heads, width)`` of both."""
    q_rows, k_rows = _by_head(query, -1, call), _by_head(key, _width_at(call), call)
    (heads, width), kv_heads = q_rows.shape, len(k_rows)
    if k_rows.shape[1] != width or heads % kv_heads:
        raise Unknown(f"has {heads} queries of {width}, and {kv_heads} keys of {k_rows.shape[1]}")
    if 1 < kv_heads < heads and name_of(call) != ATTENTION:
        raise Unknown(f"has fewer keys than queries in {call.name!r}")
    k_rows = k_rows.repeat_interleave(heads // kv_heads, 0)
    q_homes, k_homes = (_homes(moved, rows) for rows in (q_rows, k_rows))
    own = list(dict.fromkeys(k_homes))
    group = heads // len(own)
    if len(set(q_homes)) < heads or k_homes != [home for home in own for _ in range(group)]:
        raise Unknown("has queries that share keys otherwise than in groups of neighbours")
    return Scores(width, heads, tuple(own), queries=tuple(q_homes)), (q_rows, k_rows)


def _width_at(call: fx.Node) -> int:
    return -1 if name_of(call) == ATTENTION else -2


def _by_head(layout: Layout, at: int, call: fx.Node) -> Rows:
    """The rows ``(heads, width)`` of what is multiplied."""
    if len(layout.dims) < 2 or layout.dims[-3 - at] is not None or not (layout.dims[at] or 0) > 0:
        raise Unknown(f"reads {call.name!r}, which multiplies no heads by positions")
    rows = layout.rows.movedim(layout.labelled(len(layout.dims) + at), -1)
    return rows.reshape(-1, rows.shape[-1])


def _homes(moved: Turned, rows: Rows) -> list[tuple[str, int]]:
    """The slice of every head, and its first row there."""
    found, width = [], rows.shape[1]
    for head in rows:
        row = int(head.min())
        if sorted(head.tolist()) != list(range(row, row + width)):
            raise Unknown("reads a part of a head, or of several")
        for name, start in moved.starts.items():
            if start <= row < start + moved.sizes[name]:
                if row + width > start + moved.sizes[name] or (row - start) % width:
                    raise Unknown(
                        "reads heads that are parts of several slices; split the weight by part "
                        "or head"
                    )
                found.append((name, row - start))
    return found


def _place_rows(moved: Turned, found: Scores) -> None:
    """Note where in its head every row is; all rows of a slice must be those of heads."""
    if set(found.query_slices) & set(found.slices):
        raise Unknown("has queries and keys that are parts of one slice; split the weight by part")
    found.within = torch.full((sum(moved.sizes.values()),), -1, device="cpu")
    both = (found.query_slices, found.queries), (found.slices, found.values)
    for slices, homes in both:
        for name, heads in slices.items():
            size, start = moved.sizes[name], moved.starts[name]
            if size != heads * found.width:
                raise Unknown(
                    f"reads a part of {name!r}, which has {size} rows; split the weight into "
                    "queries, keys and values"
                )
            firsts = [at for slice_, at in homes if slice_ == name]
            if any(low >= high for low, high in pairwise(firsts)):
                raise Unknown(f"reads the heads of {name!r} in another order than its rows have")
            found.within[start : start + size] = torch.arange(size, device="cpu") % found.width


def _rotary(found: Scores, ends: list[tuple[Rows, Rows]]) -> tuple[Rotary, int]:
    """Which numbers of a head go together."""
    width, moved = found.width, found.turned
    met: set[tuple[int, int]] = set()
    for first, second in moved.pairs:
        a, b = found.places(first), found.places(second)
        if bool(((a < 0) & (b < 0)).all()):
            continue
        if bool((a < 0).any() or (b < 0).any() or (first - a != second - b).any()):
            raise Unknown("adds up rows of several heads, or of something else")
        met |= set(zip(a.flatten().tolist(), b.flatten().tolist(), strict=True))
    turned = bool(met) or any(found.is_own(moved.layout(node).rows) for node in moved.tables)
    for q_rows, k_rows in ends:
        a, b = found.places(q_rows), found.places(k_rows)
        turned = turned or bool((a != torch.arange(width, device="cpu")).any() or (a != b).any())
        met |= set(zip(a.flatten().tolist(), b.flatten().tolist(), strict=True))
    if not turned:
        return "none", 0
    groups = _groups(met, width)
    rotated = sum(len(group) for group in groups if len(group) > 1)
    kinds: tuple[Rotary, ...] = ("halves", "neighbours")
    for rotary in kinds:
        if groups == together(rotary, rotated, width):
            return rotary, rotated
    some = [group for group in groups if len(group) > 1][:3]
    raise Unknown(
        f"turns numbers of a head into one another that are neither halves nor neighbours: {some}"
    )


def _groups(met: set[tuple[int, int]], width: int) -> tuple[tuple[int, ...], ...]:
    """The numbers that meet, directly or through others, by the first of them."""
    first = list(range(width))
    for low, high in sorted(met):
        a, b = first[low], first[high]
        if a != b:
            first = [min(a, b) if one in (a, b) else one for one in first]
    groups: dict[int, list[int]] = {}
    for number, own in enumerate(first):
        groups.setdefault(own, []).append(number)
    return tuple(tuple(group) for group in groups.values())


def together(rotary: Rotary, rotated: int, width: int) -> tuple[tuple[int, ...], ...]:
    """The numbers of a head that stay or go together, by the first of them."""
    half = rotated // 2
    pairs: list[tuple[int, ...]] = [
        (i, i + half) if rotary == "halves" else (2 * i, 2 * i + 1) for i in range(half)
    ]
    return (*pairs, *((i,) for i in range(2 * half, width)))


def _trace(moved: Turned, found: Scores) -> None:
    """Sort the nodes after the leaves: those that hold queries and keys alone, and those that take
    a slice out of a product of several. Raise where something else reads either."""
    stack = [n for n, layout in moved.layouts.items() if found.is_mixture(layout.rows)]
    while stack:
        node = stack.pop()
        found.products[node] = None
        for user in node.users:
            if reads_dtype(user, node):
                continue
            if is_free_size(moved, user, node):
                if not moved.layout(node).is_flat and any(read.users for read in user.users):
                    raise Unknown(f"reads a product of several slices whose size {user.name!r} is")
                continue
            for part in parts_of(user):
                own = moved.layout(part)
                if not found.is_mixture(own.rows):
                    found.taken[part] = in_order(moved, own)
                elif part not in found.products:
                    stack.append(part)
    for node, names in found.taken.items():
        if leading(moved.layout(node)) is None:
            raise Unknown(f"reads {names[0]!r}, taken out of a weight in a way that is not known")
    found.between = {n: layout for n, layout in moved.layouts.items() if found.is_own(layout.rows)}
    for node in found.between:
        _check_users(moved, node, found)


def _check_users(moved: Turned, node: fx.Node, found: Scores) -> None:
    layout = moved.layouts[node]
    inside = {*found.between, *found.products}
    for user in node.users:
        if user in found.calls:
            held = [*user.args, *user.kwargs.values()]
            if node in operands_of(user) and sum(one is node for one in held) == 1:
                continue
            raise Unknown(f"reads queries or keys that {user.name!r} reads as something else, too")
        if user in inside or reads_dtype(user, node) or _has_parts(user, inside):
            continue
        if reads_size(user) and _is_size_of(moved, layout, user, inside):
            continue
        if name_of(user) == "update" and user.op == "call_method":
            items = [item for item in user.users if item.args[1:] == (0,)]
            if user.args[1] is node and all(item in inside for item in items):
                continue
        raise Unknown(f"computes what goes to {user.name!r} as well")


def _has_parts(user: fx.Node, inside: set[fx.Node]) -> bool:
    """Whether a node takes a tensor to pieces, all of which are known."""
    return parts_of(user) != [user] and all(part in inside for part in user.users)


def _is_size_of(moved: Turned, layout: Layout, user: fx.Node, inside: set[fx.Node]) -> bool:
    """Whether sizes are read one by one, in front, or for the view of rows."""
    if user.target is not getattr and given(user, 1, "dim") is not None:
        return isinstance(given(user, 1, "dim"), int)
    for read in user.users:
        at = read.args[1] if read.target is operator.getitem else None
        one = isinstance(at, int) and not layout.open
        if read in inside or one or is_free(layout, at, read) or at == -1:
            continue
        if not is_repeated(moved, read):
            return False
    return True


def is_repeated(moved: Moved, node: fx.Node) -> bool:
    """Whether a node gives rows the size of others, as values are given that of queries."""
    if name_of(node) not in ("expand", "broadcast_to"):
        return False
    try:
        return not moved.layout(node).open
    except Unknown:
        return False


__all__ = [
    "NotScores",
    "Rotary",
    "Scores",
    "attention_scores",
    "calls_by_slices",
    "is_repeated",
    "operands_of",
    "score_calls",
    "together",
]
