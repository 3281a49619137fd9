"""What a graph makes of the values of its nodes, and who else reads the weight of a linear."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, fx

from passes.graph.graph import linear_calls
from passes.graph.operands import readers
from passes.graph.writes import is_in_place, may_alias

# these read the shape, the dtype or the device of a tensor and none of its numbers
_ATTRIBUTES = frozenset({"shape", "device", "dtype", "layout", "ndim", "is_nested"})
_OF_SHAPE = frozenset(
    {"size", "dim", "numel", "stride", "ndimension", "element_size", "is_floating_point"}
    | {"sym_size", "sym_numel", "sym_stride", "_assert_tensor_metadata"}
    | {f"{made}_like" for made in ("zeros", "ones", "empty", "full", "rand", "randn", "randint")}
    | {f"new_{made}" for made in ("zeros", "ones", "empty", "full")}
)


def is_impure(node: fx.Node) -> bool:
    """Whether a node does something beside giving a value: it writes into memory, raises, or
    changes an object that is no tensor (``cache.reset()``)."""
    return _changes_object(node) or node.is_impure() or is_in_place(node)


def used_nodes(graph: fx.Graph) -> set[fx.Node]:
    """The nodes whose numbers may reach an output, or an object that is no tensor.

    Errs on the side of yes: an operation that is not known to make a new tensor counts as a view.
    Who reads a node's shape only does not read its numbers.
    """
    writers: dict[fx.Node, list[fx.Node]] = {}
    stack: list[fx.Node] = []
    for node in graph.nodes:
        if node.op == "output" or _changes_object(node):
            stack.append(node)
        elif is_in_place(node):
            for base in _written(node):
                writers.setdefault(base, []).append(node)
    used: set[fx.Node] = set(stack)
    while stack:
        node = stack.pop()
        before = [n for n in node.all_input_nodes if not _reads_shape(node, n)]
        for further in (*before, *writers.get(node, ())):
            if further not in used:
                used.add(further)
                stack.append(further)
    return used


def other_readers(gm: fx.GraphModule) -> Mapping[str, fx.Node]:
    """The stored tensors that some node reads beside the linears that they belong to, by their
    qualified names, and the first such node."""
    linears = {call.node: call.name for call in linear_calls(gm)}
    found: dict[str, fx.Node] = {}
    for node in gm.graph.nodes:
        target = str(node.target)
        if node.op == "call_module" and node not in linears:
            found.setdefault(target, node)
        if node.op != "get_attr":
            continue
        owner = target.rpartition(".")[0]
        for user in readers(node):
            name = linears.get(user)
            if name is None or name.partition(".rows_")[0] not in (target, owner):
                found.setdefault(target, user)
    return found


def _changes_object(node: fx.Node) -> bool:
    return node.op == "call_method" and not hasattr(Tensor, str(node.target))


def _reads_shape(user: fx.Node, of: fx.Node) -> bool:
    if user.op not in ("call_method", "call_function"):
        return False
    if user.target is getattr:
        return user.args[1] in _ATTRIBUTES
    name = getattr(user.target, "__name__", str(user.target)).partition(".")[0]
    return name in _OF_SHAPE and user.args[:1] == (of,) and of not in user.args[1:]


def _written(writer: fx.Node) -> list[fx.Node]:
    """The nodes into whose memory a node writes: its operand, and what that may be part of."""
    out = writer.kwargs.get("out")
    stack = [out] if isinstance(out, fx.Node) else writer.all_input_nodes[:1]
    found: list[fx.Node] = []
    while stack:
        node = stack.pop()
        if node not in found:
            found.append(node)
            stack += node.all_input_nodes if may_alias(node) else ()
    return found


__all__ = ["is_impure", "other_readers", "used_nodes"]
