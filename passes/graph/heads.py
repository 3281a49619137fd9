"""Attention as what lies between the linear that computes values and the one that reads heads.

Values are moved about, and summed over positions with weights that are one number for the whole
width of a head. So any matrix over that width may be taken from the linear before to the linear
behind, and a head may be as narrow as one likes. Told by the graph alone, whatever names and
classes are: see ``moved`` for what may lie between.
"""

from __future__ import annotations

import operator
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import fx
from torch.utils._python_dispatch import _disable_current_modes

from passes.graph.hidden import input_of, name_of
from passes.graph.layouts import Layout, Rows, Unknown
from passes.graph.moved import ATTENTION, Leaf, Moved, given

_OF_DTYPE = frozenset({"dtype", "device", "ndim", "layout"})
_OTHER_OPERANDS = ("input", "query", "key", "attn_mask")
_READ_DTYPE = frozenset({"to", "type_as", "is_floating_point", "dim", "element_size", "_to_copy"})


class NotHeads(Exception):
    """Why what a linear reads are no heads of an attention."""


@dataclass(eq=False)
class Heads:
    """What one linear reads: ``heads`` of that ``width``, neighbours in groups that share one of
    the key-value heads of ``values``: the slice that computes it, and its first row there."""

    width: int
    heads: int
    values: tuple[tuple[str, int], ...]
    between: dict[fx.Node, Layout] = field(default_factory=dict)
    """Nodes that have values and nothing else."""
    taken: dict[fx.Node, tuple[str, ...]] = field(default_factory=dict)
    """Nodes that take slices from a product of several, values or not, and which they take."""
    products: dict[fx.Node, None] = field(default_factory=dict)
    """Nodes that have values beside other slices."""
    leaves: dict[fx.Node, tuple[str, ...]] = field(default_factory=dict)
    moved: Moved | None = None

    @property
    def kv_heads(self) -> int:
        """How many heads the values have."""
        return len(self.values)

    @property
    def slices(self) -> dict[str, int]:
        """The slices of the values, and how many heads each has."""
        found: dict[str, int] = {}
        for name, _ in self.values:
            found[name] = found.get(name, 0) + 1
        return found


def attention_heads(
    gm: fx.GraphModule, consumers: Iterable[fx.Node], leaf: Leaf, inputs: int
) -> Heads:
    """What lies between some calls of one linear with so many inputs, and values.

    Raises :class:`NotHeads` with the reason, in words that follow the linear's name.
    """
    with _disable_current_modes():  # numbers of rows are no part of what is traced
        return _attention_heads(gm, consumers, leaf, inputs)


def _attention_heads(
    gm: fx.GraphModule, consumers: Iterable[fx.Node], leaf: Leaf, inputs: int
) -> Heads:
    consumers = tuple(consumers)
    moved = Moved(gm, leaf, inputs)
    try:
        found: Heads | None = None
        for call in consumers:
            one = _heads(moved, moved.layout(input_of(call)))
            if found is not None and (one.width, one.values) != (found.width, found.values):
                raise Unknown("reads other heads at each of its calls")
            found = one
        assert found is not None
        found.moved = moved
        rows = _value_rows(moved, found)
        found.leaves = {
            n: names for n, names in moved.leaves.items() if set(names) & set(found.slices)
        }
        _trace(moved, found, rows, set(consumers))
    except Unknown as fault:
        raise NotHeads(str(fault)) from fault
    return found


def _heads(moved: Moved, end: Layout) -> Heads:
    if not moved.mixed:
        raise Unknown("reads what is computed by no attention")
    widths = set(moved.mixed.values())
    if not end.is_flat or len(widths) > 1:
        raise Unknown("reads no heads side by side")
    (width,) = widths
    if end.last != moved.inputs or moved.inputs % width:
        raise Unknown(f"reads {moved.inputs} inputs, of which {end.last} are told from heads")
    rows = end.rows.reshape(-1, width)
    first = rows[:, 0]
    if not (rows == first[:, None] + torch.arange(width, device="cpu")).all():
        raise Unknown("reads heads in whose width rows are in another order than in the values")
    own = list(dict.fromkeys(first.tolist()))
    heads, group = len(rows), len(rows) // len(own)
    if heads % len(own) or first.tolist() != [at for at in own for _ in range(group)]:
        raise Unknown("reads heads that share values otherwise than in groups of neighbours")
    return Heads(width, heads, tuple(_home(moved, at, width) for at in own))


def _home(moved: Moved, row: int, width: int) -> tuple[str, int]:
    for name, start in moved.starts.items():
        if start <= row < start + moved.sizes[name]:
            if row + width > start + moved.sizes[name] or (row - start) % width:
                break
            return name, row - start
    raise Unknown("reads heads that are parts of several slices; split the weight by part or head")


def _value_rows(moved: Moved, found: Heads) -> frozenset[int]:
    """All rows of the values' slices, which must be those of heads and no others."""
    rows: set[int] = set()
    for name, heads in found.slices.items():
        if moved.sizes[name] != heads * found.width:
            raise Unknown(
                f"reads a part of {name!r}, which has {moved.sizes[name]} rows; split the weight "
                "into queries, keys and values"
            )
        firsts = [at for slice_, at in found.values if slice_ == name]
        if any(low >= high for low, high in pairwise(firsts)):
            raise Unknown(f"reads the heads of {name!r} in another order than its rows have")
        rows |= set(range(moved.starts[name], moved.starts[name] + moved.sizes[name]))
    return frozenset(rows)


def reads_own(found: Heads, products: Mapping[fx.Node, fx.Node]) -> bool:
    """Whether the queries are computed from what the values are computed from; else this is
    attention to other tokens, whose keys and values are computed once and kept. ``products`` are
    all linears of the graph, and their inputs."""
    assert found.moved is not None
    sources = {products[node] for node in found.leaves}
    for node in found.moved.mixed:
        query = given(node, 0, "query" if name_of(node) == ATTENTION else "input")
        if isinstance(query, fx.Node) and not inputs_before(query, products) & sources:
            return False
    return True


def linears_before(node: fx.Node, known: Container[fx.Node]) -> list[fx.Node]:
    """The nodes among some that a node is computed from without another of them between."""
    seen: set[fx.Node] = set()
    found: list[fx.Node] = []
    stack = [node]
    while stack:
        one = stack.pop()
        if one in seen:
            continue
        seen.add(one)
        if one in known:
            found.append(one)
        else:
            stack += one.all_input_nodes
    return found


def inputs_before(query: fx.Node, products: Mapping[fx.Node, fx.Node]) -> set[fx.Node]:
    """The inputs of the linears that a node is computed from without another between."""
    return {products[node] for node in linears_before(query, products)}


def _trace(moved: Moved, found: Heads, rows: frozenset[int], consumers: set[fx.Node]) -> None:
    """Sort the nodes after the leaves: those that hold values alone, and those that take a slice
    out of a product of several. Raise where something else reads either."""
    stack = [node for node, layout in moved.layouts.items() if _is_mixture(layout, rows)]
    while stack:
        node = stack.pop()
        found.products[node] = None
        for user in node.users:
            if reads_dtype(user, node):
                continue
            if is_free_size(moved, user, node):
                if not moved.layout(node).is_flat and any(read.users for read in user.users):
                    raise Unknown(f"reads a product of several slices whose size {user.name!r} is")
                continue
            for part in parts_of(user):
                own = moved.layout(part)
                if not _is_mixture(own, rows):
                    found.taken[part] = in_order(moved, own)
                elif part not in found.products:
                    stack.append(part)
    for node, names in found.taken.items():
        if leading(moved.layout(node)) is None:
            raise Unknown(f"reads {names[0]!r}, taken out of a weight in a way that is not known")
    own_nodes = {n for n, layout in moved.layouts.items() if _has_only(layout, rows)}
    found.between = {node: moved.layouts[node] for node in own_nodes}
    for node in own_nodes:
        _check_users(moved, node, own_nodes | set(found.products), consumers)


def parts_of(user: fx.Node) -> list[fx.Node]:
    """A node, or what is taken from its result where that is several."""
    if name_of(user) in ("split", "split_with_sizes", "chunk", "unbind"):
        return list(user.users)
    return [user]


def _has_only(layout: Layout, rows: frozenset[int]) -> bool:
    return set(layout.rows.flatten().tolist()) <= rows


def _is_mixture(layout: Layout, rows: frozenset[int]) -> bool:
    own = set(layout.rows.flatten().tolist())
    return bool(own & rows) and not own <= rows


def in_order(moved: Moved, layout: Layout) -> tuple[str, ...]:
    """The slices, whole, that a node takes, in their order in it."""
    flat: Rows = layout.rows.flatten()
    names, at = [], 0
    by_start = {start: name for name, start in moved.starts.items()}
    while at < len(flat):
        name = by_start.get(int(flat[at]))
        size = 0 if name is None else moved.sizes[name]
        if name is None or not torch.equal(
            flat[at : at + size], flat[at] + torch.arange(size, device="cpu")
        ):
            raise Unknown("reads one of several parts of a weight that are no slices of it")
        names.append(name)
        at += size
    return tuple(names)


def leading(layout: Layout) -> bool | None:
    """Whether heads stand before positions in what takes a slice; None in another form."""
    labelled = [d is not None for d in layout.dims]
    if any(d is not None and d < 0 for d in layout.dims):
        return None
    if not layout.open and labelled == [False, True, False, True]:
        return True
    return False if labelled == sorted(labelled) else None


def reads_dtype(user: fx.Node, of: fx.Node) -> bool:
    """Whether a node reads a dtype or a number of dimensions, and none of a tensor's numbers."""
    if user.target is getattr:
        return user.args[1] in _OF_DTYPE
    if user.op not in ("call_method", "call_function"):
        return False
    name = name_of(user)
    if name in ("is_floating_point", "dim", "element_size"):
        return True
    if name == "_assert_tensor_metadata":
        return len(user.args) == 1 and "size" not in user.kwargs
    return name in _READ_DTYPE and of in user.args[1:] and user.args[0] is not of


def reads_size(user: fx.Node) -> bool:
    """Whether a node reads sizes, one or all."""
    return name_of(user) in ("size", "sym_size") or (
        user.target is getattr and user.args[1] == "shape"
    )


def is_free_size(moved: Moved, user: fx.Node, of: fx.Node) -> bool:
    """Whether a node reads sizes, and none that is one of rows."""
    if not reads_size(user):
        return False
    if user.target is not getattr and given(user, 1, "dim") is not None:
        return is_free(moved.layout(of), given(user, 1, "dim"))
    return all(
        read.target is operator.getitem and is_free(moved.layout(of), read.args[1], read)
        for read in user.users
    )


def is_free(layout: Layout, dim: object, read: fx.Node | None = None) -> bool:
    """Whether a dimension, or several in front, are of batch and positions."""
    if read is not None and not read.users:
        return True
    if isinstance(dim, slice):
        at = dim.stop
        is_front = isinstance(at, int) and at < 0 and dim.step in (None, 1)
        return is_front and all(d is None for d in layout.dims[:at])
    if not isinstance(dim, int):
        return False
    if dim < 0:
        return -dim > len(layout.dims) or layout.dims[dim] is None
    if layout.open:
        return dim == 0
    return dim < len(layout.dims) and layout.dims[dim] is None


def _check_users(moved: Moved, node: fx.Node, own: set[fx.Node], consumers: set[fx.Node]) -> None:
    layout = moved.layouts[node]
    for user in node.users:
        if user in moved.mixed and not _is_value_alone(user, node):
            raise Unknown(f"reads values that are queries or keys of {user.name!r} as well")
        if user in own or user in consumers or reads_dtype(user, node):
            continue
        if is_free_size(moved, user, node) or _is_size_of(layout, user, own):
            continue
        if name_of(user) == "update" and user.op == "call_method":
            items = [item for item in user.users if item.args[1:] == (1,)]
            if user.args[2] is node and all(item in own for item in items):
                continue
        raise Unknown(f"reads values that go to {user.name!r} as well")


def _is_value_alone(attention: fx.Node, node: fx.Node) -> bool:
    """Whether a node is the value of an attention, and nothing else of it."""
    given_there = [*attention.args, *attention.kwargs.values()]
    at = 2 if name_of(attention) == ATTENTION else 1
    others = list(attention.args[:at]) + [attention.kwargs.get(n) for n in _OTHER_OPERANDS]
    return sum(one is node for one in given_there) == 1 and node not in others


def _is_size_of(layout: Layout, user: fx.Node, own: set[fx.Node]) -> bool:
    """Whether sizes are read that stay, or by views of values alone: these follow the width."""
    if not reads_size(user):
        return False
    reads: list[tuple[object, fx.Node]] = []
    if user.target is not getattr and given(user, 1, "dim") is not None:
        reads.append((given(user, 1, "dim"), user))
    else:
        for read in user.users:
            if read in own:
                continue  # ``broadcast_to(x, y.size())``
            if read.target is not operator.getitem:
                return False
            reads.append((read.args[1], read))
    for dim, read in reads:
        stays = is_free(layout, dim, read) or (
            isinstance(dim, int)
            and not layout.open
            and dim % len(layout.dims) != len(layout.dims) - 1
        )
        if not stays and not all(reader in own for reader in read.users):
            return False
    return True


__all__ = [
    "Heads",
    "NotHeads",
    "attention_heads",
    "in_order",
    "inputs_before",
    "is_free",
    "is_free_size",
    "leading",
    "linears_before",
    "parts_of",
    "reads_dtype",
    "reads_own",
    "reads_size",
]
