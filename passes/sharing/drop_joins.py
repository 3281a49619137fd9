"""Hand each expert what it made itself, where all of it was put together and taken apart again."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from passes.base import Pass
from passes.graph.graph import attribute, linear_at
from passes.graph.hidden import (
    VIEWS,
    Hidden,
    NotHidden,
    hidden_units,
    input_of,
    name_of,
    reads_dtype,
)
from passes.graph.noted import NOTED
from passes.graph.stacks import ndim_of
from passes.graph.writes import is_in_place, is_written
from passes.sharing.joins import Join, Way, cut_of, join_of
from passes.sharing.unstack_experts import erase_chain


@dataclass(frozen=True)
class DropJoins(Pass):
    """Steps element by element between the products of experts, for each expert apart.

    Before, after :class:`passes.UnstackExperts`::

        y = joined_rows([rows_0, rows_1], [up_0, up_1])
        h = silu(y)
        z_0 = getattr(self.experts.down_proj, '0')(h.index_select(0, rows_0))
        z_1 = getattr(self.experts.down_proj, '1')(h.index_select(0, rows_1))

    After::

        z_0 = getattr(self.experts.down_proj, '0')(silu(up_0))
        z_1 = getattr(self.experts.down_proj, '1')(silu(up_1))

    Experts may then be of different widths. Likewise ``torch.stack`` and ``select``, and runs of
    rows that ``torch.cat`` puts together and ``torch.tensor_split`` takes apart at the same ends,
    or ``torch.split`` in the same sizes.
    """

    name: ClassVar[str] = "drop-joins"
    exact: ClassVar[bool] = True

    linears: tuple[str, ...] | None = None
    """Those that are to read what their expert made; None for all of them."""

    def rewrite(self, gm: fx.GraphModule) -> int:
        count = 0
        for one in _taken(gm):
            if self.linears is not None and not one.readers.intersection(self.linears):
                continue
            try:
                between, joins = _between(gm, one)
            except NotHidden:
                continue
            _hand_out(gm, one, between, joins)
            count += len(one.parts)
        return count


def kept_joins(gm: fx.GraphModule) -> Mapping[fx.Node, str]:
    """The nodes that take an expert's part of what is put together for other reasons than to be
    taken apart again, and why :class:`DropJoins` leaves them, in words that follow the name of the
    linear that reads them."""
    found: dict[fx.Node, str] = {}
    for one in _taken(gm):
        try:
            _between(gm, one)
        except NotHidden as fault:
            found |= dict.fromkeys(one.parts, str(fault))
    return found


def takes_apart(gm: fx.GraphModule) -> bool:
    """Whether a graph has what :class:`DropJoins` looks at."""
    return next(_taken(gm), None) is not None


@dataclass(eq=False)
class _Taken:
    """Parts that are taken of one node, in one way: their nodes and the number of each."""

    source: fx.Node
    way: Way
    cuts: list[fx.Node] = field(default_factory=list)
    """The nodes that read the source."""
    parts: dict[fx.Node, int] = field(default_factory=dict)
    rest: list[fx.Node] = field(default_factory=list)
    """The sizes that are read of rows which are no expert's."""
    units: int = 0
    """The width that the linears read."""
    readers: set[str] = field(default_factory=set)
    """The linears."""


def _taken(gm: fx.GraphModule) -> Iterator[_Taken]:
    """What of a graph is taken apart to be read by the linears of experts."""
    found: dict[object, _Taken] = {}
    for node in list(gm.graph.nodes):
        cut = cut_of(node)
        if cut is None:
            continue
        way, parts, rest = cut
        source = node.args[0]
        assert isinstance(source, fx.Node)
        one = found.setdefault((source, way), _Taken(source, way))
        one.cuts.append(node)
        one.parts |= parts
        one.rest += rest
        for part in parts:
            for user in part.users:
                if (
                    user.op == "call_module"
                    and type(gm.get_submodule(str(user.target))) is nn.Linear
                ):
                    one.readers.add(str(user.target))
                    one.units = linear_at(gm, str(user.target)).in_features
    for one in found.values():
        if one.readers:
            _look_through_expand(one)
            yield one


def _look_through_expand(one: _Taken) -> None:
    """Let what is taken be taken of what was expanded to the size that it has when it is put
    together in this way: a product that may have one input for all experts does that."""
    kind: object = one.way[0]
    where: Any = one.way[1]
    node = one.source
    if (node.op, node.target) != ("call_method", "expand") or set(node.users) != set(one.cuts):
        return
    source: Any = node.args[0]
    sizes = list(node.args[1:])
    if kind == "runs" or ndim_of(source) != len(sizes):
        return
    at = 0 if kind == "rows" else where
    size: Any = sizes.pop(at)
    if any(other != -1 for other in sizes):
        return
    if kind == "rows":
        assert isinstance(where, fx.Node)
        if (
            not isinstance(size, fx.Node)
            or size.target != "size"
            or size.args != (where.args[0], 0)
        ):
            return
    one.source, one.cuts = source, [node]


def _width(gm: fx.GraphModule, part: fx.Node) -> int | None:
    """How many numbers of each row an expert makes; None where its part is no product."""
    arguments: Any = part.args
    if part.op == "call_module":
        module = gm.get_submodule(str(part.target))
        return module.out_features if isinstance(module, nn.Linear) else None
    if part.target is torch.cat and part.kwargs == {"dim": -1}:
        widths = [_width(gm, one) for one in arguments[0]]
        return None if None in widths else sum(width or 0 for width in widths)
    if part.target is operator.getitem and isinstance(arguments[1], tuple):
        whole = _width(gm, arguments[0])
        dots, *taken = arguments[1]
        if whole is not None and dots is Ellipsis and len(taken) == 1:
            return len(range(*taken[0].indices(whole)))
    return None


def _between(gm: fx.GraphModule, one: _Taken) -> tuple[Hidden, Mapping[fx.Node, Join]]:
    """What lies between the joins and the parts that are taken, and the joins.

    Raises :class:`NotHidden` where that is more than steps of single rows that nothing else reads.
    """
    joins: dict[fx.Node, Join] = {}

    def leaf(node: fx.Node) -> tuple[str, int] | None:
        join = join_of(node)
        if join is None or join.way != one.way or max(one.parts.values()) >= len(join.parts):
            return None
        widths = {_width(gm, part) for part in join.parts}
        width = widths.pop()
        if widths or width is None or any(is_written(part, node) for part in join.parts):
            return None
        joins[node] = join
        return node.name, width

    found = hidden_units(gm, one.cuts, leaf, one.units)
    if len(joins) > 1 and len({ndim_of(node) or node for node in joins}) > 1:
        raise NotHidden("reads what is put together in tensors of different dimensions")
    for node in found.parts:
        if node not in joins and not _is_row_by_row(gm, node, found):
            raise NotHidden(
                f"reads what {node.name!r} makes of the rows of all experts at once, which is not "
                "the same for each apart"
            )
        for user in node.users:
            counts = not reads_dtype(user, node) or "ndim" in user.args or name_of(user) == "dim"
            if counts and user not in found.parts and user not in one.cuts:
                raise NotHidden(f"reads rows of all experts that {user.name!r} counts")
    return found, joins


def _is_row_by_row(gm: fx.GraphModule, node: fx.Node, between: Hidden) -> bool:
    """Whether a step is the same for some rows apart, which may have a dimension less."""
    if node.op == "call_module":
        plain = not isinstance(gm.get_submodule(str(node.target)), nn.Dropout)
    else:
        plain = name_of(node) not in VIEWS | {"dropout"}
    others = [one for one in node.all_input_nodes if one not in between.parts]
    tensors = [attribute(gm, str(one.target)) for one in others if one.op == "get_attr"]
    flat = all(not isinstance(one, Tensor) or one.ndim < 2 for one in tensors)
    return plain and flat and not is_in_place(node)


def _hand_out(
    gm: fx.GraphModule, one: _Taken, between: Hidden, joins: Mapping[fx.Node, Join]
) -> None:
    own: dict[int, dict[fx.Node, fx.Node]] = {
        number: {node: join.parts[number] for node, join in joins.items()}
        for number in sorted(one.parts.values())
    }
    inside = [node for node in gm.graph.nodes if node in between.parts]
    for node in inside:
        if node in joins:
            continue
        with gm.graph.inserting_before(node):
            for parts in own.values():
                parts[node] = _copied(gm.graph, node, parts, less=one.way[0] == "stack")
    first = next(iter(own.values()))
    for node in inside:
        for user in list(node.users):
            if user not in between.parts and user not in one.cuts:  # its dtype, which all have
                user.replace_input_with(node, first[node])
    for taken, number in one.parts.items():
        taken.replace_all_uses_with(own[number][input_of(one.cuts[0])])
    for join in joins.values():
        for size in one.rest:
            assert join.rest is not None, "runs have a rest"
            size.replace_all_uses_with(join.rest)
    for node in (*one.parts, *one.rest):
        erase_chain(node)


def _copied(
    graph: fx.Graph, node: fx.Node, parts: Mapping[fx.Node, fx.Node], *, less: bool
) -> fx.Node:
    """The step for one expert, of whose parts a stack has one dimension more."""
    new = graph.node_copy(node, lambda operand: parts.get(operand, operand))
    if new.target is torch.ops.aten.slice.Tensor:  # of the last dimension, counted from the first
        new.args = (new.args[0], -1, *new.args[2:])
    ndim = ndim_of(node)
    for key in ("val", "tensor_meta", *NOTED):
        new.meta.pop(key, None)
    if ndim is not None:
        new.meta["ndim"] = ndim - less
    return new


__all__ = ["DropJoins", "kept_joins", "takes_apart"]
