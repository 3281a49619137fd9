"""Show each matrix of a stack of experts as a linear of its own.

Legend for shapes: E experts, O output features, I input features, S pairs of a token and an expert.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from passes.base import Pass
from passes.errors import RequiresError
from passes.graph.graph import attribute, erase_dead, new_linear, put_module

_BMM = (torch.bmm, torch.ops.aten.bmm.default)


def expert_rows(experts: Tensor, count: int) -> tuple[Tensor, ...]:
    """For each of ``count`` experts the positions ``(·,)`` in ``experts`` ``(S,)`` that name it."""
    return tuple((experts == number).nonzero().flatten() for number in range(count))


def joined_rows(rows: Sequence[Tensor], parts: Sequence[Tensor]) -> Tensor:
    """The inverse of taking ``rows``: ``parts`` ``(·, O)`` in the pairs' order, ``(S, O)``."""
    order = torch.cat(list(rows)).argsort()
    return torch.cat(list(parts)).index_select(0, order)


@dataclass(frozen=True)
class Stack:
    """A batched product with one matrix of a stack per row.

    ``parameter`` is the stack's name, ``(E, O, I)`` or with ``transposed`` ``(E, I, O)``; ``bias``
    that of its biases ``(E, O)``. ``input`` ``(S, I)`` and ``experts`` ``(S,)`` are nodes, as are
    the product ``result`` ``(S, O)`` and ``added``, which adds the biases to it in place; ``inner``
    are those in between, in order.
    """

    parameter: str
    bias: str | None
    transposed: bool
    input: fx.Node
    experts: fx.Node
    result: fx.Node
    added: fx.Node | None
    inner: tuple[fx.Node, ...]


@dataclass(frozen=True)
class UnstackExperts(Pass):
    """One linear per expert, over the rows that are routed to it; nothing is copied.

    Before::

        w = self.experts.down_proj[experts]                   # (S, O, I), gathered
        y = torch.bmm(w, x.unsqueeze(-1)).squeeze(-1)

    After::

        rows = expert_rows(experts, 2)
        y_0 = getattr(self.experts.down_proj, '0')(x.index_select(0, rows[0]))
        y_1 = getattr(self.experts.down_proj, '1')(x.index_select(0, rows[1]))
        y = joined_rows([rows[0], rows[1]], [y_0, y_1])

    The number of rows depends on the data, as in a loop over experts, and no weight is gathered.
    """

    name: ClassVar[str] = "unstack-experts"
    exact: ClassVar[bool] = True

    parameters: tuple[str, ...] = ()

    def requires(self, gm: fx.GraphModule) -> None:
        found = stacks(gm)
        for name in self.parameters:
            if name not in found:
                raise RequiresError(
                    f"{self.name}: {name!r} is not read as a stack of experts only (indexed by "
                    f"expert, then multiplied with bmm); stacks of this graph: {sorted(found)[:6]}"
                )

    def rewrite(self, gm: fx.GraphModule) -> int:
        found = stacks(gm)
        routes: dict[tuple[fx.Node, int], list[fx.Node]] = {}
        placed: set[str] = set()
        count = 0
        for name in self.parameters:
            for stack in found[name]:
                if name not in placed:
                    tensors = _tensors(gm, stack)
                    _place(gm, name, *tensors)
                    placed.add(name)
                _unstack(gm, stack, routes)
                count += 1
        return count


def stacks(gm: fx.GraphModule) -> Mapping[str, tuple[Stack, ...]]:
    """The stacks of experts whose every reader is such a product, by the parameter's name."""
    readers: dict[str, list[Stack | None]] = {}
    for node in gm.graph.nodes:
        if node.op != "get_attr":
            continue
        value = attribute(gm, str(node.target))
        if isinstance(value, nn.Parameter) and value.ndim == 3:
            found = readers.setdefault(str(node.target), [])
            found += [_stack(gm, node, user) for user in node.users]
    return {
        name: tuple(one for one in found if one is not None)
        for name, found in readers.items()
        if found and None not in found
    }


def _stack(gm: fx.GraphModule, weight: fx.Node, gathered: fx.Node) -> Stack | None:
    experts = _index(gathered, weight)
    product = _only_user(gathered)
    if experts is None or product is None or product.op != "call_function":
        return None
    if product.target not in _BMM or len(product.args) != 2 or product.kwargs:
        return None
    transposed = product.args[1] is gathered
    widened = product.args[0 if transposed else 1]
    at = 1 if transposed else -1
    narrowed = _only_user(product)
    if not isinstance(widened, fx.Node) or not _is(widened, "unsqueeze", at):
        return None
    if narrowed is None or not _is(narrowed, "squeeze", at):
        return None
    x = widened.args[0]
    if not isinstance(x, fx.Node):
        return None
    inner = [weight, gathered, widened, product]
    name = str(weight.target)
    for user in narrowed.users:
        biases = user.args[1] if user.target == "add_" and len(user.args) == 2 else None
        stored = biases.args[0] if isinstance(biases, fx.Node) and biases.args else None
        if (
            isinstance(biases, fx.Node)
            and isinstance(stored, fx.Node)
            and user.args[0] is narrowed
            and stored.target == f"{name}_bias"
            and _index(biases, stored) is experts
        ):
            inner = [stored, biases, *inner]
            bias = str(stored.target)
            return Stack(name, bias, transposed, x, experts, narrowed, user, tuple(inner))
    return Stack(name, None, transposed, x, experts, narrowed, None, tuple(inner))


def _index(node: fx.Node, of: fx.Node) -> fx.Node | None:
    """The node that indexes the first dimension of ``of``."""
    if node.op != "call_function" or node.target is not operator.getitem or node.args[0] is not of:
        return None
    index = node.args[1]
    if isinstance(index, (tuple, list)) and len(index) == 1:
        (index,) = index
    return index if isinstance(index, fx.Node) else None


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _is(node: fx.Node, method: str, dim: int) -> bool:
    return node.op == "call_method" and node.target == method and node.args[1:] == (dim,)


def _tensors(gm: fx.GraphModule, stack: Stack) -> tuple[Tensor, Tensor | None]:
    weight: Any = attribute(gm, stack.parameter)
    bias: Any = None if stack.bias is None else attribute(gm, stack.bias)
    with torch.enable_grad():  # without it the views would say that weights are frozen
        return (weight.transpose(1, 2) if stack.transposed else weight), bias


def _place(gm: fx.GraphModule, name: str, weight_EOI: Tensor, bias_EO: Tensor | None) -> None:
    for number in range(len(weight_EOI)):
        bias_O = None if bias_EO is None else bias_EO[number]
        linear = new_linear(
            weight_EOI[number],
            bias_O,
            requires_grad=weight_EOI.requires_grad,
            training=gm.training,
        )
        if bias_EO is not None:
            linear.bias.requires_grad_(bias_EO.requires_grad)
        put_module(gm, f"{name}.{number}", linear)


def _unstack(
    gm: fx.GraphModule, stack: Stack, routes: dict[tuple[fx.Node, int], list[fx.Node]]
) -> None:
    graph = gm.graph
    holder = gm.get_submodule(stack.parameter)
    count = len(holder._modules)
    if (stack.experts, count) not in routes:
        with graph.inserting_after(stack.experts):
            rows = graph.call_function(expert_rows, (stack.experts, count))
        picked: list[fx.Node] = []
        at = rows
        for number in range(count):
            with graph.inserting_after(at):
                at = graph.call_function(operator.getitem, (rows, number))
            picked.append(at)
        routes[stack.experts, count] = picked
    picked = routes[stack.experts, count]
    with graph.inserting_before(stack.result):
        parts = []
        for number, rows in enumerate(picked):
            x = graph.call_method("index_select", (stack.input, 0, rows))
            parts.append(graph.call_module(f"{stack.parameter}.{number}", (x,)))
        y = graph.call_function(joined_rows, (picked, parts))
    for node in (*parts, y):
        node.meta.update(stack.result.meta)
    for node in filter(None, (stack.added, stack.result)):
        node.replace_all_uses_with(y)
        graph.erase_node(node)
    erase_dead(graph, stack.inner)
