"""Whole heads of an attention: what lies between queries, keys, values and the linear that reads
them, if some of the key-value heads go, each with the queries that share it.

Nothing may mix heads, or treat one otherwise than the others: between the scores and the sum of
values stand a softmax, numbers that are the same for all heads, and what goes element by element.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import _disable_current_modes

from passes.graph.heads import Heads, NotHeads, attention_heads, reads_dtype
from passes.graph.hidden import name_of
from passes.graph.layouts import Rows, Unknown
from passes.graph.modes import crossing
from passes.graph.moved import ATTENTION, Leaf, given
from passes.graph.noted import shape_of
from passes.graph.scores import NotScores, Scores, attention_scores
from passes.graph.trimming import trimmed

_PRODUCTS = frozenset({"matmul", "bmm", "baddbmm"})
# fmt: off
_ALONE = frozenset({
    "_safe_softmax", "_softmax", "_to_copy", "alias", "bfloat16", "clamp", "clamp_max",
    "clamp_min", "clone", "contiguous", "detach", "double", "dropout", "float", "half", "softmax",
    "tanh", "to", "type", "type_as",
})
"""What reads one tensor of scores."""
_BESIDE = frozenset({
    "add", "div", "iadd", "imul", "masked_fill", "maximum", "minimum", "mul", "multiply", "sub",
    "truediv", "true_divide", "where",
})
# fmt: on
_SOFTMAX = frozenset({"_safe_softmax", "_softmax", "softmax"})
_MODULES = (nn.Dropout, nn.Identity, nn.Softmax)


class NotWhole(Exception):
    """Why heads of an attention cannot go."""


@dataclass(eq=False)
class WholeHeads:
    """The heads that one linear reads: the values in groups that share one, and the scores of the
    same groups, all in the order of their rows."""

    values: Heads
    scores: Scores

    @property
    def groups(self) -> int:
        """How many key-value heads there are."""
        return self.values.kv_heads

    @property
    def slices(self) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
        """The slices of queries, keys and values, in the order of their heads."""
        return (
            tuple(self.scores.query_slices),
            tuple(self.scores.slices),
            tuple(self.values.slices),
        )


def whole_heads(
    gm: fx.GraphModule, consumers: Iterable[fx.Node], leaf: Leaf, inputs: int
) -> WholeHeads:
    """The heads that some calls of one linear with so many inputs read.

    Raises :class:`NotWhole` with the reason, in words that follow the linear's name.
    """
    try:
        values = attention_heads(gm, consumers, leaf, inputs)
        assert values.moved is not None
        calls: dict[fx.Node, None] = {}
        for node in values.moved.mixed:
            calls |= dict.fromkeys(_products(gm, node, set(values.moved.mixed)))
        scores = attention_scores(gm, calls, leaf)
    except (NotHeads, NotScores) as fault:
        raise NotWhole(str(fault)) from fault
    if (scores.heads, scores.kv_heads) != (values.heads, values.kv_heads):
        raise NotWhole(
            f"reads {values.heads} heads with {values.kv_heads} values, and {scores.heads} queries "
            f"have {scores.kv_heads} keys"
        )
    if values.kv_heads < 2:
        raise NotWhole("reads heads that all share one key and one value, of which none can go")
    group = scores.heads // scores.kv_heads
    for homes, size in ((scores.queries, group), (scores.values, 1), (values.values, 1)):
        _check_order([name for name, _ in homes], size)
    return WholeHeads(values, scores)


def _check_order(names: Sequence[str], group: int) -> None:
    """Raise where the heads of a slice, named by head, are no neighbours, or part a group."""
    runs = [len(list(run)) for _, run in groupby(names)]
    if len(runs) > len(set(names)):
        raise NotWhole("reads heads of several slices in turns")
    at = 0
    for run in runs:
        if (run % group or at % group) and at // group != (at + run - 1) // group:
            raise NotWhole(f"reads heads of which {group} share a key, and slices of {run}")
        at += run


def spans(slices: Mapping[str, int], groups: int) -> dict[str, tuple[int, int]]:
    """Which of the key-value heads the rows of slices are of, from the first to before the second;
    ``slices`` are those of queries, keys or values in order, and their numbers of rows."""
    each = sum(slices.values()) // groups
    found, at = {}, 0
    for name, rows in slices.items():
        found[name] = at // each, -(-(at + rows) // each)
        at += rows
    return found


def without(gm: fx.GraphModule, found: Heads, kept: Sequence[int]) -> Callable[[], None]:
    """What leaves all but some key-value heads, and their queries, out of what lies between the
    linears of ``found`` and what reads them, once the linears compute no others.

    Raises :class:`NotWhole` where something between cannot do with fewer.
    """
    moved = found.moved
    assert moved is not None
    own = torch.zeros(found.kv_heads, dtype=torch.bool, device="cpu")
    own[list(kept)] = True
    stays = torch.ones(sum(moved.sizes.values()), dtype=torch.bool, device="cpu")
    for slices in [found.slices, *([found.query_slices] if isinstance(found, Scores) else [])]:
        rows = torch.cat(
            [torch.arange(moved.sizes[n], device="cpu") + moved.starts[n] for n in slices]
        )
        stays[rows] = own.repeat_interleave(len(rows) // len(own))

    def stay(rows: Rows) -> Tensor:
        known = rows < len(stays)
        there: Tensor = stays[torch.where(known, rows, 0)] | ~known
        return there

    with _disable_current_modes():
        try:
            return trimmed(gm, found, stay)
        except Unknown as fault:
            raise NotWhole(str(fault)) from fault


def _products(gm: fx.GraphModule, node: fx.Node, sums: set[fx.Node]) -> list[fx.Node]:
    """The products of queries and keys by which an attention, or a product with values, sums."""
    if name_of(node) == ATTENTION:
        _check_beside(gm, given(node, 3, "attn_mask"), node)
        return [node]
    walk = _Walk(gm)
    weights = given(node, 0, "input")
    if not isinstance(weights, fx.Node) or not walk.comes(weights):
        raise NotWhole(
            f"has weights of a sum that are no scores alone, head by head: {walk.other!r} comes "
            f"before {node.name!r}"
        )
    for one, own in walk.found.items():
        for user in one.users if own else ():
            if user not in sums and not walk.found.get(user) and not reads_dtype(user, one):
                raise NotWhole(f"has scores that go to {user.name!r} as well")
    return walk.products


def _check_beside(gm: fx.GraphModule, operand: Any, node: fx.Node) -> None:
    """Raise where an operand beside the scores is not the same for all heads."""
    shape = shape_of(gm, operand)
    if shape is None:
        raise NotWhole(f"has scores that {node.name!r} combines with {operand}, of unknown sizes")
    if len(shape) > 2 and shape[-3] != 1:
        raise NotWhole(
            f"has scores that {node.name!r} combines with other numbers for each head, as biases "
            "of relative positions are"
        )


@dataclass(eq=False)
class _Walk:
    """From the weights of a sum back to the scores."""

    gm: fx.GraphModule
    found: dict[fx.Node, bool] = field(default_factory=dict)
    """Nodes, and whether they are computed from scores."""
    products: list[fx.Node] = field(default_factory=list)
    other: str = ""
    """The first node that nothing is known of."""

    def comes(self, node: fx.Node) -> bool:
        """Whether a node is computed from scores, head by head."""
        if node not in self.found:
            self.found[node] = False
            self.found[node] = self._comes(node)
        return self.found[node]

    def _comes(self, node: fx.Node) -> bool:
        operands = self._operands(node)
        if operands is None:
            self.other = self.other or node.name
            return False
        if not operands:
            self.products.append(node)
            if name_of(node) == "baddbmm":
                _check_beside(self.gm, given(node, 0, "input"), node)
            return True
        known = {one: self.comes(one) for one in operands if isinstance(one, fx.Node)}
        if not any(known.values()):
            return False
        for one, own in known.items():
            if not own:
                _check_beside(self.gm, one, node)
        return True

    def _operands(self, node: fx.Node) -> list[Any] | None:
        """What a node may have of scores; none of a product, None of what reads no scores."""
        if node.op == "call_module":
            module = self.gm.get_submodule(str(node.target))
            is_last = not isinstance(module, nn.Softmax) or self._is_last(node, module.dim)
            return [node.args[0]] if type(module) in _MODULES and is_last else None
        if node.op not in ("call_function", "call_method"):
            return None
        name = name_of(node)
        if name in _PRODUCTS:
            return []
        if name in _SOFTMAX and not self._is_last(node, given(node, 1, "dim")):
            return None
        if name in _ALONE or node.target is crossing:
            return [given(node, 0, "input")]
        if name in _BESIDE:
            return [*node.args, *(x for key, x in node.kwargs.items() if key != "alpha")]
        return None

    def _is_last(self, node: fx.Node, dim: Any) -> bool:
        shape = shape_of(self.gm, node)
        return dim == -1 or (shape is not None and dim == len(shape) - 1)


__all__ = ["NotWhole", "WholeHeads", "spans", "whole_heads", "without"]
