"""What a capture noted of a node's value: an untyped graph says nothing of dimensions and sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx

from passes.graph.graph import attribute

NOTED = frozenset({"ndim", "last", "shape"})
"""Keys of ``node.meta``: the number of dimensions, the last size, and all sizes of the example."""


def noted(shape: Sequence[int]) -> dict[str, Any]:
    """What is noted of a tensor."""
    return {"ndim": len(shape), "last": (0, *shape)[-1], "shape": tuple(shape)}


def shape_of(gm: fx.GraphModule, operand: Any) -> tuple[Any, ...] | None:
    """The sizes of an operand, as the example had those of batch and positions; none for a number,
    None where they cannot be told."""
    if not isinstance(operand, fx.Node):
        return ()
    value = operand.meta.get("val")
    if operand.op == "get_attr":
        value = attribute(gm, str(operand.target))
    if isinstance(value, Tensor):
        return tuple(value.shape)
    if isinstance(value, (int, float, bool)):
        return ()
    found = operand.meta.get("shape")
    return found if isinstance(found, tuple) else None


__all__ = ["NOTED", "noted", "shape_of"]
