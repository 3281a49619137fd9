"""Fold the gather of a pivoted basis into the rows of what produces its input."""

from __future__ import annotations

import operator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import fx, nn
from torch.nn import functional as F

from passes.base import Pass
from passes.graph.graph import linear_at, new_linear, put_module
from passes.graph.lookups import only_called
from passes.graph.origins import reordered
from passes.graph.slices import Slice, gather_order, set_slices, slices
from passes.sharing.pivot_basis import gathers, set_gathers

_MODULES = (nn.GELU, nn.ReLU, nn.SiLU, nn.Sigmoid, nn.Tanh, nn.Identity, nn.Dropout)
_FUNCTIONS = frozenset(
    {
        F.gelu,
        F.relu,
        F.silu,
        F.dropout,
        F.sigmoid,
        F.tanh,
        torch.nn.functional.gelu,
        torch.relu,
        torch.sigmoid,
        torch.tanh,
        torch.mul,
        torch.add,
        torch.sub,
        torch.pow,
        operator.mul,
        operator.add,
        operator.sub,
        operator.pow,
        operator.truediv,
        operator.neg,
        torch.ops.aten.gelu.default,
        torch.ops.aten.relu.default,
        torch.ops.aten.silu.default,
        torch.ops.aten.sigmoid.default,
        torch.ops.aten.tanh.default,
        torch.ops.aten.mul.Tensor,
        torch.ops.aten.add.Tensor,
        torch.ops.aten.pow.Tensor_Scalar,
    }
)
_METHODS = frozenset({"relu", "sigmoid", "tanh", "mul", "add", "sub", "pow"})


@dataclass(frozen=True)
class FoldGathers(Pass):
    """When a gather is the only reader of an activation whose elements are made one by one from
    the outputs of linears, those linears' rows are put in the gather's order instead.

    Before::

        h = self.gelu(self.c_fc(x))
        gathered = torch.index_select(h, -1, self.gather_3)
        kept, rest = torch.split(gathered, [R, I - R], -1)

    After::

        h = self.gelu(self.c_fc(x))                    # rows of c_fc in the order kept, rest
        kept, rest = torch.split(h, [R, I - R], -1)

    Only linears that hold one slice and are called once are reordered. Which inputs were kept stays
    in the basis' ``kept`` buffer, so a slice's weight can still be told in its original order.
    """

    name: ClassVar[str] = "fold-gathers"
    exact: ClassVar[bool] = True

    def rewrite(self, gm: fx.GraphModule) -> int:
        calls = only_called(gm)
        once = {name for name, nodes in calls.items() if len(nodes) == 1}
        whole = _whole_slices(gm, once)
        count = 0
        for node in list(gm.graph.nodes):
            if node.target is not torch.index_select or len(node.args) != 3:
                continue
            index = node.args[2]
            x = node.args[0]
            name = str(index.target) if isinstance(index, fx.Node) else ""
            bases = gathers(gm).get(name, ())
            # a gather for several bases has an order of its own for each of them
            if len(bases) != 1 or not isinstance(x, fx.Node) or len(x.users) != 1:
                continue
            producers = _producers(gm, x, node)
            if not producers or not all(str(p.target) in whole for p in producers):
                continue
            for producer in producers:
                _reorder(gm, str(producer.target), whole[str(producer.target)], bases[0])
            node.replace_all_uses_with(x)
            gm.graph.erase_node(node)
            if not index.users:
                gm.graph.erase_node(index)
            # layers that read one pivoted basis share its index
            if not any(n.op == "get_attr" and n.target == name for n in gm.graph.nodes):
                delattr(gm, name)
                set_gathers(gm, {k: v for k, v in gathers(gm).items() if k != name})
            count += 1
        return count


def _whole_slices(gm: fx.GraphModule, among: AbstractSet[str]) -> dict[str, str]:
    """Those ``among`` the linears that hold exactly one slice, in its original order, and that
    slice's name."""
    held: dict[str, list[str]] = {}
    for name, place in slices(gm).items():
        held.setdefault(place.module, []).append(name)
    return {
        module: names[0]
        for module, names in held.items()
        if len(names) == 1
        and module in among
        and slices(gm)[names[0]].folded is None
        and slices(gm)[names[0]].start == 0
        and slices(gm)[names[0]].stop == linear_at(gm, module).out_features
    }


def _producers(gm: fx.GraphModule, x: fx.Node, reader: fx.Node) -> list[fx.Node]:
    """The linear calls whose outputs make ``x`` element by element; empty where anything else has a
    part in it or reads what is between."""
    region: set[fx.Node] = set()
    producers: list[fx.Node] = []
    stack = [x]
    while stack:
        node = stack.pop()
        if node in region:
            continue
        region.add(node)
        if node.op == "call_module":
            module = gm.get_submodule(str(node.target))
            if isinstance(module, nn.Linear):
                producers.append(node)
                continue
            if not isinstance(module, _MODULES) or getattr(module, "inplace", False):
                return []
        elif node.op == "call_function":
            if node.target not in _FUNCTIONS or "out" in node.kwargs:
                return []
        elif node.op != "call_method" or node.target not in _METHODS:
            return []
        inputs = node.all_input_nodes
        if not inputs:
            return []
        stack += [n for n in inputs if not _is_switch(gm, n)]
    for node in region:
        if any(user not in region and user is not reader for user in node.users):
            return []
    return sorted(producers, key=lambda node: str(node.target))


def _is_switch(gm: fx.GraphModule, node: fx.Node) -> bool:
    """A number that follows train/eval: a module called without inputs."""
    return node.op == "call_module" and not node.args and not node.kwargs


def _reorder(gm: fx.GraphModule, module: str, slice_name: str, basis: str) -> None:
    old = linear_at(gm, module)
    order = gather_order(gm, basis)
    weight, bias = old.weight.detach(), None if old.bias is None else old.bias.detach()
    if order is not None:
        index = order.to(weight.device)
        weight = weight.index_select(0, index)
        bias = None if bias is None else bias.index_select(0, index)
    new = new_linear(weight, bias, requires_grad=old.weight.requires_grad, training=gm.training)
    if bias is not None:
        new.bias.requires_grad_(old.bias.requires_grad)
    for name, buffer in old.named_buffers(recurse=False):
        new.register_buffer(name, buffer)
    put_module(gm, module, new)
    place: Slice = slices(gm)[slice_name]
    set_slices(gm, {slice_name: replace(place, folded=basis)})
    reordered(gm, module, basis)
