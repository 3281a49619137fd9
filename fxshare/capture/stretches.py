"""Stretches of a graph that keep nothing for the backward pass: what is inside is computed again
when its gradient is (Chen et al. 2016, "Training deep nets with sublinear memory cost")."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from torch import fx, nn
from torch.utils.checkpoint import checkpoint

from fxshare.capture.steered import SteeredGraph
from passes.graph.graph import attribute


class GraphCopy:
    """Nodes of a graph, copied into another with what they read of the model."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self._gm = gm
        self._graph = fx.Graph()
        self._copied: dict[fx.Node, fx.Node] = {}
        self._owned: dict[str, Any] = {}

    def copy(self, node: fx.Node) -> None:
        """Copy a node; the tensors of the model that it reads before it."""
        for read in node.all_input_nodes:
            if read.op == "get_attr" and read not in self._copied:
                self.copy(read)
        if node.op in ("get_attr", "call_module"):
            self._owned[str(node.target)] = attribute(self._gm, str(node.target))
        self._copied[node] = self._graph.node_copy(node, self._copied.__getitem__)

    def take(self, node: fx.Node) -> None:
        """Let a value come from outside."""
        self._copied[node] = self._graph.placeholder(node.name)

    def give(self, nodes: Sequence[fx.Node]) -> None:
        """Let these be the output."""
        self._graph.output(tuple(self._copied[node] for node in nodes))

    def stretch(self, name: str, inside: Sequence[fx.Node]) -> None:
        """Call nodes as a module of their own."""
        own = set(inside)
        part = GraphCopy(self._gm)
        read = dict.fromkeys(one for node in inside for one in node.all_input_nodes)
        given = [node for node in read if node not in own and node.op != "get_attr"]
        for node in given:
            part.take(node)
        for node in inside:
            part.copy(node)
        gives = [node for node in inside if not own.issuperset(node.users)]
        part.give(gives)
        self._owned[name] = _Again(part.module())
        called = self._graph.call_module(name, tuple(self._copied[node] for node in given))
        for at, node in enumerate(gives):
            self._copied[node] = self._graph.call_function(operator.getitem, (called, at))

    def module(self) -> fx.GraphModule:
        """The copy as a module, which shares everything with the graph."""
        made = SteeredGraph(self._owned, self._graph)
        made.training = self._gm.training  # of what it calls each module has its own
        return made


class _Again(nn.Module):
    """A stretch whose inside is forgotten and computed again."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, *inputs: Any) -> Any:
        """What the stretch gives."""
        return checkpoint(self.inside, *inputs, use_reentrant=False)


__all__ = ["GraphCopy"]
