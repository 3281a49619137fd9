"""Pickling a compiled graph module, for processes that hand one to another.

fx pickles a graph module as its code and traces that again, which a graph that works on sizes and
holds guards does not survive. Here the nodes themselves are the state. To keep a model use
:func:`fxshare.save`: unpickling executes what a file says.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx, nn
from torch.fx.node import map_aggregate

from passes import derive_gathers


@dataclass(frozen=True)
class _Ref:
    """The node with that number."""

    number: int


def reduced(gm: fx.GraphModule) -> tuple[Any, ...]:
    """What ``__reduce__`` of a graph module returns."""
    number = {node: _Ref(at) for at, node in enumerate(gm.graph.nodes)}

    def refer(leaf: Any) -> Any:
        return number[leaf] if isinstance(leaf, fx.Node) else leaf

    nodes = [
        (n.op, n.target, map_aggregate(n.args, refer), map_aggregate(n.kwargs, refer), n.name)
        for n in gm.graph.nodes
    ]
    state = {key: value for key, value in gm.__dict__.items() if key != "_graph"}
    return _restored, (type(gm).__mro__[1], type(gm).__name__, state, nodes)


def _restored(
    kind: type[fx.GraphModule], name: str, state: dict[str, Any], nodes: list[Any]
) -> fx.GraphModule:
    graph = fx.Graph()
    made: list[fx.Node] = []

    def resolve(leaf: Any) -> Any:
        return made[leaf.number] if isinstance(leaf, _Ref) else leaf

    for op, target, args, kwargs, node_name in nodes:
        given = map_aggregate(args, resolve), map_aggregate(kwargs, resolve)
        made.append(graph.create_node(op, target, *given, name=node_name))
    root = nn.Module()
    root.__dict__.update(state)
    gm = kind(root, graph, name)
    gm.meta.update(state["meta"])
    gm.training = state["training"]
    derive_gathers(gm)
    return gm
