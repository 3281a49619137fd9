"""Which weight types read one activation, and could share a basis within a layer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from fxshare.capture import Captured
from fxshare.proposing.weights import Weight
from passes import linear_calls

Groups = tuple[tuple[str, ...], ...]
# Of the projections inside one module these read the same input; the one that writes does not.
_TOGETHER = (
    {"q", "k", "v", "q_proj", "k_proj", "v_proj", "query", "key", "value", "wq", "wk", "wv"},
    {"gate_proj", "up_proj", "wi_0", "wi_1", "w1", "w3", "gate", "up"},
)


def seen_in_graph(captured: Captured, types: Mapping[str, Sequence[Weight]]) -> Groups:
    """Types whose weights have one node for an input, in the order of ``types``."""
    type_of = {w.name: (name, w.layer) for name, weights in types.items() for w in weights}
    readers: defaultdict[str, dict[str, set[int | None]]] = defaultdict(dict)
    for call in linear_calls(captured.graph):
        found = type_of.get(call.name)
        if found is not None:
            readers[call.input.name].setdefault(found[0], set()).add(found[1])
    groups: dict[tuple[str, ...], None] = {}
    for types_here in readers.values():
        in_order = tuple(name for name in types if name in types_here)
        if len(in_order) > 1:
            groups[in_order] = None
    disjoint: list[tuple[str, ...]] = []
    for group in sorted(groups, key=len, reverse=True):
        if not any(set(group) & set(other) for other in disjoint):
            disjoint.append(group)
    return tuple(sorted(disjoint, key=lambda group: list(types).index(group[0])))


def told_by_names(types: Mapping[str, Sequence[Weight]]) -> Groups:
    """The same without a graph: projections of one module, by what they are commonly called."""
    groups: defaultdict[tuple[object, ...], list[str]] = defaultdict(list)
    for name, weights in types.items():
        first = weights[0]
        owner, _, field = first.name.rpartition(".")
        for number, together in enumerate(_TOGETHER):
            if field in together:
                groups[owner, number, first.in_features].append(name)
    return tuple(tuple(names) for names in groups.values() if len(names) > 1)
