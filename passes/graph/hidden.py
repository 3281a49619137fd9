"""Hidden units: what lies between the linears that compute them and the one that reads them.

Nothing but operations element by element, views that keep the last dimension, and parts of a fused
product may lie there, and nothing else may read it: then a unit is a row of every producer and a
column of the consumer, and can go. Told by the graph alone, whatever names and classes are.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from passes.graph.graph import attribute, linear_input
from passes.graph.modes import crossing
from passes.graph.stacks import ndim_of

# fmt: off
ELEMENTWISE = frozenset({
    "abs", "add", "celu", "clamp", "clamp_max", "clamp_min", "clip", "clone", "contiguous",
    "cos", "detach", "div", "dropout", "elu", "erf", "exp", "expm1", "float", "gelu", "half",
    "bfloat16", "double", "hardshrink", "hardsigmoid", "hardswish", "hardtanh", "iadd", "imul",
    "isub", "itruediv", "leaky_relu", "log1p", "log_sigmoid", "logsigmoid", "maximum",
    "minimum", "mish", "mul", "multiply", "neg", "negative", "pow", "reciprocal", "relu",
    "relu6", "rsqrt", "rsub", "selu", "sigmoid", "silu", "sin", "softplus", "softshrink",
    "softsign", "sqrt", "square", "sub", "subtract", "tanh", "tanhshrink", "threshold", "to",
    "true_divide", "truediv", "type", "type_as", "_to_copy",
})
# fmt: on
_MODULES = (
    *(nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Mish, nn.ELU, nn.SELU, nn.CELU, nn.LeakyReLU),
    *(nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Softplus, nn.Softsign, nn.Tanhshrink),
    *(nn.Softshrink, nn.Hardshrink, nn.LogSigmoid, nn.Threshold, nn.Sigmoid, nn.Tanh),
    *(nn.Identity, nn.Dropout),
)
VIEWS = frozenset({"view", "reshape", "_unsafe_view"})
_CHUNKS, SPLITS = frozenset({"chunk"}), frozenset({"split", "split_with_sizes"})
_OF_DTYPE = frozenset({"dtype", "device", "ndim", "layout"})
_FIRST = frozenset({"dropout"})
"""What further operands of these are is no tensor of units."""
_READ_DTYPE = frozenset({"to", "type_as", "is_floating_point", "dim", "element_size", "_to_copy"})


class NotHidden(Exception):
    """Why what a linear reads are no hidden units."""


@dataclass(eq=False)
class Hidden:
    """The nodes between producers and consumers. ``parts`` is how many runs of the units each
    node's last dimension has; ``sized`` are nodes that name their number."""

    units: int
    leaves: dict[fx.Node, str] = field(default_factory=dict)
    """Calls of producers, and their names."""
    parts: dict[fx.Node, int] = field(default_factory=dict)
    sized: list[fx.Node] = field(default_factory=list)
    alternating: frozenset[str] = frozenset()
    """Producers whose rows of one unit are neighbours: gate and up in turn, not in two runs."""


Leaf = Callable[[fx.Node], "tuple[str, int] | None"]
"""The name of the producer that a node calls, and the width of its result; None of another node."""


def hidden_units(
    gm: fx.GraphModule, consumers: Iterable[fx.Node], leaf: Leaf, units: int
) -> Hidden:
    """What lies between some calls of one consumer, which reads so many units, and producers.

    Raises :class:`NotHidden` with the reason, in words that follow the consumer's name.
    """
    consumers = tuple(consumers)
    found = Hidden(units)
    search = _Search(gm, leaf, found)
    for call in consumers:
        source = input_of(call)
        parts = search.parts(source)
        if parts != 1:
            raise NotHidden(f"reads {parts} runs of {units} at once")
    search.check_users(set(consumers))
    found.alternating = search.alternating()
    return found


def input_of(call: fx.Node) -> fx.Node:
    """What a linear call multiplies."""
    source = linear_input(call)
    assert isinstance(source, fx.Node)
    return source


def name_of(node: fx.Node) -> str:
    """The operation of a node without its overload and the mark of writing in place."""
    if node.op == "call_method":
        name = str(node.target)
    else:
        name = getattr(node.target, "__name__", str(node.target)).partition(".")[0]
    plain = name.rstrip("_")
    return plain if not name.startswith("__") else name


class _Search:
    def __init__(self, gm: fx.GraphModule, leaf: Leaf, found: Hidden) -> None:
        self.gm = gm
        self.leaf = leaf
        self.found = found
        self.in_runs: list[fx.Node] = []
        self.in_turn: list[fx.Node] = []

    def parts(self, end: fx.Node) -> int:
        """The runs of a node, once those of everything before it are known."""
        known = self.found.parts
        stack = [end]
        while stack:
            node = stack[-1]
            if node in known:
                stack.pop()
                continue
            before = self._before(node)
            missing = [one for one in before if one not in known]
            if missing:
                stack += missing
                continue
            known[node] = self._own(node, before)
            stack.pop()
        return known[end]

    def _before(self, node: fx.Node) -> list[fx.Node]:
        """The nodes whose numbers a node makes its own of."""
        made = self.leaf(node)
        if made is not None:
            name, width = made
            if width % self.found.units:
                raise NotHidden(
                    f"reads what is computed from {name!r}, whose {width} rows are no "
                    f"multiple of its {self.found.units} inputs"
                )
            self.found.leaves[node] = name
            return []
        if node.op == "call_module":
            module = self.gm.get_submodule(str(node.target))
            if type(module) in _MODULES:
                return self._tensors(node)
        elif node.op in ("call_function", "call_method"):
            name = name_of(node)
            if name in _READ_DTYPE | _FIRST:
                return [_first(node)]
            if name in ELEMENTWISE or node.target is crossing:
                return self._tensors(node)
            if name in VIEWS | _CHUNKS | SPLITS | {"glu", "slice"} or self._is_item(node):
                return [_first(node)]
        raise NotHidden(
            "reads what is not computed element by element from matched linears alone: "
            f"{node.name!r} ({node.op}) comes before it"
        )

    def _tensors(self, node: fx.Node) -> list[fx.Node]:
        found = [one for one in node.all_input_nodes if not self._is_scalar(one)]
        if not found:
            raise NotHidden(f"reads a constant, {node.name!r}")
        return found

    def _is_scalar(self, node: fx.Node) -> bool:
        if node.target is getattr and node.args[1] in _OF_DTYPE:
            return True
        if node.op == "get_attr":
            value = attribute(self.gm, str(node.target))
            return isinstance(value, Tensor) and value.numel() == 1
        return False

    def _is_item(self, node: fx.Node) -> bool:
        return node.target is operator.getitem

    def _own(self, node: fx.Node, before: list[fx.Node]) -> int:
        units, known = self.found.units, self.found.parts
        if not before:
            made = self.leaf(node)
            assert made is not None
            return made[1] // units
        name = name_of(node) if node.op != "call_module" else ""
        have = known[before[0]]
        if _step_of(node) == have > 1:
            self.in_turn.append(before[0])
            return 1
        if name in VIEWS:
            self._check_view(node, have * units)
        elif name in _CHUNKS | SPLITS:
            self._check_pieces(node, have)
        elif name == "glu":
            if have % 2 or _given(node, 1, "dim", -1) != -1:
                raise _cut(node)
            self.in_runs.append(before[0])
            return have // 2
        elif self._is_item(node):
            return self._item(node, before[0], have)
        elif len({known[one] for one in before}) > 1:
            raise NotHidden(f"reads {node.name!r}, whose operands have different widths")
        elif name == "slice":
            raise _cut(node)
        return have

    def _check_view(self, node: fx.Node, width: int) -> None:
        last = last_size(node)
        if isinstance(last, int) and last == width:
            self.found.sized.append(node)
        elif not (isinstance(last, fx.Node) and self._is_last_size(last)):
            raise NotHidden(
                f"reads what {node.name!r} gives another shape, where the number of units cannot "
                "be told"
            )

    def _is_last_size(self, node: fx.Node) -> bool:
        """Whether a node is the number of units as a tensor between has it."""
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node):
            return False
        if name_of(node) in ("size", "sym_size"):
            return _given(node, 1, "dim", None) == -1 and source in self.found.parts
        return False

    def _check_pieces(self, node: fx.Node, have: int) -> None:
        if _given(node, 2, "dim", 0) != -1:
            raise _cut(node)
        self.in_runs.append(_first(node))
        sizes = _given(node, 1, "split_size_or_sections", _given(node, 1, "split_size", None))
        if name_of(node) in _CHUNKS:
            chunks = _given(node, 1, "chunks", None)
            if not isinstance(chunks, int) or have % chunks:
                raise _cut(node)
            return
        given = [sizes] if isinstance(sizes, int) else sizes
        if not isinstance(given, (list, tuple)) or not all(
            isinstance(size, int) and size % self.found.units == 0 for size in given
        ):
            raise _cut(node)
        self.found.sized.append(node)

    def _item(self, node: fx.Node, source: fx.Node, have: int) -> int:
        units = self.found.units
        at: Any = node.args[1]
        pieces = name_of(source) in _CHUNKS | SPLITS if source.op != "call_module" else False
        if pieces and isinstance(at, int):
            if name_of(source) in _CHUNKS:
                return have // int(_given(source, 1, "chunks", 1))
            sizes: Any = _given(
                source, 1, "split_size_or_sections", _given(source, 1, "split_size", None)
            )
            return int(sizes if isinstance(sizes, int) else sizes[at]) // units
        if isinstance(at, tuple) and len(at) == 2 and at[0] is Ellipsis and not pieces:
            taken = at[1]
            ends = (taken.start, taken.stop) if isinstance(taken, slice) else (1, 1)
            whole = isinstance(taken, slice) and taken.step in (None, 1)
            if whole and all(
                end is None or (isinstance(end, int) and end % units == 0) for end in ends
            ):
                self.found.sized.append(node)
                self.in_runs.append(source)
                start, stop, _ = slice(*ends).indices(have * units)
                return (stop - start) // units
        raise _cut(node)

    def alternating(self) -> frozenset[str]:
        """The producers whose rows are read in turn; raises where some are read in runs as well."""
        turns, runs = (self._computing(nodes) for nodes in (self.in_turn, self.in_runs))
        if turns & runs:
            name = min(turns & runs)
            raise NotHidden(f"reads rows of {name!r} in turn, and in runs of units as well")
        return turns

    def _computing(self, ends: list[fx.Node]) -> frozenset[str]:
        """The producers from which some nodes are computed."""
        seen, stack = set(ends), list(ends)
        while stack:
            new = [one for one in self._before(stack.pop()) if one not in seen]
            seen.update(new)
            stack += new
        return frozenset(name for node, name in self.found.leaves.items() if node in seen)

    def check_users(self, consumers: set[fx.Node]) -> None:
        """Raise where something else reads what is between."""
        inside = self.found.parts
        for node in inside:
            for user in node.users:
                if user in inside or user in consumers or reads_dtype(user, node):
                    continue
                if name_of(user) in ("size", "sym_size") or user.target is getattr:
                    if self._sizes_are_fine(user):
                        continue
                    raise NotHidden(f"reads what {user.name!r} takes the size of")
                raise NotHidden(f"reads what goes to {user.name!r} as well")

    def _sizes_are_fine(self, read: fx.Node) -> bool:
        """Whether a size that is read is not that of the units, or read for a view among them."""
        inside = self.found.parts
        if read.target is getattr:
            whole = read.args[1] == "shape"
            at = None
        else:
            at = _given(read, 1, "dim", None)
            whole = at is None
        if at == 0:
            return True
        if at == -1:
            return all(user in inside and last_size(user) is read for user in read.users)
        return whole and all(
            user.target is operator.getitem and (user.args[1] == 0 or _leaves_last(user.args[1]))
            for user in read.users
        )


def _step_of(node: fx.Node) -> int | None:
    """The step by which a node takes every so many numbers of the last dimension, from one of the
    first on to the end; None of another node."""
    taken: Any = None
    if node.target is operator.getitem:
        at: Any = node.args[1]
        if isinstance(at, tuple) and len(at) == 2 and at[0] is Ellipsis:
            taken = at[1]
    elif node.target is torch.ops.aten.slice.Tensor and len(node.args) == 5:
        dim, start, stop, step = node.args[1:]
        if dim == -1 or (isinstance(dim, int) and ndim_of(node) == dim + 1):
            taken = slice(start, None if stop == sys.maxsize else stop, step)
    if not isinstance(taken, slice) or taken.stop is not None or type(taken.step) is not int:
        return None
    first = taken.start or 0
    return taken.step if isinstance(first, int) and 0 <= first < taken.step else None


def _leaves_last(index: object) -> bool:
    return isinstance(index, slice) and index.stop == -1 and index.step in (None, 1)


def reads_dtype(user: fx.Node, of: fx.Node) -> bool:
    """Whether a node reads of another what does not change with its sizes."""
    if user.target is getattr:
        return user.args[1] in _OF_DTYPE
    if user.op not in ("call_method", "call_function"):
        return False
    name = name_of(user)
    if name in ("is_floating_point", "dim", "element_size"):
        return True
    return name in _READ_DTYPE and of in user.args[1:] and user.args[0] is not of


def _cut(node: fx.Node) -> NotHidden:
    return NotHidden(f"reads a part that {node.name!r} takes, which does not follow whole units")


def _first(node: fx.Node) -> fx.Node:
    first = node.args[0] if node.args else node.kwargs.get("input", node.kwargs.get("self"))
    if not isinstance(first, fx.Node):
        raise NotHidden(f"reads {node.name!r}, which is computed from no tensor")
    return first


def _given(node: fx.Node, at: int, name: str, default: Any) -> Any:
    return node.args[at] if len(node.args) > at else node.kwargs.get(name, default)


def last_size(view: fx.Node) -> object:
    """The last size that a view names: a number, a node, or None where it cannot be told."""
    if view.op == "call_module" or name_of(view) not in VIEWS:
        return None
    sizes: Any = view.args[1:] or (view.kwargs.get("size", view.kwargs.get("shape")),)
    if len(sizes) == 1 and isinstance(sizes[0], (list, tuple)):
        sizes = sizes[0]
    if not sizes:
        return None
    last = sizes[-1]
    # ``x.size()[:-1] + (n,)``
    if len(sizes) == 1 and isinstance(last, fx.Node) and last.target in (operator.add, torch.add):
        end = last.args[1]
        return end[-1] if isinstance(end, (tuple, list)) and len(end) else None
    return last if isinstance(last, (int, fx.Node)) else None


__all__ = [
    "SPLITS",
    "VIEWS",
    "Hidden",
    "Leaf",
    "NotHidden",
    "hidden_units",
    "input_of",
    "last_size",
    "name_of",
    "reads_dtype",
]
