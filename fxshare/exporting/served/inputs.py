"""Which linears of a served model read one input, and which of their bases become one."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import fx, nn

from passes.graph.graph import calls_by_target
from passes.graph.slices import Slice
from passes.graph.writes import Written

_OF_A_GATHER = (torch.add, operator.getitem, torch.split)
"""What stands between the product of a pivoted basis and its gather."""


@dataclass(frozen=True)
class Stack:
    """Bases that lie in one weight, one below the other, as ``name``; ``rows`` are each one's."""

    name: str
    rows: Mapping[str, tuple[int, int]]


def same_input(
    gm: nn.Module, places_of: Mapping[str, Sequence[Slice]]
) -> tuple[tuple[str, ...], ...]:
    """The linears that read one input, for each input of those that share bases, in the order of
    their calls; ``places_of`` says of each linear where its slices are.

    A linear is in none of them where the graph does not show what it reads: where there is no
    graph, where it is called several times, and where its input is written into.
    """
    if not isinstance(gm, fx.GraphModule):
        return ()
    calls = calls_by_target(gm, lambda module: isinstance(module, nn.Linear))
    written = Written()
    order = {node: at for at, node in enumerate(gm.graph.nodes)}
    readers: dict[fx.Node, list[tuple[int, str]]] = {}
    for name, places in places_of.items():
        nodes = [calls.get(place.module, []) for place in places]
        if any(len(each) != 1 or each[0] not in order for each in nodes):
            continue
        x, *others = {_input(each[0], place) for each, place in zip(nodes, places, strict=True)}
        if x is not None and not others and not written[x]:
            readers.setdefault(x, []).append((min(order[each[0]] for each in nodes), name))
    return tuple(tuple(name for _, name in sorted(found)) for found in readers.values())


def _input(call: fx.Node, place: Slice) -> fx.Node | None:
    """What the linear reads of which ``call`` makes rows."""
    node = call.args[0]
    if place.basis is not None and isinstance(node, fx.Node):
        while place.pivoted and node.target in _OF_A_GATHER:
            node = node.all_input_nodes[0]
        if node.target != (torch.index_select if place.pivoted else place.basis):
            return None
        node = node.args[0]
    return node if isinstance(node, fx.Node) else None


def stacks(
    together: Iterable[Sequence[str]],
    bases_of: Mapping[str, Sequence[str]],
    ranks: Mapping[str, int],
) -> tuple[Stack, ...]:
    """Bases that are read together wherever one of them is: ``together`` are the linears of each
    input, ``bases_of`` the bases of each linear that may lie in one weight, of these ``ranks``."""
    together = list(together)
    met: dict[str, list[int]] = {name: [] for name in ranks}
    for at, linears in enumerate(together):
        for basis in dict.fromkeys(b for linear in linears for b in bases_of.get(linear, ())):
            met[basis].append(at)
    known = {linear for linears in together for linear in linears}
    elsewhere = {b for linear, own in bases_of.items() if linear not in known for b in own}
    members: dict[tuple[int, ...], list[str]] = {}
    for basis, inputs in met.items():
        if inputs and basis not in elsewhere:
            members.setdefault(tuple(inputs), []).append(basis)
    return tuple(_stack(names, ranks) for names in members.values() if len(names) > 1)


def _stack(names: Sequence[str], ranks: Mapping[str, int]) -> Stack:
    joined = "_".join(names) if len(names) <= 4 else f"{names[0]}_to_{names[-1]}"
    ends = list(accumulate(ranks[name] for name in names))
    rows = {n: (end - ranks[n], end) for n, end in zip(names, ends, strict=True)}
    return Stack(joined, rows)
