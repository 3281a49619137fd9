"""Put the slices of one weight, where they stayed dense, together again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from passes.base import Pass
from passes.graph.graph import linear_at
from passes.graph.lookups import only_called
from passes.graph.slices import slices
from passes.packing.fuse_coefficients import fuse_calls, fuse_modules, fusible


@dataclass(frozen=True)
class MergeSlices(Pass):
    """One matmul for neighbouring slices that share no basis.

    Before::

        q = getattr(self.c_attn, 'q')(x);  k = getattr(self.c_attn, 'k')(x)
        y = torch.cat([q, k], dim = -1)

    After::

        y = self.c_attn(x)

    Slices that are views of one weight, as :class:`passes.SplitLinear` makes them, become a view of
    it again; others (after loading, each has memory of its own) are concatenated. A slice that is
    also called elsewhere stays.
    """

    name: ClassVar[str] = "merge-slices"
    exact: ClassVar[bool] = True

    def rewrite(self, gm: fx.GraphModule) -> int:
        calls = only_called(gm)
        dense = {place.module for place in slices(gm).values() if place.basis is None}
        order = {node: at for at, node in enumerate(gm.graph.nodes)}
        runs = [run for node in gm.graph.nodes for run in _runs(node, dense)]
        runs = [run for run in runs if run == sorted(run, key=order.__getitem__)]
        count = 0
        for names, places in fusible(gm, runs):
            if any(len(calls[name]) != len(places) for name in names):
                continue
            sizes = [linear_at(gm, name).out_features for name in names]
            merged = fuse_modules(gm, names, join=join_rows)
            for nodes in places:
                fuse_calls(gm, merged, sizes, nodes)
            count += len(places)
        return count


def _runs(cat: fx.Node, dense: set[str]) -> Iterator[list[fx.Node]]:
    """The runs of two or more dense slices of one input in a ``cat`` over the last dimension."""
    if cat.op != "call_function" or cat.target is not torch.cat or cat.kwargs != {"dim": -1}:
        return
    run: list[fx.Node] = []
    parts = cat.args[0]
    assert isinstance(parts, (list, tuple))
    for part in [*parts, None]:
        known = isinstance(part, fx.Node) and part.op == "call_module" and part.target in dense
        if known and run and part.args == run[0].args and part not in run:
            run.append(part)
            continue
        if len(run) > 1:
            yield run
        run = [part] if known else []


def join_rows(tensors: list[Tensor]) -> Tensor:
    """The tensors one below the other: a view where they are neighbours in one memory."""
    first = tensors[0]
    at = first.storage_offset()
    for tensor in tensors:
        same = tensor.untyped_storage()._cdata == first.untyped_storage()._cdata
        if not same or tensor.stride() != first.stride() or tensor.storage_offset() != at:
            return torch.cat(tensors)
        at += len(tensor) * tensor.stride(0)
    rows = sum(len(tensor) for tensor in tensors)
    return first.as_strided((rows, *first.shape[1:]), first.stride(), first.storage_offset())
