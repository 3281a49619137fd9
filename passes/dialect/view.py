"""What rules look at in a graph, each thing with words that name it and its node.

Legend for shapes: I input features, O output features, R rank, T inputs that a pivoted basis
did not keep.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn

from passes.graph.graph import attribute, is_linear, weight_and_bias
from passes.graph.modes import is_steered, modes_of
from passes.graph.origins import origins
from passes.graph.slices import Slice, slices
from passes.packing.group_coefficients import EQUATION
from passes.sharing.pivot_basis import gathers

T = TypeVar("T")
Subject = tuple[str, str, str | None]
"""What kind of thing it is, its name, and the module or tensor whose reader is its node; None where
it is a node itself."""
Named = Iterator[tuple[Subject, T]]
"""Things, each after what names it."""


class View:
    """A graph, its records, and who reads what: found once for all rules."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self.nodes = list(gm.graph.nodes)
        self.slices = slices(gm)
        self.gathers = gathers(gm)
        self.origins = origins(gm)

    @cached_property
    def readers(self) -> dict[str, list[fx.Node]]:
        """The nodes that call a module or read one of its tensors, by the module's name."""
        found: dict[str, list[fx.Node]] = {}
        for node in self.nodes:
            if node.op == "call_module":
                found.setdefault(str(node.target), []).append(node)
            elif node.op == "get_attr":
                found.setdefault(str(node.target).rpartition(".")[0], []).append(node)
        return found

    @cached_property
    def owners(self) -> dict[str, list[tuple[str, Slice]]]:
        """The slices of every linear that has some."""
        found: dict[str, list[tuple[str, Slice]]] = {}
        for name, place in self.slices.items():
            found.setdefault(place.module, []).append((name, place))
        return found

    @cached_property
    def bases(self) -> dict[str, dict[str, set[tuple[int, int] | None]]]:
        """The coefficients of every basis, and which of the basis' rows they read."""
        found: dict[str, dict[str, set[tuple[int, int] | None]]] = {}
        for place in self.slices.values():
            if place.basis is not None:
                rows = found.setdefault(place.basis, {}).setdefault(place.module, set())
                rows.add(place.basis_rows)
        return found

    @cached_property
    def units(self) -> dict[str, tuple[int, tuple[int, ...]]]:
        """How many hidden units there were, and which are there, by the name of their selection."""
        found: dict[str, tuple[int, tuple[int, ...]]] = {}
        for place in self.slices.values():
            for units in (place.unit_rows, place.unit_columns):
                if units is not None:
                    found.setdefault(units.name, (units.of, units.kept))
        return found

    @cached_property
    def empty(self) -> frozenset[str]:
        """The slices without rows, because all their heads went."""
        places = self.slices.items()
        return frozenset(n for n, x in places if x.unit_rows is not None and not x.unit_rows.size)

    @cached_property
    def places(self) -> dict[tuple[str, int, int], set[tuple[str, int, int]]]:
        """The places of linears that are stored several times, and the others of each."""
        found: dict[tuple[str, int, int], set[tuple[str, int, int]]] = {}
        for origin in self.origins.values():
            held = {(origin.module, origin.start, origin.stop), *origin.copies}
            for place in held if origin.copies else ():
                found.setdefault(place, set()).update(held)
        return found

    @cached_property
    def pivoted(self) -> frozenset[str]:
        """The bases that are stored as kept inputs and a table."""
        return frozenset(p.basis for p in self.slices.values() if p.basis and p.pivoted)

    @cached_property
    def modes(self) -> dict[fx.Node, Any]:
        """The modes that each node is computed in."""
        return modes_of(self.gm.graph)

    @cached_property
    def parameters(self) -> dict[int, list[str]]:
        """The names of every parameter, by its identity."""
        found: dict[int, list[str]] = {}
        for name, parameter in self.gm.named_parameters(remove_duplicate=False):
            found.setdefault(id(parameter), []).append(name)
        return found

    @cached_property
    def cut(self) -> dict[str, list[str]]:
        """The linears that are all the rows of one weight, in its order, by the name of each.

        Told by their memory, so that slices which were loaded apart are not among them.
        """
        by_memory: dict[tuple[object, ...], list[tuple[int, str, int]]] = {}
        for name in self.owners:
            weight_OI = self.weight(name)
            # rows that a model reads by themselves are not put together again
            if weight_OI is not None and ".rows_" not in name:
                storage = weight_OI.untyped_storage()
                key = (storage._cdata, storage.nbytes(), weight_OI.shape[1], weight_OI.stride())
                held = (int(weight_OI.storage_offset()), name, weight_OI.nbytes)
                by_memory.setdefault(key, []).append(held)
        found: dict[str, list[str]] = {}
        for (_, whole, *_), parts in by_memory.items():
            if len(parts) > 1 and sum(size for _, _, size in parts) == whole:
                names = [name for _, name, _ in sorted(parts)]
                found |= dict.fromkeys(names, names)
        return found

    def module(self, name: str) -> nn.Module | None:
        """The module of that name; None where there is none."""
        at: Any = self.gm
        for part in name.split("."):
            at = at._modules.get(part)
            if not isinstance(at, nn.Module):
                return None
        found: nn.Module = at
        return found

    def weight(self, name: str) -> Tensor | None:
        """The weight ``(O, I)`` that the module of that name holds or borrows; None for none."""
        module = self.module(name)
        weight = getattr(module, "weight", None)
        if module is None or not isinstance(weight, Tensor) or weight.ndim != 2:
            return None
        return weight_and_bias(module)[0]

    def width(self, node: object) -> int | None:
        """The size of a node's last dimension, where our passes' own nodes say it."""
        if not isinstance(node, fx.Node):
            return None
        if node.op == "call_module":
            module = self.module(str(node.target))
            return module.out_features if isinstance(module, nn.Linear) else None
        if node.target is torch.narrow and node.args[1] == -1:
            length = node.args[3]
            return length if isinstance(length, int) else None
        if node.target is operator.getitem:
            sizes, at = sizes_of(node.args[0]), node.args[1]
            if sizes is None or not isinstance(at, int) or at >= len(sizes):
                return None
            return sizes[at]
        if node.target is torch.index_select and node.args[1:2] == (-1,) and len(node.args) == 3:
            index = node.args[2]
            if isinstance(index, fx.Node) and index.op == "get_attr":
                stored = attribute(self.gm, str(index.target))
                return len(stored) if isinstance(stored, Tensor) and stored.ndim == 1 else None
        return None

    def words(self, subject: Subject) -> str:
        """Words for a thing and its node."""
        kind, name, read = subject
        if read is None:
            return f"{kind} {name!r}"
        found = self.readers.get(read) or [n for n in self.nodes if n.target == read]
        return f"{kind} {name!r} ({f'node {found[0].name!r}' if found else 'no node'})"


def sizes_of(node: object) -> list[int] | None:
    """The sizes of the pieces that ``torch.split`` makes of the last dimension, as our passes write
    it; None of another node."""
    if not isinstance(node, fx.Node) or node.target is not torch.split:
        return None
    sizes = node.args[1] if len(node.args) == 2 and node.kwargs == {"dim": -1} else None
    if not isinstance(sizes, (list, tuple)):
        return None
    known = [size for size in sizes if isinstance(size, int)]
    return known if len(known) == len(sizes) else None


def nodes(view: View) -> Named[fx.Node]:
    """Every node."""
    for node in view.nodes:
        yield ("node", node.name, None), node


def linear_calls(view: View) -> Named[tuple[fx.Node, nn.Module]]:
    """Every node that calls a linear module."""
    for node in view.nodes:
        module = view.module(str(node.target)) if node.op == "call_module" else None
        if module is not None and (type(module) is nn.Linear or is_linear(module)):
            yield ("node", node.name, None), (node, module)


def crossed(view: View) -> Named[tuple[fx.Node, fx.Node]]:
    """Every node that calls a linear module in a graph that sets modes, and what it reads."""
    if not is_steered(view.gm.graph):
        return
    for words, (node, _) in linear_calls(view):
        for source in node.all_input_nodes:
            yield words, (node, source)


def ends(view: View) -> Named[fx.Node]:
    """The output of a graph that sets modes."""
    if is_steered(view.gm.graph):
        yield from ((words, node) for words, node in nodes(view) if node.op == "output")


def records(view: View) -> Named[str]:
    """Everything that a pass wrote down, and what it is."""
    for name, place in view.slices.items():
        yield ("slice", name, place.module), "a slice"
    for name in view.gathers:
        yield ("gather", name, name), "a gather"
    for name, origin in view.origins.items():
        yield ("origin", name, origin.module), "an origin"


def each_slice(view: View) -> Named[tuple[str, Slice]]:
    """Every slice, by its name."""
    for name, place in view.slices.items():
        yield ("slice", name, place.module), (name, place)


def owners(view: View) -> Named[str]:
    """Every linear that holds slices."""
    for module in view.owners:
        yield ("linear", module, module), module


def cats(view: View) -> Named[list[fx.Node]]:
    """The parts of every ``cat`` over the last dimension."""
    for node in view.nodes:
        if node.target is torch.cat and node.kwargs == {"dim": -1}:
            parts = node.args[0]
            if isinstance(parts, (list, tuple)):
                yield ("node", node.name, None), [p for p in parts if isinstance(p, fx.Node)]


def bases(view: View) -> Named[str]:
    """Every basis."""
    for basis in view.bases:
        yield ("basis", basis, basis), basis


def basis_readers(view: View) -> Named[tuple[str, fx.Node, tuple[int, int]]]:
    """The nodes that read the product of a basis, and which of its rows they read."""
    for basis in view.bases:
        weight_RT = view.weight(basis)
        for node in view.readers.get(basis, []):
            if weight_RT is None or node.op != "call_module":
                continue
            for product in list(node.users) if basis in view.pivoted else [node]:
                for reader, rows in _rows_read(product, 0, len(weight_RT)):
                    yield ("node", reader.name, None), (basis, reader, rows)


def _rows_read(node: fx.Node, start: int, stop: int) -> Iterator[tuple[fx.Node, tuple[int, int]]]:
    for user in node.users:
        sizes = sizes_of(user)
        if sizes is not None:
            for piece in user.users:
                number = piece.args[1]
                if piece.target is operator.getitem and isinstance(number, int):
                    first = start + sum(sizes[:number])
                    yield from _rows_read(piece, first, first + sum(sizes[number : number + 1]))
                else:
                    yield piece, (start, stop)
        elif user.target is torch.narrow:
            _, _, at, length = user.args
            assert isinstance(at, int)
            assert isinstance(length, int)
            yield from _rows_read(user, start + at, start + at + length)
        else:
            yield user, (start, stop)


def basis_reads(view: View) -> Named[tuple[str, fx.Node]]:
    """The nodes that read the weight of a basis and do not call it, as lookups do."""
    for basis in view.bases:
        for node in view.readers.get(basis, []):
            for user in node.users if node.op == "get_attr" else ():
                yield ("node", user.name, None), (basis, user)


def pivoted_calls(view: View) -> Named[tuple[str, fx.Node]]:
    """Every call of a basis that is stored as kept inputs and a table."""
    for basis in view.bases:
        for node in view.readers.get(basis, []) if basis in view.pivoted else ():
            if node.op == "call_module":
                yield ("node", node.name, None), (basis, node)


def each_gather(view: View) -> Named[str]:
    """Every gather, by the name of its index."""
    for name in view.gathers:
        yield ("gather", name, name), name


def parts(view: View) -> Named[fx.Node]:
    """Every node that takes pieces or a part of the last dimension."""
    for node in view.nodes:
        if sizes_of(node) is not None or (node.target is torch.narrow and len(node.args) == 4):
            yield ("node", node.name, None), node


def batched(view: View) -> Named[tuple[fx.Node, fx.Node, fx.Node]]:
    """Every batched product of coefficients: the views of what it reads and of its weight, and the
    node that reads the weight."""
    for node in view.nodes:
        if node.target is not torch.einsum or node.args[:1] != (EQUATION,):
            continue
        _, z_nR, weight_nOR = node.args
        if isinstance(z_nR, fx.Node) and isinstance(weight_nOR, fx.Node):
            stored = weight_nOR.args[0] if weight_nOR.args else None
            if isinstance(stored, fx.Node) and stored.op == "get_attr":
                yield ("node", node.name, None), (z_nR, weight_nOR, stored)


def packed(view: View) -> Named[str]:
    """Every linear that holds what several were.

    Where no stack has an origin, or no batched weight, ``forget_origins`` came after them.
    """
    known = {origin.module for origin in view.origins.values()}
    stacks = {place.basis for place in view.slices.values() if place.basis and place.basis_rows}
    weights = {str(stored.target).rpartition(".")[0] for _, (_, _, stored) in batched(view)}
    for some in (stacks, weights):
        known |= some if some & known else set()
    for name in sorted(known):
        yield ("packed linear", name, name), name


def each_origin(view: View) -> Named[str]:
    """Every linear that was repacked, by the name that it had."""
    for name, origin in view.origins.items():
        yield ("origin", name, origin.module), name
