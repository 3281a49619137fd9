"""Show each matrix of a stack of experts as a linear of its own.

Legend for shapes: E experts, O output features, I input features, S pairs of a token and an expert.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from passes.base import Pass
from passes.errors import RequiresError
from passes.graph.forms import Batched, Grouped, One, Routed, Stack
from passes.graph.graph import attribute, new_linear, put_module
from passes.graph.sizes import make_constant
from passes.graph.stacks import input_of, ndim_of, shape_reads, stacks
from passes.graph.writes import is_in_place

_KEY = "unstacked"


def expert_rows(experts: Tensor, count: int) -> tuple[Tensor, ...]:
    """For each of ``count`` experts the positions ``(·,)`` in ``experts`` ``(S,)`` that name it."""
    return tuple((experts == number).nonzero().flatten() for number in range(count))


def joined_rows(rows: Sequence[Tensor], parts: Sequence[Tensor]) -> Tensor:
    """The inverse of taking ``rows``: ``parts`` ``(·, O)`` in the pairs' order, ``(S, O)``."""
    order = torch.cat(list(rows)).argsort()
    return torch.cat(list(parts)).index_select(0, order)


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
    The other ways to read a stack (:mod:`passes.graph.stacks`) become::

        y = torch.bmm(x, self.experts.up_proj)        # before; x (E, T, I), the stack (E, I, O)

        y_0 = getattr(self.experts.up_proj, '0')(x.select(-3, 0))
        y_1 = getattr(self.experts.up_proj, '1')(x.select(-3, 1))
        y = torch.stack([y_0, y_1], -3)
    """

    name: ClassVar[str] = "unstack-experts"
    exact: ClassVar[bool] = True

    parameters: tuple[str, ...] = ()

    def requires(self, gm: fx.GraphModule) -> None:
        found = stacks(gm)
        for name in self.parameters:
            if name not in found:
                raise RequiresError(
                    f"{self.name}: {name!r} is not read as a stack of experts only (multiplied "
                    "whole, by one of its matrices, or by those that an index names); stacks of "
                    f"this graph: {sorted(found)[:6]}"
                )

    def rewrite(self, gm: fx.GraphModule) -> int:
        found = stacks(gm)
        writer = _Writer(gm.graph)
        count = 0
        for name in self.parameters:
            size = tuple(_stored(gm, name).shape)
            _place(gm, name, *_tensors(gm, found[name][0]))
            for stack in found[name]:
                writer.unstack(stack, size[0])
                count += 1
            for weight in gm.graph.find_nodes(op="get_attr", target=name):
                for read in shape_reads(weight):
                    make_constant(read, size)
                _erase_unread(weight)
        gm.meta[_KEY] = {
            **gm.meta.get(_KEY, {}),
            **{name: found[name][0].transposed for name in self.parameters},
        }
        return count


def _stored(gm: fx.GraphModule, name: str) -> Tensor:
    tensor = attribute(gm, name)
    assert isinstance(tensor, Tensor), name
    return tensor


def _tensors(gm: fx.GraphModule, stack: Stack) -> tuple[Tensor, Tensor | None]:
    weight = _stored(gm, stack.parameter)
    bias = None if stack.bias is None else _stored(gm, stack.bias)
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


class _Writer:
    """Writes the nodes of unstacked products; rows that are routed alike are found once."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.routes: dict[tuple[fx.Node, int], list[fx.Node]] = {}
        # products of which only some outputs are asked for at a time
        self.wholes: dict[object, fx.Node] = {}
        # what stands for a product, which the next one may read
        self.instead: dict[fx.Node, fx.Node] = {}

    def unstack(self, stack: Stack, count: int) -> None:
        stack = replace(stack, input=self.instead.get(stack.input, stack.input))
        form = stack.form
        if isinstance(form, Routed):
            self._find_rows(form.experts, count)
        with self.graph.inserting_before(stack.result):
            if isinstance(form, One):
                y = self._shifted(self._call(stack, form.number, stack.input), form.shift)
            elif isinstance(form, Routed):
                y = self._routed(stack, form, count)
            elif isinstance(form, Batched):
                y = self._batched(stack, form, count)
            else:
                y = self._grouped(stack, form, count)
        y.meta.update(stack.result.meta)
        for node in filter(None, (stack.added, stack.result)):
            self.instead[node] = y
            operands = node.all_input_nodes
            node.replace_all_uses_with(y)
            self.graph.erase_node(node)
            for operand in operands:
                erase_chain(operand)

    def _call(self, stack: Stack, number: int, x: fx.Node) -> fx.Node:
        ndim = ndim_of(x)
        key = (stack.parameter, number, input_of(stack.input))
        y = self.wholes.get(key)
        if y is None or stack.rows is None:
            y = self.graph.call_module(f"{stack.parameter}.{number}", (x,))
            y = y if ndim is None else _noted(y, ndim)
        if stack.rows is None:
            return y
        self.wholes[key] = y
        rows: Any = (Ellipsis, slice(*stack.rows))
        part = self.graph.call_function(operator.getitem, (y, rows))
        return part if ndim is None else _noted(part, ndim)

    def _method(self, x: fx.Node, name: str, *arguments: Any, less: int = 0) -> fx.Node:
        ndim = ndim_of(x)
        y = self.graph.call_method(name, (x, *arguments))
        return y if ndim is None else _noted(y, ndim - less)

    def _einsum(self, equation: str, x: fx.Node) -> fx.Node:
        y = self.graph.call_function(torch.einsum, (equation, x))
        ndim = ndim_of(x)
        return y if ndim is None else _noted(y, ndim)

    def _shifted(self, y: fx.Node, shift: fx.Node | None) -> fx.Node:
        return y if shift is None else self.graph.call_function(torch.add, (y, shift))

    def _routed(self, stack: Stack, form: Routed, count: int) -> fx.Node:
        x = stack.input
        if form.contraction is not None and form.contraction.before_all:
            x = self._einsum(form.contraction.before_all, x)
        if form.turned:
            x = self._method(x, "transpose", -2, -1)
        if form.spread is not None:
            pairs = self.graph.call_method("size", (form.experts, 0))
            x = self._method(x, "expand", pairs, *[-1] * (form.spread - 1))
        rows = self.routes[form.experts, count]
        parts = [
            self._call(stack, number, self._method(x, "index_select", 0, picked))
            for number, picked in enumerate(rows)
        ]
        y = self.graph.call_function(joined_rows, (rows, parts))
        if form.turned:
            y = self._method(y, "transpose", -2, -1)
        if form.contraction is not None and form.contraction.after:
            y = self._einsum(form.contraction.after, y)
        return y

    def _find_rows(self, experts: fx.Node, count: int) -> None:
        if (experts, count) in self.routes:
            return
        with self.graph.inserting_after(experts):
            rows = self.graph.call_function(expert_rows, (experts, count))
        picked: list[fx.Node] = []
        at = rows
        for number in range(count):
            with self.graph.inserting_after(at):
                at = self.graph.call_function(operator.getitem, (rows, number))
            picked.append(at)
        self.routes[experts, count] = picked

    def _batched(self, stack: Stack, form: Batched, count: int) -> fx.Node:
        x, at, read = stack.input, form.at, form.contraction
        if form.turned:
            x = self._method(x, "transpose", -2, -1)
        if form.spread is not None:
            x = self._method(x, "expand", *[-1] * (form.spread - 3), count, -1, -1)
        if read is not None and at is None and read.before:
            x = self._einsum(read.before, x)
        parts = []
        for number in range(count):
            one = x if at is None else self._method(x, "select", at, number, less=1)
            if read is not None and at is not None and read.before:
                one = self._einsum(read.before, one)
            parts.append(self._call(stack, number, one))
        if read is not None and read.total:
            y = functools.reduce(
                lambda left, right: self.graph.call_function(operator.add, (left, right)), parts
            )
        else:
            dim = 0 if at is None or read is not None else at
            y = self.graph.call_function(torch.stack, (parts, dim))
        if read is not None and read.after:
            y = self._einsum(read.after, y)
        if form.turned:
            y = self._method(y, "transpose", -2, -1)
        return self._shifted(y, form.shift)

    def _grouped(self, stack: Stack, form: Grouped, count: int) -> fx.Node:
        graph = self.graph
        # torch wants the ends on the CPU; what is behind the last one belongs to no expert
        ends = graph.call_method("to", (form.ends, "cpu", torch.int64))
        runs = graph.call_function(torch.tensor_split, (stack.input, ends))
        parts = []
        for number in range(count):
            run = _noted(graph.call_function(operator.getitem, (runs, number)), 2)
            parts.append(self._call(stack, number, run))
        rest = graph.call_function(operator.getitem, (runs, count))
        left = graph.call_method("size", (rest, 0))
        width = graph.call_method("size", (parts[0], 1))
        parts.append(_noted(graph.call_method("new_zeros", (parts[0], (left, width))), 2))
        return graph.call_function(torch.cat, (parts,))


def unstacked_as(gm: fx.GraphModule) -> Mapping[str, bool]:
    """The stacks that were taken apart, and whether their matrices were ``(in, out)``."""
    found: Mapping[str, bool] = gm.meta.get(_KEY, {})
    return found


def _noted(node: fx.Node, ndim: int) -> fx.Node:
    node.meta["ndim"] = ndim
    return node


def erase_chain(node: fx.Node) -> None:
    """Erase a node that nothing reads, and what is left without a reader before it: views of the
    stack, and inputs that were widened for a product."""
    if node.users or node.op in ("placeholder", "output") or is_in_place(node):
        return
    operands = node.all_input_nodes
    node.graph.erase_node(node)
    for operand in operands:
        erase_chain(operand)


def _erase_unread(weight: fx.Node) -> None:
    """Erase what is left of the reads of a stack: views that nothing reads."""
    for user in list(weight.users):
        _erase_unread(user)
    if not weight.users:
        weight.graph.erase_node(weight)
