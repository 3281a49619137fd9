"""One gather for each input of pivoted bases, with what is read and no more."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from passes.base import Pass
from passes.graph.graph import calls_by_target, erase_dead
from passes.graph.writes import is_written
from passes.sharing.pivot_basis import gather_for, gathers, set_gathers


@dataclass(frozen=True)
class MergeGathers(Pass):
    """Gathers of one input become one; pieces that nothing reads any more are left out.

    Before::

        a = torch.index_select(x, -1, self.gather_0)    # kept and rest of basis_q, and of basis_k,
        kept, rest, _, _ = torch.split(a, [...], -1)    #   which was materialised
        b = torch.index_select(x, -1, self.gather_1)    # of basis_v
        kept_v, rest_v = torch.split(b, [...], -1)

    After::

        a = torch.index_select(x, -1, self.gather_2)
        kept, rest, kept_v, rest_v = torch.split(a, [...], -1)
    """

    name: ClassVar[str] = "merge-gathers"
    exact: ClassVar[bool] = True

    def rewrite(self, gm: fx.GraphModule) -> int:
        return merge_gathers(gm)


def merge_gathers(gm: fx.GraphModule) -> int:
    """See :class:`MergeGathers`; returns how many gathers were replaced."""
    calls = calls_by_target(gm, lambda module: hasattr(module, "kept"))
    by_input: dict[fx.Node, list[fx.Node]] = {}
    for nodes in calls.values():
        for node in nodes:
            gather = _gather_of(node)
            if gather is not None and not is_written(gather.all_input_nodes[0]):
                by_input.setdefault(gather.all_input_nodes[0], []).append(node)
    order = {node: at for at, node in enumerate(gm.graph.nodes)}
    count = 0
    for x, nodes in by_input.items():
        nodes.sort(key=lambda node: order[node])
        found = dict.fromkeys(_gather_of(node) for node in nodes)
        known = [gathers(gm).get(_index_of(g)) for g in found if g is not None]
        if None in known:  # a piece of a model's own class: the root of all pieces makes its index
            continue
        bases = tuple(str(node.target) for node in nodes)
        if known == [bases] or len(set(bases)) < len(bases):
            continue
        _read_one_gather(gm, x, nodes)
        count += len(found)
    _forget_unread(gm)
    return count


def _gather_of(basis: fx.Node) -> fx.Node | None:
    """The gather that a pivoted basis' call reads; None where it was folded."""
    rest = basis.args[0]
    if not isinstance(rest, fx.Node) or rest.target is not operator.getitem:
        return None
    split = rest.args[0]
    gather = split.args[0] if isinstance(split, fx.Node) else None
    known = isinstance(gather, fx.Node) and gather.target is torch.index_select
    return gather if known and isinstance(gather, fx.Node) else None


def _index_of(gather: fx.Node) -> str:
    index = gather.args[2]
    assert isinstance(index, fx.Node)
    return str(index.target)


def _read_one_gather(gm: fx.GraphModule, x: fx.Node, nodes: list[fx.Node]) -> None:
    for node in nodes:
        (total,) = node.users
        rest = node.args[0]
        (kept,) = (n for n in total.all_input_nodes if n is not node)
        assert isinstance(rest, fx.Node)
        split = rest.args[0]
        assert isinstance(split, fx.Node)
        total.replace_all_uses_with(node)
        node.args = (x,)
        gm.graph.erase_node(total)
        gather = split.all_input_nodes[0]
        erase_dead(gm.graph, [*gather.all_input_nodes[1:], gather, split, kept, rest])
    gather_for(gm, x, nodes)


def _forget_unread(gm: fx.GraphModule) -> None:
    read = {str(node.target) for node in gm.graph.nodes if node.op == "get_attr"}
    for name in set(gathers(gm)) - read:
        delattr(gm, name)
    set_gathers(gm, {name: bases for name, bases in gathers(gm).items() if name in read})
