"""Turn each named linear into one matmul per slice of its rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from passes.base import Pass
from passes.errors import EnsuresError, RequiresError
from passes.graph.graph import (
    LinearCall,
    erase_dead,
    is_linear,
    linear_calls,
    linear_input,
    new_linear,
    put_module,
)
from passes.graph.operands import chain, readers
from passes.graph.slices import Slice, set_slices


@dataclass(frozen=True)
class Rows:
    """Rows ``start:stop`` of a weight, and the name under which they go on."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True)
class SplitSite:
    """One weight: the modules that read it (several when it is tied) and its rows, in order."""

    calls: tuple[str, ...]
    rows: tuple[Rows, ...]


@dataclass(frozen=True)
class SplitLinear(Pass):
    """One matmul per slice over views of the original weight; nothing is copied.

    Before::

        y = self.h.0.c_attn(x)                        # Linear(768, 2304), Conv1D, or aten.addmm

    After::

        q = getattr(self.h.0.c_attn, 'q')(x)          # Linear(768, 768), rows 0:768 of the weight
        k = getattr(self.h.0.c_attn, 'k')(x)
        v = getattr(self.h.0.c_attn, 'v')(x)
        y = torch.cat([q, k, v], dim = -1)

    A site with a single slice becomes one ``nn.Linear``; where it is one already, its node stays as
    it is and does not count.
    """

    name: ClassVar[str] = "split-linear"
    exact: ClassVar[bool] = True

    sites: tuple[SplitSite, ...] = ()

    def requires(self, gm: fx.GraphModule) -> None:
        calls = {call.name: call for call in linear_calls(gm)}
        for site in self.sites:
            for name in site.calls:
                if name not in calls:
                    raise RequiresError(
                        f"{self.name}: no linear node reads {name!r}; the graph has linears "
                        f"{sorted(calls)[:6]}. Leave the site out, or capture another way"
                    )
                _check_rows(name, site, calls[name].weight_OI.shape[0])
                _check_tie(calls[site.calls[0]], calls[name])
        _check_names(gm, self.sites)
        _check_readers(gm, self.sites)

    def rewrite(self, gm: fx.GraphModule) -> int:
        by_name: dict[str, list[LinearCall]] = {}
        for call in linear_calls(gm):
            by_name.setdefault(call.name, []).append(call)
        count = 0
        for site in self.sites:
            calls = [call for name in site.calls for call in by_name[name]]
            set_slices(gm, {r.name: Slice(r.name, 0, r.stop - r.start) for r in site.rows})
            plain = len(site.rows) == 1 and all(
                call.node.op == "call_module"
                and isinstance(gm.get_submodule(call.name), torch.nn.Linear)
                and call.name == site.rows[0].name
                for call in calls
            )
            if plain:
                continue
            _erase_unread(gm.graph, site)
            _place_modules(gm, site, calls[0])
            for call in calls:
                _split(gm.graph, call, site)
            count += len(calls)
        return count

    def ensures(self, gm: fx.GraphModule) -> None:
        for site in self.sites:
            for rows in site.rows:
                module = gm.get_submodule(rows.name)
                if not is_linear(module):
                    raise EnsuresError(
                        f"{self.name}: expected an nn.Linear at {rows.name!r}, found "
                        f"{type(module).__name__}"
                    )


def _erase_unread(graph: fx.Graph, site: SplitSite) -> None:
    """Erase reads of the site's tensors that nothing reads: torch.export has one for each."""
    tensors = {f"{name}.{field}" for name in site.calls for field in ("weight", "bias")}
    for node in graph.find_nodes(op="get_attr"):
        if not node.users and str(node.target) in tensors:
            graph.erase_node(node)


def _check_rows(name: str, site: SplitSite, out_features: int) -> None:
    at = 0
    for rows in site.rows:
        if rows.start != at or rows.stop <= rows.start:
            raise RequiresError(
                f"split-linear: slice {rows.name!r} of {name!r} takes rows "
                f"{rows.start}:{rows.stop}, expected it to start at row {at} and not to be empty"
            )
        at = rows.stop
    if at != out_features:
        raise RequiresError(
            f"split-linear: the slices of {name!r} cover {at} rows, its weight has {out_features}"
        )


def _check_tie(first: LinearCall, other: LinearCall) -> None:
    for what in ("weight_OI", "bias_O"):
        if not same_memory(getattr(first, what), getattr(other, what)):
            raise RequiresError(
                f"split-linear: {first.name!r} and {other.name!r} of one site have not the same "
                f"{what.partition('_')[0]}; a site is one weight and one bias, make two sites"
            )


def same_memory(left: Tensor | None, right: Tensor | None) -> bool:
    """Whether two tensors are views of the same numbers; None is like None only."""
    if left is None or right is None or left is right:
        return left is right
    # two transposed views of one Conv1D weight are different objects
    return (
        left.untyped_storage()._cdata == right.untyped_storage()._cdata
        and left.storage_offset() == right.storage_offset()
        and (left.shape, left.stride()) == (right.shape, right.stride())
    )


def _check_names(gm: fx.GraphModule, sites: tuple[SplitSite, ...]) -> None:
    nodes = [node for node in gm.graph.nodes if node.op in ("call_module", "get_attr")]
    taken = {
        str(n.target) if n.op == "call_module" else str(n.target).rpartition(".")[0] for n in nodes
    }
    for site in sites:
        free = set(site.calls)
        for rows in site.rows:
            if rows.name in taken and rows.name not in free:
                raise RequiresError(
                    f"split-linear: the name {rows.name!r} of rows {rows.start}:{rows.stop} is "
                    "taken by another module; give the slice another name"
                )
            taken.add(rows.name)
            free.discard(rows.name)


def _check_readers(gm: fx.GraphModule, sites: tuple[SplitSite, ...]) -> None:
    """Splitting takes the module away: nothing but the linear calls may use it or its tensors."""
    names = {name for site in sites for name in site.calls}
    parts = {name.partition(".rows_")[0] for name in names}
    linears = {call.node: call.name for call in linear_calls(gm)}
    for node in gm.graph.nodes:
        target = str(node.target)
        if node.op == "call_module" and target in names and node not in linears:
            _refuse_reader(target, node)
        if node.op == "get_attr" and (target in parts or target.rpartition(".")[0] in names):
            for user in readers(node):
                if linears.get(user) not in names:
                    _refuse_reader(target, user)


def _refuse_reader(name: str, node: fx.Node) -> None:
    raise RequiresError(
        f"split-linear: {name!r} is also used by node {node.name!r} ({node.op}), which is no "
        "linear call; leave the site out"
    )


def _place_modules(gm: fx.GraphModule, site: SplitSite, call: LinearCall) -> None:
    weight_OI, bias_O = call.weight_OI, call.bias_O
    for rows in site.rows:
        linear = new_linear(
            weight_OI[rows.start : rows.stop],
            None if bias_O is None else bias_O[rows.start : rows.stop],
            requires_grad=weight_OI.requires_grad,
            training=gm.training,
        )
        if bias_O is not None:
            linear.bias.requires_grad_(bias_O.requires_grad)
        put_module(gm, rows.name, linear)


def _split(graph: fx.Graph, call: LinearCall, site: SplitSite) -> None:
    node = call.node
    x = linear_input(node)
    assert isinstance(x, fx.Node)
    operands = [n for read in node.all_input_nodes if read is not x for n in chain(read)]
    with graph.inserting_before(node):
        parts = [graph.call_module(rows.name, (x,)) for rows in site.rows]
        y = parts[0]
        if len(parts) > 1:
            y = graph.call_function(torch.cat, (parts,), {"dim": -1})
    for new in {*parts, y}:
        new.meta.update(node.meta)
    node.replace_all_uses_with(y)
    graph.erase_node(node)
    erase_dead(graph, dict.fromkeys(operands))
