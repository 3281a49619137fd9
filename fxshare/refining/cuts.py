"""Blocks of a graph: where they begin and end, what they train, and each as a module of its own.

A cut lies between the last factor of one layer and the first of the next, where the fewest values
that depend on factors cross it: in a transformer the one of the residual stream. What depends on no
factor (embeddings, masks, rotary frequencies) is computed in each block again. Layers that share a
basis are one block.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import Tensor, fx, nn

from fxshare.capture.steered import SteeredGraph
from fxshare.errors import RefineError
from fxshare.refining.dense_graph import Product, products_of
from fxshare.refining.parameters import Trainable
from fxshare.result.module import record_of
from fxshare.result.products import slices_of
from passes.graph.graph import attribute
from passes.graph.writes import is_in_place, sharing_memory

STUDENT, TEACHER = "student", "teacher"


@dataclass(frozen=True)
class Block:
    """The nodes from place ``start`` up to ``stop``; ``inputs`` and ``outputs`` are names of nodes
    before ``start`` and before ``stop`` that depend on factors."""

    layers: tuple[int, ...]
    start: int
    stop: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    trainable: Trainable

    def __str__(self) -> str:
        first, last = self.layers[0], self.layers[-1]
        return f"layer {first}" if first == last else f"layers {first} to {last}"


@dataclass(frozen=True)
class Cuts:
    """The blocks of a graph in its order, and the nodes that depend on factors."""

    blocks: tuple[Block, ...]
    dependent: frozenset[str]


@dataclass(frozen=True)
class _Run:
    """Consecutive products of one layer: places of their first node and after their last one."""

    layers: tuple[int, ...]
    first: int
    after: int


@dataclass(frozen=True)
class _Crossing:
    """Which values cross a place: they depend on factors, stand before it and are read after it."""

    nodes: tuple[fx.Node, ...]
    until: tuple[int, ...]
    """The last place that reads each; 0 for what never crosses."""

    def at(self, place: int) -> tuple[str, ...]:
        """Their names."""
        both = zip(self.nodes[:place], self.until, strict=False)
        return tuple(node.name for node, until in both if until >= place)

    def fewest(self, first: int, last: int) -> int:
        """The first of the places from ``first`` to ``last`` that the fewest values cross, and at
        least one."""
        counts = {at: sum(one >= at for one in self.until[:at]) for at in range(first, last + 1)}
        return min(counts, key=lambda at: (counts[at] or len(self.nodes), at))


def cuts_of(gm: nn.Module, trainable: Trainable) -> Cuts:
    """Where a compiled graph is cut.

    Raises :class:`RefineError` for what is no graph, or where no layer of a factor is known.
    """
    seen = _seen(gm, trainable)
    read, crossing, runs, bounds = seen.read, seen.crossing, seen.runs, seen.bounds
    factors = {name for group in trainable.groups for name in (group.basis, *group.coefficients)}
    factors.update(trainable.units)
    parts = _joined([set().union(*read[start:stop]) & factors for start, stop in pairwise(bounds)])
    stretches = [(bounds[first], bounds[last + 1]) for first, last in parts]
    owners: dict[str, set[int]] = {}
    for number, (start, stop) in enumerate(stretches):
        for name in set().union(*read[start:stop]):
            owners.setdefault(name, set()).add(number)
    blocks = tuple(
        Block(
            tuple(sorted({x for r in runs if start <= r.first < stop for x in r.layers})),
            start,
            stop,
            crossing.at(start),
            crossing.at(stop),
            _part(trainable, {name for name, numbers in owners.items() if numbers == {number}}),
        )
        for number, (start, stop) in enumerate(stretches)
    )
    return Cuts(blocks, frozenset(node.name for node in seen.dependent))


def bounds_of(gm: nn.Module, trainable: Trainable) -> list[int]:
    """The places at which a compiled graph is cut between layers, from 0 to the one after the last
    layer, whoever shares a basis.

    Raises as :func:`cuts_of`.
    """
    return _seen(gm, trainable).bounds


@dataclass(frozen=True)
class _Seen:
    """What a graph's nodes read, which of them depend on factors, and where it is cut."""

    read: list[set[str]]
    dependent: set[fx.Node]
    crossing: _Crossing
    runs: list[_Run]
    bounds: list[int]


def _seen(gm: nn.Module, trainable: Trainable) -> _Seen:
    products = products_of(gm)
    assert isinstance(gm, fx.GraphModule)
    nodes = list(gm.graph.nodes)
    place = {node: at for at, node in enumerate(nodes)}
    names = {id(parameter): name for name, parameter in gm.named_parameters()}
    read = [_read(gm, node, names) & set(trainable.names) for node in nodes]
    dependent = _dependent(nodes, read, {product.call for product in products})
    crossing = _Crossing(
        tuple(nodes),
        tuple(
            max((place[user] for user in node.users), default=0)
            if node in dependent and node.op != "get_attr"
            else 0
            for node in nodes
        ),
    )
    runs, end = _runs(gm, products, place)
    latest = [*(run.first for run in runs[1:]), end]
    bounds = [0, *(crossing.fewest(run.after, at) for run, at in zip(runs, latest, strict=True))]
    return _Seen(read, dependent, crossing, runs, bounds)


def _part(trainable: Trainable, names: set[str]) -> Trainable:
    return Trainable(
        tuple(g for g in trainable.groups if {g.basis, *g.coefficients} <= names),
        tuple(name for name in trainable.others if name in names),
        tuple(name for name in trainable.units if name in names),
    )


def _runs(
    gm: fx.GraphModule, products: list[Product], place: Mapping[fx.Node, int]
) -> tuple[list[_Run], int]:
    """The runs, and where what is in no layer begins after them."""
    layers = {s.name: site.layer for site in record_of(gm).plan.sites for s in site.slices}
    layer_of = {one.module: layers[name] for name, one in slices_of(gm).items()}
    found: list[_Run] = []
    output = end = len(place) - 1
    for product in products:
        layer = layer_of[str(product.call.target)]
        first = min(place[node] for node in product.nodes)
        if layer is None:
            end = min(end, first) if found else end
            continue
        end, run = output, _Run((layer,), first, place[product.call] + 1)
        # nodes of one lie among those of another where they read one gather
        while found and (found[-1].layers == (layer,) or run.first < found[-1].after):
            last = found.pop()
            run = _Run(
                (*last.layers, *(one for one in run.layers if one not in last.layers)),
                min(last.first, run.first),
                max(last.after, run.after),
            )
        found.append(run)
    if not found:
        raise RefineError(
            "no factor is in a layer whose number is known, so that there is no place to cut at; "
            "give block_pattern in the configuration, or refine without objective='blocks' and "
            "recompute"
        )
    return found, end


def _read(gm: fx.GraphModule, node: fx.Node, names: Mapping[int, str]) -> set[str]:
    """The parameters that a node reads itself."""
    if node.op not in ("call_module", "get_attr"):
        return set()
    found = attribute(gm, str(node.target))
    tensors: Iterable[Any] = found.parameters() if isinstance(found, nn.Module) else [found]
    return {names[id(tensor)] for tensor in tensors if id(tensor) in names}


def _dependent(nodes: list[fx.Node], read: list[set[str]], products: set[fx.Node]) -> set[fx.Node]:
    """Products, what reads anything that is trained, and what depends on either."""
    found: set[fx.Node] = set()
    for node, own in zip(nodes, read, strict=True):
        if own or node in products or any(one in found for one in node.all_input_nodes):
            found.add(node)
    return found


def _joined(factors: list[set[str]]) -> list[tuple[int, int]]:
    """First and last of the stretches that make a block: those that have a factor in common, and
    what is between them. ``factors`` are those that each stretch reads."""
    last = {name: number for number, names in enumerate(factors) for name in names}
    found: list[tuple[int, int]] = []
    begun = until = 0
    for number, names in enumerate(factors):
        if number > until:
            begun = number
        until = max([until, number, *(last[name] for name in names)])
        if number == until:
            found.append((begun, number))
    return found


def part_of(gm: fx.GraphModule, cuts: Cuts, block: Block, whose: str) -> nn.Module:
    """The block of a graph as a module, which shares everything with it. Beside the call's own
    arguments it takes ``student_NAME`` and ``teacher_NAME`` for every input, and reads ``whose``;
    what it returns are the outputs.

    Raises :class:`RefineError` where it writes into one input that is a view of another.
    """
    nodes = list(gm.graph.nodes)
    by_name = {node.name: node for node in nodes}
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    given = [node for node in nodes if node.op == "placeholder"]
    starred = [node for node in given if str(node.target).startswith("*")]
    for node in given:
        if node not in starred:
            copied[node] = graph.node_copy(node)
    for name in block.inputs:
        for one in (STUDENT, TEACHER):
            made = graph.placeholder(f"{one}_{name}", default_value=None)
            if one == whose:
                copied[by_name[name]] = made
    for node in starred:
        copied[node] = graph.node_copy(node)
    for name in _written(nodes, block):  # the input is kept, and read again
        copied[by_name[name]] = graph.call_method("clone", (copied[by_name[name]],))
    needed = _needed(nodes, block, set(copied), cuts.dependent)
    for node in nodes[: block.stop]:
        if node in needed and node not in copied:
            copied[node] = graph.node_copy(node, copied.__getitem__)
    graph.output(tuple(copied[by_name[name]] for name in block.outputs))
    return SteeredGraph(gm, graph)


def _written(nodes: list[fx.Node], block: Block) -> list[str]:
    """The inputs that the block writes into."""
    inside = set(nodes[block.start : block.stop])
    found = []
    for node in nodes[: block.start]:
        if node.name not in block.inputs:
            continue
        same = set(sharing_memory(node))
        if not any(is_in_place(user) and user in inside for one in same for user in one.users):
            continue
        if any(one.name in block.inputs for one in same - {node}):
            raise RefineError(
                f"objective='blocks': {block} writes into {node.name!r}, of which it reads a view "
                "as well; take objective='kl' or 'hidden'"
            )
        found.append(node.name)
    return found


def _needed(
    nodes: list[fx.Node], block: Block, known: set[fx.Node], dependent: frozenset[str]
) -> set[fx.Node]:
    """What the outputs are computed from, back to what is known, and what has effects: checks,
    modes and writes."""
    wanted = [node for node in nodes[: block.stop] if node.name in block.outputs]
    for at, node in enumerate(nodes[: block.stop]):
        has_effect = node.is_impure() or is_in_place(node)
        if has_effect and (at >= block.start or node.name not in dependent):
            wanted.append(node)
    found: set[fx.Node] = set()
    while wanted:
        node = wanted.pop()
        if node not in found and node not in known:
            found.add(node)
            wanted += node.all_input_nodes
    return found


def as_items(values: Mapping[str, Any], whose: str) -> dict[str, Any]:
    """Outputs of one block as inputs of the next, on the CPU."""
    return {
        f"{whose}_{name}": value.detach().cpu() if isinstance(value, Tensor) else value
        for name, value in values.items()
    }


__all__ = ["STUDENT", "TEACHER", "Block", "Cuts", "as_items", "bounds_of", "cuts_of", "part_of"]
