"""How the weight of a linear reaches the node that multiplies by it.

A weight is a ``get_attr`` node, or a few rows of one (``w[:32]``: the query's part of a fused
projection), perhaps transposed (``x @ w.T``).
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

_TRANSPOSING = {"t", "transpose", "permute", "swapaxes"}
_TRANSPOSING_FUNCTIONS = {
    torch.t: "t",
    torch.transpose: "transpose",
    torch.permute: "permute",
    torch.ops.aten.t.default: "t",
    torch.ops.aten.transpose.int: "transpose",
    torch.ops.aten.permute.default: "permute",
    torch.ops.aten.numpy_T.default: "t",
    torch.ops.aten.mT.default: "mT",
}
_MATMULS = (operator.matmul, torch.matmul, torch.ops.aten.matmul.default)
_EINSUMS = (torch.einsum, torch.functional.einsum)


@dataclass(frozen=True)
class Operand:
    """A tensor that the module owns: ``target`` is its qualified name, ``tensor`` what the node
    reads of it. ``rows`` are the rows that are read, None for all; ``transposed`` says that the
    node reads ``tensor.T``."""

    target: str
    tensor: Tensor
    transposed: bool
    rows: tuple[int, int] | None

    @property
    def name(self) -> str:
        """The name of a linear with this weight: the owner's where it is called ``weight``."""
        if self.rows is not None:
            return f"{self.target}.rows_{self.rows[0]}_{self.rows[1]}"
        owner, _, field = self.target.rpartition(".")
        return owner if field == "weight" and owner else self.target


def operand_of(gm: fx.GraphModule, argument: object) -> Operand | None:
    """The stored tensor that an argument reads; None where it is computed otherwise."""
    if not isinstance(argument, fx.Node):
        return None
    if argument.op == "get_attr":
        value = operator.attrgetter(str(argument.target))(gm)
        return Operand(str(argument.target), value, False, None) if _is_tensor(value) else None
    if _transposes(argument):
        inner = operand_of(gm, argument.args[0])
        if inner is None or inner.tensor.ndim != 2:
            return None
        return Operand(inner.target, inner.tensor, not inner.transposed, inner.rows)
    if argument.op == "call_function" and argument.target is operator.getitem:
        inner = operand_of(gm, argument.args[0])
        rows = None if inner is None else _rows(argument.args[1], len(inner.tensor))
        if inner is None or rows is None or inner.transposed or inner.rows is not None:
            return None
        with torch.enable_grad():  # without it the view would say that a weight is frozen
            return Operand(inner.target, inner.tensor[slice(*rows)], False, rows)
    return None


def product_of(node: fx.Node) -> tuple[Any, Any, bool] | None:
    """``(x, weight, by_rows)`` where the node multiplies the last dimension of ``x`` by a weight
    with ``@``, ``matmul`` or ``einsum``; ``by_rows`` says that the weight is ``(out, in)``."""
    if (node.op == "call_method" and node.target == "matmul") or _is(node, _MATMULS):
        if len(node.args) == 2 and not node.kwargs:
            return node.args[0], node.args[1], False
    elif _is(node, _EINSUMS) and not node.kwargs:
        equation, *operands = node.args
        if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
            operands = list(operands[0])
        if isinstance(equation, str) and len(operands) == 2:
            by_rows = _einsum(equation)
            return None if by_rows is None else (operands[0], operands[1], by_rows)
    return None


def chain(node: fx.Node) -> list[fx.Node]:
    """The nodes between a stored tensor and its reader, the tensor's own first."""
    nodes = [node]
    while nodes[0].op != "get_attr" and nodes[0].all_input_nodes:
        nodes.insert(0, nodes[0].all_input_nodes[0])
    return nodes


def readers(node: fx.Node) -> list[fx.Node]:
    """Who reads a stored tensor, transposed, in part or as it is."""
    found = []
    for user in node.users:
        passes_on = user.target is operator.getitem and isinstance(user.args[1], slice)
        found += readers(user) if passes_on or _transposes(user) else [user]
    return found


def _einsum(equation: str) -> bool | None:
    """Whether the weight is ``(out, in)`` in ``...i,oi->...o``; None for another contraction."""
    left, arrow, output = equation.replace(" ", "").partition("->")
    x, comma, weight = left.partition(",")
    if not arrow or not comma or len(weight) != 2 or "," in weight:
        return None
    batch, i = x[:-1], x[-1:]
    for by_rows, o, contracted in ((True, weight[0], weight[1]), (False, weight[1], weight[0])):
        if contracted == i and o not in x and output == batch + o and len(set(weight)) == 2:
            return by_rows
    return None


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


def _is(node: fx.Node, functions: tuple[Any, ...]) -> bool:
    return node.op == "call_function" and node.target in functions


def _transposes(node: fx.Node) -> bool:
    """Whether the node is the transpose of a matrix."""
    return swaps_last(node, 2)


def swaps_last(node: fx.Node, ndim: int) -> bool:
    """Whether the node swaps the last two of ``ndim`` dimensions."""
    if node.op == "call_method" and node.target in _TRANSPOSING:
        how = str(node.target)
    elif node.op == "call_function" and node.target is getattr:
        return node.args[1] == "mT" or (node.args[1] == "T" and ndim == 2)
    elif node.op == "call_function" and node.target in _TRANSPOSING_FUNCTIONS:
        how = _TRANSPOSING_FUNCTIONS[node.target]
    else:
        return False
    if node.kwargs:
        return False
    given = node.args[1:]
    if len(given) == 1 and isinstance(given[0], (tuple, list)):
        given = tuple(given[0])
    if how == "mT":
        return True
    if how == "t":
        return not given and ndim == 2
    dims = [d % ndim for d in given if isinstance(d, int)]
    if len(dims) != len(given):
        return False
    last = [ndim - 2, ndim - 1]
    return dims == [*range(ndim - 2), *last[::-1]] if how == "permute" else sorted(dims) == last


def _rows(index: object, size: int) -> tuple[int, int] | None:
    if not isinstance(index, slice) or index.step not in (None, 1):
        return None
    if not all(bound is None or isinstance(bound, int) for bound in (index.start, index.stop)):
        return None
    start, stop, _ = index.indices(size)
    return (start, stop) if start < stop else None
