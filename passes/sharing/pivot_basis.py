"""Store a basis as kept inputs and a table."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor, fx, nn

from passes.base import Pass
from passes.errors import RequiresError, ShapeError
from passes.graph.graph import calls_by_target, linear_at, new_linear, put_module, read_instead
from passes.graph.slices import gather_order, set_slices, slices
from passes.graph.writes import Written

_DERIVED = "derived"


@dataclass(frozen=True, eq=False)
class PivotedGroup:
    """The pivoted factors of one basis.

    ``kept_J`` ``(R,)`` integers ascending, ``table_RT`` ``(R, I − R)``, ``coefficients`` slice
    names to ``(out_i, R)``, already multiplied with the kept block of the basis.
    """

    name: str
    kept_J: Tensor
    table_RT: Tensor
    coefficients: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class PivotBasis(Pass):
    """Pivoted storage (PIFA, arXiv 2501.19090): the same product from fewer numbers.

    Before::

        z = self.basis_q(x)                            # Linear(I, R)

    After::

        gathered = torch.index_select(x, -1, self.gather_0)
        kept, rest = torch.split(gathered, [R, I - R], -1)
        z = kept + self.basis_q(rest)                  # Linear(I - R, R), buffer `kept`

    Bases that read the same input share one gather: their pieces are cut from one ``index_select``.
    The gather's index is derived from the bases' ``kept`` buffers (:func:`derive_gathers`) and is
    not part of the state.
    """

    name: ClassVar[str] = "pivot-basis"
    exact: ClassVar[bool] = True

    groups: tuple[PivotedGroup, ...] = ()

    def requires(self, gm: fx.GraphModule) -> None:
        for group in self.groups:
            if not isinstance(gm._modules.get(group.name), nn.Linear):
                raise RequiresError(f"{self.name}: the graph has no basis {group.name!r}")
            basis = linear_at(gm, group.name)
            rank, rest = basis.out_features, basis.in_features - basis.out_features
            found = (tuple(group.kept_J.shape), tuple(group.table_RT.shape))
            if found != ((rank,), (rank, rest)):
                raise ShapeError(
                    f"{self.name}: basis {group.name!r} of rank {rank} needs {rank} kept inputs "
                    f"and a table ({rank}, {rest}), found {found[0]} and {found[1]}"
                )

    def rewrite(self, gm: fx.GraphModule) -> int:
        if not self.groups:
            return 0
        calls = calls_by_target(gm, lambda module: isinstance(module, nn.Linear))
        written = Written()
        by_input: dict[tuple[fx.Node, fx.Node | None], list[fx.Node]] = {}
        for group in self.groups:
            for node in calls.get(group.name, []):
                x = node.args[0]
                assert isinstance(x, fx.Node)
                # an input that is written into in place may differ from one read to the next
                by_input.setdefault((x, node if written[x] else None), []).append(node)
            self._place(gm, group)
        order = {node: at for at, node in enumerate(gm.graph.nodes)}
        count = 0
        for (x, _), nodes in by_input.items():
            nodes.sort(key=lambda node: order[node])
            gather_for(gm, x, nodes)
            count += len(nodes)
        return count

    def _place(self, gm: fx.GraphModule, group: PivotedGroup) -> None:
        old = linear_at(gm, group.name)
        trainable = old.weight.requires_grad
        table_RT = group.table_RT.contiguous()
        basis = new_linear(table_RT, None, requires_grad=trainable, training=gm.training)
        basis.register_buffer("kept", group.kept_J)
        gm.add_module(group.name, basis)
        for name, coefficient in group.coefficients.items():
            plain = linear_at(gm, name)
            linear = new_linear(
                coefficient.contiguous(),
                None,
                requires_grad=plain.weight.requires_grad,
                training=gm.training,
            )
            linear.bias = plain.bias
            put_module(gm, name, linear)
            set_slices(gm, {name: replace(slices(gm)[name], pivoted=True)})


def gather_for(gm: fx.GraphModule, x: fx.Node, nodes: list[fx.Node]) -> None:
    """Let the calls ``nodes`` of pivoted bases, which read ``x`` whole, read kept inputs and rest
    from one gather; the same bases elsewhere share its index."""
    derived = dict(gathers(gm))
    names = {bases: name for name, bases in derived.items()}
    bases = tuple(str(node.target) for node in nodes)
    if bases not in names:
        number = len(names)
        while hasattr(gm, f"gather_{number}"):
            number += 1
        names[bases] = f"gather_{number}"
        derived[names[bases]] = bases
    _gather(gm, x, nodes, names[bases])
    set_gathers(gm, derived)
    derive_gathers(gm)


def _gather(gm: fx.GraphModule, x: fx.Node, nodes: list[fx.Node], index: str) -> None:
    graph = gm.graph
    widths = []
    for node in nodes:
        basis = linear_at(gm, str(node.target))
        widths += [basis.out_features, basis.in_features]
    gm.register_buffer(index, torch.empty(sum(widths), dtype=torch.int32), persistent=False)
    with graph.inserting_before(nodes[0]):
        gathered = graph.call_function(torch.index_select, (x, -1, graph.get_attr(index)))
        pieces = graph.call_function(torch.split, (gathered, widths), {"dim": -1})
    for at, node in enumerate(nodes):
        with graph.inserting_before(node):
            kept = graph.call_function(operator.getitem, (pieces, 2 * at))
            rest = graph.call_function(operator.getitem, (pieces, 2 * at + 1))
        node.args = (rest,)
        with graph.inserting_after(node):
            z = graph.call_function(torch.add, (kept, node))
        read_instead(node, z)


def gathers(gm: nn.Module) -> Mapping[str, tuple[str, ...]]:
    """The dotted name of every gather's index, and the bases whose pieces it holds, in order."""
    found: Mapping[str, tuple[str, ...]] = getattr(gm, "meta", {}).get(_DERIVED, {})
    return found


def set_gathers(gm: nn.Module, found: Mapping[str, tuple[str, ...]]) -> None:
    """Record gathers; see :func:`gathers`."""
    gm.__dict__["meta"][_DERIVED] = dict(found)


def derive_gathers(gm: nn.Module) -> None:
    """Make every gather's index from the ``kept`` buffers of its bases: kept inputs ascending, then
    the others. Call it after the buffers were loaded."""
    for name, bases in gathers(gm).items():
        orders = [gather_order(gm, basis) for basis in bases]
        known = [order for order in orders if order is not None]
        if len(known) < len(orders):
            return
        path, _, leaf = name.rpartition(".")
        index = torch.cat(known).to(torch.int32)
        gm.get_submodule(path).register_buffer(leaf, index, persistent=False)


def leave_out_derived(gm: nn.Module) -> None:
    """Take the index of every gather out of the state, where fx puts it when it copies a graph."""
    for name in gathers(gm):
        path, _, leaf = name.rpartition(".")
        gm.get_submodule(path)._non_persistent_buffers_set.add(leaf)


def derived_buffers(gm: nn.Module) -> frozenset[str]:
    """Names of the buffers that :func:`derive_gathers` makes: not part of the state."""
    return frozenset(gathers(gm))
