"""What a traced model writes into: items of tensors, and tensors in place.

``y[..., :8] = x`` and ``z += x`` on a view change what other values see, so both are nodes, in the
order in which the model did them. ``h += x`` on a tensor that nothing else reads is the same as
``h + x``, and becomes that: passes keep away from what is written into.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

from torch import fx, nn

from fxshare.capture.tracing.values import changes_in_place
from passes.graph.writes import AUGMENTED, sharing_memory

PLAIN = "plain"
"""In a node's meta: the operator that gives the same numbers, sizes and dtype in a new tensor."""
_METHODS = {f"__{op.__name__}__": op for op in (*AUGMENTED, operator.setitem)} | {
    "__idiv__": operator.itruediv
}


def as_operator(kind: str, target: Any) -> tuple[str, Any]:
    """``Tensor.__setitem__`` and the like, which torch calls where a constant is written into, as
    the operators that they are."""
    if kind == "call_method" and target in _METHODS:
        return "call_function", _METHODS[target]
    return kind, target


def written(kind: str, target: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
    """What a node writes into; None where it writes into nothing."""
    if "out" in kwargs:
        return kwargs["out"]
    if target is operator.setitem or changes_in_place(kind, target, kwargs):
        return args[0] if args else None
    return None


def without_aliases(graph: fx.Graph, root: nn.Module) -> None:
    """Let ``h += x`` be ``h + x`` where nothing reads the memory of ``h`` after that."""
    if not any(PLAIN in node.meta for node in graph.nodes):
        return
    owner, graph.owning_module = graph.owning_module, root  # type: ignore[assignment]
    order = {node: at for at, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        plain = node.meta.pop(PLAIN, None)
        if plain is not None and not _is_seen_elsewhere(node, order):
            node.target = plain
    graph.owning_module = owner


def _is_seen_elsewhere(node: fx.Node, order: Mapping[fx.Node, int]) -> bool:
    changed = node.args[0]
    assert isinstance(changed, fx.Node)
    for alias in sharing_memory(changed, without=node):
        if alias.op == "get_attr":  # the model keeps it from one call to the next
            return True
        if any(order[user] > order[node] and not _is_size(user) for user in alias.users):
            return True
    return False


def _is_size(node: fx.Node) -> bool:
    of_tensor = node.target is getattr and node.args[1] in ("device", "shape")
    return of_tensor or (node.op == "call_method" and node.target == "size")


__all__ = ["PLAIN", "as_operator", "without_aliases", "written"]
