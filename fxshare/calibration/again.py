"""What lies between matrix products, computed again in the backward pass.

An activation written out in torch's operations keeps every step for the backward pass: GPT-2's
GELU four tensors of the MLP's width where one is enough. Of a run of operations element by element
only what it reads is kept here, and the rest is computed again: the same numbers, for the time of a
few passes over memory.
"""

from __future__ import annotations

from torch import fx

from fxshare.capture.stretches import GraphCopy
from passes.graph.hidden import ELEMENTWISE, name_of
from passes.graph.modes import modes_of
from passes.graph.writes import is_in_place, is_written

_LEFT_OUT = frozenset({"dropout", "detach"})
_CURVED = frozenset(
    {
        *("abs", "celu", "cos", "div", "elu", "erf", "exp", "expm1", "gelu", "hardsigmoid"),
        *(
            "hardswish",
            "leaky_relu",
            "log1p",
            "log_sigmoid",
            "logsigmoid",
            "mish",
            "pow",
            "reciprocal",
        ),
        *(
            "relu",
            "relu6",
            "rsqrt",
            "selu",
            "sigmoid",
            "silu",
            "sin",
            "softplus",
            "softsign",
            "sqrt",
        ),
        *("square", "tanh", "true_divide", "truediv"),
    }
)
"""Of whose gradient a tensor is needed, and no sizes are computed with them."""


def elementwise_again(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of the graph, with the same modules, that keeps no steps of its activations.

    Before: ``x → pow → mul → add → tanh → add → mul → out``; after: ``x → stretch → out``.
    """
    stretches = {nodes[-1]: nodes for nodes in _stretches(gm.graph)}
    inside = {node for nodes in stretches.values() for node in nodes}
    top = GraphCopy(gm)
    for node in gm.graph.nodes:
        if node in stretches:
            top.stretch(f"again_{node.name}", stretches[node])
        elif node not in inside:
            top.copy(node)
    made = top.module()
    made.meta.update(gm.meta)
    return made


def _stretches(graph: fx.Graph) -> list[list[fx.Node]]:
    """Runs of nodes in their order, of which only the last is read by others."""
    modes = modes_of(graph)
    order = list(graph.nodes)
    able = {node for node in order if modes[node] is None and _is_elementwise(node)}
    taken: set[fx.Node] = set()
    found: list[list[fx.Node]] = []
    for at in range(len(order) - 1, -1, -1):
        if order[at] not in able or order[at] in taken:
            continue
        own = {order[at]}
        for node in reversed(order[:at]):
            if node in able and node.users and own.issuperset(node.users):
                own.add(node)
        taken |= own
        if len(own) > 1 and any(name_of(node) in _CURVED for node in own) and not _changes(own):
            found.append([node for node in order if node in own])
    return found


def _is_elementwise(node: fx.Node) -> bool:
    if node.op not in ("call_function", "call_method") or is_in_place(node):
        return False
    return name_of(node) in ELEMENTWISE - _LEFT_OUT


def _changes(own: set[fx.Node]) -> bool:
    """Whether something is written into what the nodes read: computed again they would differ."""
    read = {one for node in own for one in node.all_input_nodes}
    return any(is_written(node) for node in (*own, *read))


__all__ = ["elementwise_again"]
