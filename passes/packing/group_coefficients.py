"""One batched matmul for coefficients that read different pieces of one product."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx, nn

from passes.base import Pass
from passes.graph.graph import attribute, erase_dead, linear_at, put_module
from passes.graph.lookups import only_called
from passes.graph.slices import slices
from passes.graph.writes import is_written
from passes.packing.fuse_coefficients import fuse_modules, fusible, replace_run

EQUATION = "...nr,nor->...no"


@dataclass(frozen=True)
class GroupCoefficients(Pass):
    """Coefficients of equal shape on neighbouring pieces of a stacked product become one product.

    Before::

        z = self.basis_0_to_basis_3(x)                  # Linear(I, 4 R)
        z0, z1, z2, z3 = torch.split(z, [R, R, R, R], -1)
        y = torch.cat([self.c_attn.q.0(z0), ..., self.c_attn.q.3(z3)], dim = -1)

    After::

        z = self.basis_0_to_basis_3(x)
        z_nR = torch.unflatten(z, -1, (4, R))
        weight_nOR = torch.unflatten(self.c_attn.weight, 0, (4, O))
        y_nO = torch.einsum('...nr,nor->...no', z_nR, weight_nOR)
        y = torch.flatten(y_nO, -2) + self.c_attn.bias

    The block-diagonal matrix of the coefficients is never written: stored numbers stay what they
    were, so that only coefficients of one rank and one height go together. (Padding ranks would
    store numbers that mean nothing.)

    Of fewer than ``least`` nothing is gained: q, k and v of a width of 1024 take 5 to 13 % longer
    this way in eager mode, six parts no less, 48 heads a quarter of the time at one token.

    The weight keeps its name and its rows, and the graph reads it as a tensor, which torchao and
    PEFT do not see. No module of ``torch.nn`` does this but ``Conv1d(groups=n)``, with its channels
    in the wrong place, and a subclass of ``nn.Linear`` would be quantised or adapted by tools that
    take it for a plain one. Give such tools the readable graph.
    """

    name: ClassVar[str] = "group-coefficients"
    exact: ClassVar[bool] = True

    least: int = 6

    def rewrite(self, gm: fx.GraphModule) -> int:
        calls = only_called(gm)
        coefficients = {p.module for p in slices(gm).values() if p.basis_rows and p.module in calls}
        runs = [run for node in gm.graph.nodes for run in _runs(gm, node, coefficients)]
        count = 0
        for names, places in fusible(gm, [run for run in runs if len(run) >= self.least]):
            if any(len(calls[name]) != len(places) for name in names):
                continue
            grouped = _place(gm, names)
            for nodes in places:
                _call(gm, grouped, nodes)
            count += len(places)
        return count


def _runs(gm: fx.GraphModule, cat: fx.Node, coefficients: set[str]) -> Iterator[list[fx.Node]]:
    """The runs of two or more parts of a ``cat`` over the last dimension that can be one product:
    coefficients of one shape, each on the next piece of one ``torch.split``."""
    if cat.op != "call_function" or cat.target is not torch.cat or cat.kwargs != {"dim": -1}:
        return
    parts = cat.args[0]
    assert isinstance(parts, (list, tuple))
    run: list[fx.Node] = []
    for part in [*parts, None]:
        piece = _piece(part, coefficients)
        if piece is not None and run and _follows(gm, run[-1], part):
            run.append(part)
            continue
        if len(run) > 1:
            yield run
        run = [] if piece is None else [part]


def _piece(part: object, coefficients: set[str]) -> tuple[fx.Node, int] | None:
    """The ``torch.split`` and the number of its piece that a coefficient reads, where it alone
    reads the piece and nothing but one ``cat`` its product."""
    if not isinstance(part, fx.Node) or part.op != "call_module" or part.target not in coefficients:
        return None
    piece = part.args[0]
    if not isinstance(piece, fx.Node) or piece.target is not operator.getitem:
        return None
    if len(piece.users) != 1 or len(part.users) != 1:
        return None
    split, at = piece.args
    if not isinstance(split, fx.Node) or split.target is not torch.split:
        return None
    if split.kwargs != {"dim": -1} or not isinstance(split.args[1], (list, tuple)):
        return None
    if any(is_written(node) for node in (piece, part)):
        return None
    assert isinstance(at, int)
    return split, at


def _follows(gm: fx.GraphModule, before: fx.Node, node: fx.Node) -> bool:
    names = {str(before.target), str(node.target)}
    first, second = _piece(before, names), _piece(node, names)
    assert first is not None
    assert second is not None
    left, right = (linear_at(gm, str(n.target)).weight.shape for n in (before, node))
    return first[0] is second[0] and first[1] + 1 == second[1] and left == right


def _place(gm: fx.GraphModule, names: tuple[str, ...]) -> str:
    """Put the rows of all in one place, of which the graph reads the tensors."""
    name = fuse_modules(gm, names)
    fused = linear_at(gm, name)
    holder = nn.Module()
    holder.train(fused.training)
    holder.weight = fused.weight
    holder.register_parameter("bias", None)
    holder.bias = fused.bias
    put_module(gm, name, holder)
    return name


def _call(gm: fx.GraphModule, name: str, nodes: Sequence[fx.Node]) -> None:
    graph = gm.graph
    count = len(nodes)
    weight, bias = (getattr(gm.get_submodule(name), leaf) for leaf in ("weight", "bias"))
    pieces = [piece for node in nodes for piece in node.all_input_nodes]
    (cat,) = nodes[0].users
    with graph.inserting_before(cat):
        z = _joined(pieces)
        z_nR = graph.call_function(torch.unflatten, (z, -1, (count, weight.shape[1])))
        stored = graph.get_attr(f"{name}.weight")
        each = (count, len(weight) // count)
        weight_nOR = graph.call_function(torch.unflatten, (stored, 0, each))
        y_nO = graph.call_function(torch.einsum, (EQUATION, z_nR, weight_nOR))
        y = graph.call_function(torch.flatten, (y_nO, -2))
        if bias is not None:
            y = graph.call_function(torch.add, (y, graph.get_attr(f"{name}.bias")))
    y.meta.update(nodes[0].meta)
    replace_run(cat, nodes, y)
    split = pieces[0].all_input_nodes[0]
    erase_dead(graph, [split, *pieces, *nodes])


def grouped_width(gm: fx.GraphModule, node: fx.Node) -> int | None:
    """The size of the last dimension of what :class:`GroupCoefficients` made; None of others."""
    if node.target is torch.add and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    product = node.args[0] if node.target is torch.flatten and node.args[1:] == (-2,) else None
    if not isinstance(product, fx.Node) or product.args[:1] != (EQUATION,):
        return None
    (stored,) = product.all_input_nodes[1].all_input_nodes
    weight = attribute(gm, str(stored.target))
    return len(weight) if isinstance(weight, Tensor) else None


def _joined(pieces: Sequence[fx.Node]) -> fx.Node:
    """The neighbouring pieces of a ``torch.split`` as one: the whole, or a view of it."""
    (split,) = pieces[0].all_input_nodes
    (whole,) = split.all_input_nodes
    sizes, start = split.args[1], pieces[0].args[1]
    assert isinstance(sizes, (list, tuple))
    assert isinstance(start, int)
    if len(pieces) == len(sizes):
        return whole
    widths = [size for size in sizes if isinstance(size, int)]
    width = sum(widths[start : start + len(pieces)])
    return whole.graph.call_function(torch.narrow, (whole, -1, sum(widths[:start]), width))
