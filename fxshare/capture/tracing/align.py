"""Compare two traces of one model node by node, and merge what only train/eval changes."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

from torch import fx, nn
from torch.fx.node import map_aggregate


class TrainingSwitch(nn.Module):
    """A constant that follows ``module.training``, such as the ``dropout_p`` of attention.

    Tracing bakes ``p if self.training else 0.0``; the switch, a submodule of the graph module,
    gives it back.
    """

    def __init__(self, train_value: Any, eval_value: Any) -> None:
        super().__init__()
        self.train_value = train_value
        self.eval_value = eval_value

    def forward(self) -> Any:
        """The value of the current mode."""
        return self.train_value if self.training else self.eval_value

    def extra_repr(self) -> str:
        return f"train={self.train_value}, eval={self.eval_value}"


@dataclass(frozen=True)
class Difference:
    """A constant argument in which two traces of the same structure differ."""

    node: fx.Node
    at: int
    left: Any
    right: Any

    def __str__(self) -> str:
        return f"{self.node.format_node()}: {self.left!r} in one trace, {self.right!r} in the other"


class StructureDiffers(Exception):
    """Two traces are not the same sequence of operations; internal to capture."""


def _leaves(node: fx.Node) -> list[Any]:
    found: list[Any] = []

    def collect(leaf: Any) -> Any:
        found.append(leaf)
        return leaf

    map_aggregate((node.args, node.kwargs), collect)
    return found


def differences(left: fx.Graph, right: fx.Graph) -> list[Difference]:
    """The constants in which two traces differ.

    Raises :class:`StructureDiffers` naming the first node where the operations themselves differ.
    """
    twin: dict[fx.Node, fx.Node] = {}
    found = []
    if len(left.nodes) != len(right.nodes):
        raise StructureDiffers(f"{len(left.nodes)} operations and {len(right.nodes)}")
    for a, b in zip(left.nodes, right.nodes, strict=True):
        twin[a] = b
        leaves_a, leaves_b = _leaves(a), _leaves(b)
        if (a.op, a.target) != (b.op, b.target) or len(leaves_a) != len(leaves_b):
            raise StructureDiffers(f"{a.format_node()} and {b.format_node()}")
        for at, (x, y) in enumerate(zip(leaves_a, leaves_b, strict=True)):
            if isinstance(x, fx.Node) or isinstance(y, fx.Node):
                if not isinstance(x, fx.Node) or twin.get(x) is not y:
                    raise StructureDiffers(f"{a.format_node()} reads another value")
            elif type(x) is not type(y) or x != y:
                found.append(Difference(a, at, x, y))
    return found


def check_switches(found: list[Difference]) -> None:
    """Raise :class:`StructureDiffers` for a constant that no switch can give: one that is no
    number."""
    for difference in found:
        if not all(isinstance(v, (bool, int, float)) for v in (difference.left, difference.right)):
            raise StructureDiffers(str(difference))


def insert_training_switches(root: nn.Module, eval_graph: fx.Graph, found: list[Difference]) -> int:
    """Replace each constant that differs between the eval trace and the training trace by a
    :class:`TrainingSwitch` of ``root``; returns how many were put in."""
    for number, difference in enumerate(found):
        name = f"training_switch_{number}"
        root.add_module(name, TrainingSwitch(difference.right, difference.left))
        with eval_graph.inserting_before(difference.node):
            value = eval_graph.call_module(name)
        replace_constant(difference, value)
    return len(found)


def replace_constant(difference: Difference, value: fx.Node) -> None:
    """Let the node read ``value`` where it has the constant."""
    node, counter = difference.node, itertools.count()

    def swap(leaf: Any) -> Any:
        return value if next(counter) == difference.at else leaf

    node.args, node.kwargs = map_aggregate((node.args, node.kwargs), swap)
