"""Which nodes write into memory that others read, so that reading twice may give two values."""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.dropout import _DropoutNd

from passes.graph.graph import is_linear

# each with the operator that makes a new tensor of the same numbers
AUGMENTED: Mapping[Callable[..., Any], Callable[..., Any]] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    operator.ifloordiv: operator.floordiv,
    operator.imod: operator.mod,
    operator.ipow: operator.pow,
    operator.iand: operator.and_,
    operator.ior: operator.or_,
    operator.ixor: operator.xor,
    operator.ilshift: operator.lshift,
    operator.irshift: operator.rshift,
    operator.imatmul: operator.matmul,
}
_IN_PLACE_OPERATORS = frozenset({*AUGMENTED, operator.setitem})
# keywords of Python, which is why their names end like those of operations in place
_NAMED_LIKE_WRITES = frozenset({operator.and_, operator.or_, operator.not_, operator.is_})
_ALIASING_MODULES = (nn.Identity, nn.Flatten, nn.Unflatten, _DropoutNd)
# these may hand back their input or a view of it, and their schemas do not say so
_UNANNOTATED = frozenset(
    {
        "alpha_dropout",
        "atleast_1d",
        "atleast_2d",
        "atleast_3d",
        "broadcast_tensors",
        "dropout",
        "einsum",
        "feature_alpha_dropout",
        "feature_dropout",
        "meshgrid",
        "pad",
        "type_as",
    }
)


def is_in_place(node: fx.Node) -> bool:
    """Whether the node writes into an input: ``x.add_(1)``, ``out=x``, ``inplace=True``."""
    if "out" in node.kwargs:
        return True
    if node.op == "call_module":
        return any(getattr(m, "inplace", False) is True for m in _module(node).modules())
    if node.op == "call_method":
        return str(node.target).endswith("_")
    if node.op != "call_function":
        return False
    schema = getattr(node.target, "_schema", None)
    if schema is not None:
        return bool(schema.is_mutable)
    if node.target in _NAMED_LIKE_WRITES:
        return False
    name = getattr(node.target, "__name__", "")
    return node.target in _IN_PLACE_OPERATORS or name.endswith("_") or _asks_in_place(node)


def is_written(node: fx.Node, without: fx.Node | None = None) -> bool:
    """Whether a node writes into the memory of ``node``'s value, directly or through a view.

    Errs on the side of yes: an operation that is not known to make a new tensor counts as a view,
    but for ``without``.
    """
    return any(is_in_place(user) for at in sharing_memory(node, without) for user in _writing(at))


def sharing_memory(node: fx.Node, without: fx.Node | None = None) -> set[fx.Node]:
    """The nodes whose values may share memory with that of ``node``, which is one of them.

    Errs as :func:`is_written`. ``without`` is taken for a node that makes a new tensor.
    """
    seen, stack = {node}, [node]
    while stack:
        at = stack.pop()
        aliases = [user for user in at.users if user is not without and at in _aliased(user)]
        if at is not without:
            aliases += _aliased(at)
        stack += [alias for alias in aliases if alias not in seen]
        seen.update(aliases)
    return seen


def _writing(node: fx.Node) -> list[fx.Node]:
    """The users that write into ``node``, if they write at all: not those that have it as what
    they write."""
    return [
        user
        for user in node.users
        if user.target not in _IN_PLACE_OPERATORS or user.args[0] is node
    ]


def _aliased(node: fx.Node) -> list[fx.Node]:
    """The inputs that the result may share memory with."""
    if node.op == "call_function" and node.target in _IN_PLACE_OPERATORS:
        written = node.args[0]
        if node.target is operator.setitem or not isinstance(written, fx.Node):
            return []
        return [written]
    return node.all_input_nodes if is_in_place(node) or may_alias(node) else []


class Written(dict[fx.Node, bool]):
    """:func:`is_written` of nodes, asked once each: an input has as many readers as slices, and the
    answer takes a look at all of them. Good for as long as no write comes or goes."""

    def __missing__(self, node: fx.Node) -> bool:
        self[node] = is_written(node)
        return self[node]


def _module(node: fx.Node) -> nn.Module:
    owner = node.graph.owning_module
    assert owner is not None, "the graph belongs to no module"
    return owner.get_submodule(str(node.target))


def _asks_in_place(node: fx.Node) -> bool:
    """``F.relu(x, inplace=True)`` and ``F.relu(x, True)``."""
    assert callable(node.target)
    signature = _signature(node.target)
    try:
        bound = None if signature is None else signature.bind(*node.args, **node.kwargs)
    except TypeError:
        bound = None
    return (node.kwargs if bound is None else bound.arguments).get("inplace") is True


@functools.lru_cache(1024)
def _signature(function: Callable[..., object]) -> inspect.Signature | None:
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):  # most builtins have none, and it takes long to find that out
        return None


def may_alias(node: fx.Node) -> bool:
    """Whether the result may share memory with an input."""
    if node.op == "call_module":
        module = _module(node)
        known = is_linear(module) or type(module).__module__.startswith("torch.nn.modules.")
        return not known or isinstance(module, _ALIASING_MODULES) or is_in_place(node)
    if node.op == "call_method":
        return _returns_view(str(node.target))
    if node.op != "call_function":
        return False
    schema = getattr(node.target, "_schema", None)
    if schema is not None:
        return _aliases(schema)
    if getattr(node.target, "__module__", "") == "_operator":
        return node.target is operator.getitem
    return _returns_view(getattr(node.target, "__name__", ""))


@functools.cache
def _returns_view(name: str) -> bool:
    """By the schema of the aten operation of that name; an unknown name may do anything."""
    packet = getattr(torch.ops.aten, name, None)
    if packet is None:
        return True
    return any(_aliases(getattr(packet, overload)._schema) for overload in packet.overloads())


def _aliases(schema: torch._C.FunctionSchema) -> bool:
    if schema.name.removeprefix("aten::") in _UNANNOTATED:
        return True
    # the `out` overloads hand back what they wrote; nodes that write are found by is_in_place
    infos = [value.alias_info for value in schema.returns]
    return any(info is not None and not info.is_write for info in infos)
