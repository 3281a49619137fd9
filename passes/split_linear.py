"""Turn each named linear into one matmul per slice of its rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from passes.base import Pass
from passes.errors import EnsuresError, RequiresError
from passes.graph import LinearCall, erase_dead, is_linear, linear_calls, new_linear, put_module
from passes.slices import Slice, set_slices


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


def _place_modules(gm: fx.GraphModule, site: SplitSite, call: LinearCall) -> None:
    weight_OI, bias_O = call.weight_OI, call.bias_O
    for rows in site.rows:
        put_module(
            gm,
            rows.name,
            new_linear(
                weight_OI[rows.start : rows.stop],
                None if bias_O is None else bias_O[rows.start : rows.stop],
                requires_grad=weight_OI.requires_grad,
                training=gm.training,
            ),
        )


def _split(graph: fx.Graph, call: LinearCall, site: SplitSite) -> None:
    node = call.node
    operands = [n for n in node.all_input_nodes if n.op == "get_attr"]
    with graph.inserting_before(node):
        parts = [graph.call_module(rows.name, (call.input,)) for rows in site.rows]
        y = parts[0]
        if len(parts) > 1:
            y = graph.call_function(torch.cat, (parts,), {"dim": -1})
    for new in {*parts, y}:
        new.meta.update(node.meta)
    node.replace_all_uses_with(y)
    graph.erase_node(node)
    erase_dead(graph, operands)
